"""Limits in Lua: what local_store does, carried out by Redis as one step and on its clock.

Per subject there are a window for requests and one for tokens, each a list and a hash, and a sorted set of slots:

    <subject>:r  :t     list    the times at which admissions leave, in order
    <subject>:ra :ta    hash    time of leaving → amount; "total" → the sum
    <subject>:c         zset    request id by the end of its lease
    <request>           string  what was reserved: "tokens time_of_leaving|- …", one time for each subject

Times are whole microseconds: below 2^53, so exact in Lua's numbers, but tostring would round them. Every key expires. A list and its
hash expire at the same time; one that Redis evicted without the other counts as empty.

Written for Redis 6 and later (scripts are replicated by their effects, so that TIME may precede writes).
"""

from __future__ import annotations

# ARGV of all scripts begin: 1 time (empty: Redis TIME; tests give one), 2 window, 3 sub-bucket, 4 lease, 5 exact entries, 6 repetition.
ARGUMENTS = 6
# KEYS of a subject in ADMIT and SETTLE, in this order.
SUBJECT_KEYS = ("r", "ra", "t", "ta", "c")

_COMMON = """
local now
if ARGV[1] == '' then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(ARGV[1])
end
local window, bucket, lease = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local function whole(number)
  return string.format('%.0f', number)
end

-- Milliseconds for PEXPIRE, a second more than what is counted.
local function keep(key, microseconds)
  redis.call('PEXPIRE', key, whole(math.ceil(microseconds / 1000) + 1000))
end
"""

ADMIT = (
    _COMMON
    + """
local exact_entries, repetition = tonumber(ARGV[5]), tonumber(ARGV[6])
local request_id, tokens = ARGV[7], tonumber(ARGV[8])

-- A window without what has left. `last`: when its youngest entry leaves.
local function open(leaves, amounts, limit)
  local view = {leaves = leaves, amounts = amounts, limit = limit, total = 0}
  local first = redis.call('LINDEX', leaves, 0)
  if not first then
    return view
  end
  local left = 0
  while first and tonumber(first) <= now do
    local gone = {}
    for _, time in ipairs(redis.call('LRANGE', leaves, 0, 63)) do
      if tonumber(time) <= now then
        gone[#gone + 1] = time
      end
    end
    for _, amount in ipairs(redis.call('HMGET', amounts, unpack(gone))) do
      left = left + (tonumber(amount) or 0)
    end
    redis.call('HDEL', amounts, unpack(gone))
    redis.call('LTRIM', leaves, #gone, -1)
    first = redis.call('LINDEX', leaves, 0)
  end
  if first then
    view.last = tonumber(redis.call('LINDEX', leaves, -1))
    view.total = (tonumber(redis.call('HGET', amounts, 'total')) or 0) - left
    if left > 0 then
      redis.call('HSET', amounts, 'total', whole(view.total))
    end
  end
  return view
end

-- Microseconds until `amount` fits, 0 when it does now.
local function wait(view, amount)
  local excess, start = view.total + amount - view.limit, 0
  if excess <= 0 then
    return 0
  end
  while true do
    local times = redis.call('LRANGE', view.leaves, start, start + 63)
    if #times == 0 then
      return window
    end
    local amounts = redis.call('HMGET', view.amounts, unpack(times))
    for index, time in ipairs(times) do
      excess = excess - (tonumber(amounts[index]) or 0)
      if excess <= 0 then
        return tonumber(time) - now
      end
    end
    start = start + #times
  end
end

local function add(view, amount)
  local at, last = now + window, view.last
  if redis.call('LLEN', view.leaves) >= exact_entries then
    at = math.ceil(at / bucket) * bucket
  end
  view.total = view.total + amount
  if last and last >= at then
    redis.call('HINCRBY', view.amounts, whole(last), whole(amount))
    redis.call('HSET', view.amounts, 'total', whole(view.total))
    return whole(last)
  end
  if not last then
    redis.call('DEL', view.amounts)
  end
  redis.call('RPUSH', view.leaves, whole(at))
  redis.call('HSET', view.amounts, whole(at), whole(amount), 'total', whole(view.total))
  -- Once in a window, and long enough for all that comes until the next time.
  if not last or math.floor(at / window) > math.floor(last / window) then
    keep(view.leaves, 2 * window + bucket)
    keep(view.amounts, 2 * window + bucket)
  end
  view.last = at
  return whole(at)
end

-- limit, remaining, microseconds until the window is empty
local function state(view)
  return {view.limit, math.max(0, view.limit - view.total), math.max(0, (view.last or now) - now)}
end

local function tighter(one, view)
  local other = state(view)
  if not one or other[2] < one[2] then
    return other
  end
  return one
end

local repeated = redis.call('EXISTS', KEYS[1]) == 1
local refused_by, refused_subject, longest = '', 0, -1
local function refuse(kind, index, time)
  if time > longest then
    refused_by, refused_subject, longest = kind, index, time
  end
end

local subjects = {}
for index = 1, (#KEYS - 1) / 5 do
  local key, argument = 1 + (index - 1) * 5, 8 + (index - 1) * 3
  local requests_limit = tonumber(ARGV[argument + 1])
  local tokens_limit = tonumber(ARGV[argument + 2])
  local slots_limit = tonumber(ARGV[argument + 3])
  local subject = {}
  subjects[index] = subject
  if slots_limit >= 0 then
    subject.slots = KEYS[key + 5]
    redis.call('ZREMRANGEBYSCORE', subject.slots, '-inf', whole(now))
    if redis.call('ZCARD', subject.slots) >= slots_limit then
      refuse('concurrency', index, 0)
    end
  end
  if requests_limit >= 0 then
    subject.requests = open(KEYS[key + 1], KEYS[key + 2], requests_limit)
    local time = wait(subject.requests, 1)
    if time > 0 then
      refuse('requests', index, time)
    end
  end
  if tokens_limit >= 0 then
    subject.tokens = open(KEYS[key + 3], KEYS[key + 4], tokens_limit)
    if tokens > 0 then
      local time = wait(subject.tokens, tokens)
      if time > 0 then
        refuse('tokens', index, time)
      end
    end
  end
end

local allowed = repeated or longest < 0
if allowed and not repeated then
  local record, kept = {whole(tokens)}, repetition
  for index, subject in ipairs(subjects) do
    record[index + 1] = '-'
    if subject.requests then
      add(subject.requests, 1)
    end
    if subject.tokens then
      record[index + 1] = add(subject.tokens, tokens)
      kept = math.max(kept, window + bucket)
    end
    if subject.slots then
      redis.call('ZADD', subject.slots, whole(now + lease), request_id)
      keep(subject.slots, lease)
      kept = math.max(kept, lease)
    end
  end
  redis.call('SET', KEYS[1], table.concat(record, ' '), 'PX', whole(math.ceil(kept / 1000)))
end

local requests, used
for _, subject in ipairs(subjects) do
  if subject.requests then
    requests = tighter(requests, subject.requests)
  end
  if subject.tokens then
    used = tighter(used, subject.tokens)
  end
end
if allowed then
  return {1, '', 0, 0, requests or {}, used or {}}
end
return {0, refused_by, refused_subject, longest, requests or {}, used or {}}
"""
)

