"""Which KV blocks a request holds, and what has to be moved so that it may hold them.

    tokens of a request admitted with a prefix hit, block size 4:

    │ b7: cached on the device │ b2 ← host block │ b9: new           │
    │ t0   t1   t2   t3        │ t4 t5 t6 t7     │ t8 t9 t10 …       │
    └── referenced, not run ───┴── swapped in ───┴── scheduled now ──┘

    a sample that shares its leader's prompt of 7 tokens (copy on write; the last prompt token is computed again for its logits):

    │ b7: shared               │ b5 ← copy of b3 │
    │ t0   t1   t2   t3        │ t4 t5 (t6) …    │

Blocks are named (and found by others) when the step that computed them has retired, never before. Blocks of a request that ends
while steps in flight still touch them come back when the last of these steps has retired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.errors import IntegrityError
from penstock.engine.block_pool import BlockHash, BlockPool
from penstock.engine.executor import KVCapacity
from penstock.engine.host_tier import HostTier
from penstock.engine.prefix_cache import extend_block_hashes
from penstock.engine.request import Request
from penstock.engine.step import BlockMove


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that already hold a request's first tokens: some on the device, then some on the host."""

    device_blocks: list[int]
    host_blocks: list[int]
    num_tokens: int


@dataclass(slots=True)
class BlockMoves:
    """Moves that the next step must do, in the runner's order (see engine/step.py)."""

    swap_outs: list[BlockMove] = field(default_factory=list)
    swap_ins: list[BlockMove] = field(default_factory=list)
    copies: list[BlockMove] = field(default_factory=list)