# ARGV: 7 request id, 8 tokens used. KEYS as in ADMIT.
SETTLE = """
local record = redis.call('GET', KEYS[1])
if record then
  local words = {}
  for word in string.gmatch(record, '%S+') do
    words[#words + 1] = word
  end
  local difference = string.format('%.0f', tonumber(ARGV[8]) - tonumber(words[1]))
  for index = 1, (#KEYS - 1) / 5 do
    local amounts, at = KEYS[1 + (index - 1) * 5 + 4], words[index + 1]
    -- What has left the window is not there any more.
    if at and at ~= '-' and redis.call('HEXISTS', amounts, at) == 1 then
      redis.call('HINCRBY', amounts, at, difference)
      redis.call('HINCRBY', amounts, 'total', difference)
    end
  end
  redis.call('DEL', KEYS[1])
end
for index = 1, (#KEYS - 1) / 5 do
  redis.call('ZREM', KEYS[1 + index * 5], ARGV[7])
end
return 1
"""

# KEYS: for each slot its set and the request's record. ARGV from 7: the request id of each.
RENEW = (
    _COMMON
    + """
for index = 1, #KEYS / 2 do
  local slots, record, request_id = KEYS[index * 2 - 1], KEYS[index * 2], ARGV[6 + index]
  redis.call('ZADD', slots, whole(now + lease), request_id)
  keep(slots, lease)
  if redis.call('PTTL', record) < lease / 1000 then
    redis.call('PEXPIRE', record, whole(math.ceil(lease / 1000)))
  end
end
return 1
"""
)