class KVCacheManager:
    """Allocates blocks to requests. `prefix_caching` False: blocks are never found again (and the host tier is unused)."""

    def __init__(self, capacity: KVCapacity, *, prefix_caching: bool = True) -> None:
        self.block_size = capacity.block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(capacity.num_blocks, self._on_evict)
        self.host = HostTier(capacity.num_host_blocks) if capacity.num_host_blocks and prefix_caching else None
        self._moves = BlockMoves()
        self._last_retired_step = -1
        self._deferred: dict[int, list[int]] = {}
        self._pinned: dict[int, list[int]] = {}

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def num_deferred(self) -> int:
        """Block references that come back when steps in flight retire."""
        return sum(map(len, self._deferred.values()))

    def match_prefix(self, request: Request) -> PrefixMatch:
        """The longest known prefix in whole blocks, short of the last token (its logits are wanted, so it is computed)."""
        device: list[int] = []
        host: list[int] = []
        if self.prefix_caching and not request.needs_prompt_logprobs:
            extend_block_hashes(request.block_hashes, request.root_hash, request.token_ids, self.block_size)
            for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
                block_id = self.pool.find(block_hash) if not host else None
                host_id = self.host.find(block_hash) if block_id is None and self.host is not None else None
                if block_id is not None:
                    device.append(block_id)
                elif host_id is not None:
                    host.append(host_id)
                else:
                    break
        return PrefixMatch(device, host, (len(device) + len(host)) * self.block_size)

    def missing(self, request: Request, match: PrefixMatch, num_tokens: int) -> int:
        """How many blocks more must be free before the request can have those of its first `num_tokens` tokens, those of `match` counted
        in; negative when some are left over."""
        reused = sum(1 for block_id in match.device_blocks if self.pool.ref_count(block_id) > 0)
        return self.blocks_for(num_tokens) - reused - self.pool.num_free

    def num_exclusive(self, request: Request) -> int:
        """Blocks that become free when this request is released."""
        return sum(1 for block_id in request.block_ids if self.pool.ref_count(block_id) == 1)

    @property
    def has_copies(self) -> bool:
        """The next step copies blocks: those they come from must stay where they are."""
        return bool(self._moves.copies)

    def admit(self, request: Request, match: PrefixMatch, num_tokens: int) -> None:
        """Give a request without blocks those of its first `num_tokens` tokens; `missing` was asked before."""
        self.pool.reference(match.device_blocks)
        for host_id in match.host_blocks:  # before `take`, which may look for host blocks to overwrite
            self._pin(host_id)
        num_new = self.blocks_for(num_tokens) - len(match.device_blocks)
        new_blocks = self.pool.take(num_new)
        for host_id, block_id in zip(match.host_blocks, new_blocks, strict=False):
            self._moves.swap_ins.append(BlockMove(host_id, block_id))
        request.block_ids = [*match.device_blocks, *new_blocks]
        # Swapped-in blocks are named when this step has retired, like computed ones.
        request.num_cached_blocks = len(match.device_blocks)

    def fork(self, request: Request, leader: Request, num_tokens: int) -> bool:
        """Share the leader's blocks of the prompt's first `num_tokens - 1` tokens, the last one copied if it is partial.

        False when the one block this may take is not free: nothing was changed.
        """
        num_shared = (num_tokens - 1) // self.block_size
        if self.pool.num_free < 1:
            return False
        shared = leader.block_ids[:num_shared]
        self.pool.reference(shared)
        (own,) = self.pool.take(1)
        if (num_tokens - 1) % self.block_size:
            self._moves.copies.append(BlockMove(leader.block_ids[num_shared], own))
        request.block_ids = [*shared, own]
        request.num_cached_blocks = num_shared
        return True

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Append blocks until `num_tokens` tokens have room; None (and no change) when they are not free."""
        if num_tokens <= len(request.block_ids) * self.block_size:
            return []
        missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if missing > self.pool.num_free:
            return None
        new_blocks = self.pool.take(missing)
        request.block_ids.extend(new_blocks)
        return new_blocks

    def release(self, request: Request) -> None:
        """Take all blocks from a request; those that steps in flight touch come back when these have retired."""
        blocks = request.block_ids[::-1]
        request.block_ids = []
        request.num_cached_blocks = 0
        if request.last_step_id > self._last_retired_step:
            self._deferred.setdefault(request.last_step_id, []).extend(blocks)
        else:
            self.pool.release(blocks)

    def cache_computed_blocks(self, request: Request) -> None:
        """Name the full blocks whose tokens are known and whose steps have retired."""
        if not self.prefix_caching:
            return
        if request.num_retired_tokens < (request.num_cached_blocks + 1) * self.block_size:
            return  # the usual case, once per request and step
        num_full = min(request.num_retired_tokens, request.num_tokens) // self.block_size
        if num_full <= request.num_cached_blocks:
            return
        extend_block_hashes(request.block_hashes, request.root_hash, request.token_ids, self.block_size)
        for index in range(request.num_cached_blocks, num_full):
            self.pool.cache(request.block_ids[index], request.block_hashes[index])
        request.num_cached_blocks = num_full

    def take_moves(self, step_id: int) -> BlockMoves:
        """The moves collected since the last call, for step `step_id`; the host blocks it reads stay pinned until it retires."""
        moves, self._moves = self._moves, BlockMoves()
        if moves.swap_ins:
            self._pinned[step_id] = [move.source for move in moves.swap_ins]
        return moves

    def retire_step(self, step_id: int, *, failed_swap_outs: Iterable[BlockMove] = ()) -> None:
        """The step has finished; `failed_swap_outs`: copies to the host that cannot be trusted because it failed."""
        self._last_retired_step = step_id
        for block_id in self._pinned.pop(step_id, ()):
            if self.host is not None:
                self.host.unpin(block_id)
        if self.host is not None:
            self.host.drop([move.target for move in failed_swap_outs])
        self.pool.release(self._deferred.pop(step_id, ()))

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise IntegrityError unless free + used = total and every reference belongs to a request or waits for a step."""
        expected: Counter[int] = Counter()
        for request in requests:
            expected.update(request.block_ids)
        for blocks in self._deferred.values():
            expected.update(blocks)
        self.pool.check_integrity(expected)
        if self.pool.num_free + len(expected) != self.pool.num_blocks:
            raise IntegrityError(f"{self.pool.num_free} free + {len(expected)} used ≠ {self.pool.num_blocks} blocks")
        if self.host is not None:
            self.host.check_integrity()

    def _on_evict(self, block_hash: BlockHash, block_id: int) -> None:
        if self.host is not None:
            host_id = self.host.store(block_hash)
            if host_id is not None:
                self._moves.swap_outs.append(BlockMove(block_id, host_id))

    def _pin(self, host_id: int) -> None:
        assert self.host is not None  # noqa: S101  a match with host blocks came from it
        self.host.pin(host_id)
