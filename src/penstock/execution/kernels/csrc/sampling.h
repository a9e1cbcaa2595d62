// Tokens from logits: the vocabulary is read once for the maximum, once more for the weights of a random draw, and never sorted.
//
// The rules are those of execution/sampling/ (filters.py, draw.py, penalties.py, masks.py), whose functions are the twins of these. A row
// is divided into blocks of 128 tokens, and each block's maximum tells which blocks may be left out of everything that follows.
#include "select.h"
#include "race.h"

constexpr int64_t BLOCK = 128;
// Blocks that usually hold the nucleus of top_p: at most so many, and at most a quarter of all.
constexpr int64_t LIKELY_BLOCKS = 128;
// Below it e^x is taken for 0: it would be denormal.
constexpr float SMALLEST_EXPONENT = -87.0f;

// One row being sampled, and its memory.
struct LogitRow {
    const float* logits;
    int64_t vocab_size;
    int64_t blocks;
    float* block_maxima;   // [blocks]; later their weights
    float* block_sums;     // [blocks]
    float* weights;        // [blocks * BLOCK]
    float* memory;         // three times as many, for select.h
    float maximum;
    bool has_nan;

    LogitRow(const float* values, int64_t vocab) : logits(values), vocab_size(vocab), blocks((vocab + BLOCK - 1) / BLOCK) {
        block_sums = static_cast<float*>(scratch(0, (2 * blocks + 16) * 4));
        block_maxima = block_sums + blocks;
        weights = static_cast<float*>(scratch(1, (blocks * BLOCK + 16) * 4));
        memory = static_cast<float*>(scratch(2, (blocks * BLOCK + 16 + threshold_floats(blocks * BLOCK)) * 4));
        find_maxima();
    }

    f32x16 load(int64_t index) const { return load_some(logits + index, vocab_size - index); }
    int64_t end_of(int64_t block) const { return block + 1 < blocks ? (block + 1) * BLOCK : vocab_size; }

    void find_maxima() {
        uint32_t nan = 0;
        maximum = -__builtin_inff();
        for (int64_t block = 0; block < blocks; ++block) {
            f32x16 largest = f32x16::set(-__builtin_inff());
            const int64_t end = end_of(block);
            for (int64_t i = block * BLOCK; i < end; i += 16) {
                const f32x16 value = load(i);
                nan |= is_nan(value) & (end - i >= 16 ? 0xffffu : (1u << (end - i)) - 1);
                largest = max(value, largest);  // the second when the first is not a number
            }
            block_maxima[block] = reduce_max(largest);
            maximum = block_maxima[block] > maximum ? block_maxima[block] : maximum;
        }
        has_nan = nan != 0;
    }

    // The first token with the largest logit.
    int64_t first_largest() const {
        int64_t block = 0;
        while (block_maxima[block] < maximum) ++block;
        int64_t token = block * BLOCK;
        while (logits[token] < maximum) ++token;
        return token;
    }

    // The k-th largest logit, 1 <= k <= vocab_size. Needs `weights` as memory.
    float kth_largest(int64_t k) const {
        if (2 * k > blocks) return threshold_of<false>(logits, vocab_size, static_cast<double>(k), memory);
        // k blocks have a maximum of at least `bound`, so the k-th largest logit is not below it.
        const float bound = threshold_of<false>(block_maxima, blocks, static_cast<double>(k), memory);
        const f32x16 bounds = f32x16::set(bound);
        int64_t count = 0;
        for (int64_t block = 0; block < blocks; ++block) {
            if (block_maxima[block] < bound) continue;
            for (int64_t i = block * BLOCK, end = end_of(block); i < end; i += 16) {
                const f32x16 value = load(i);
                count += store_selected(value, at_least(value, bounds), weights + count);
            }
        }
        return threshold_of<false>(weights, count, static_cast<double>(k), memory);
    }

    // Weights e^((logit - maximum) / temperature) of tokens whose exponent is at least `cut`, 0 for the others; block_maxima become weights too.
    void weigh(float temperature, float cut) {
        cut = cut > SMALLEST_EXPONENT ? cut : SMALLEST_EXPONENT;
        const f32x16 cuts = f32x16::set(cut), maxima = f32x16::set(maximum), divisor = f32x16::set(temperature);
        for (int64_t block = 0; block < blocks; ++block) {
            float* const target = weights + block * BLOCK;
            f32x16 sum = f32x16::zero();
            if ((block_maxima[block] - maximum) / temperature >= cut) {
                for (int64_t i = 0; i < BLOCK; i += 16) {
                    const int64_t index = block * BLOCK + i;
                    if (index >= vocab_size) {
                        f32x16::zero().store(target + i);
                        continue;
                    }
                    const f32x16 exponent = (load(index) - maxima) / divisor;
                    const f32x16 weight = where_at_least(exponent, cuts, exp(exponent));
                    weight.store(target + i);
                    sum = sum + weight;
                }
            } else {
                std::memset(target, 0, BLOCK * sizeof(float));
            }
            block_sums[block] = reduce_add(sum);
        }
        for (int64_t block = 0; block < blocks; block += 16) {
            const f32x16 exponent = (load_some(block_maxima + block, blocks - block) - maxima) / divisor;
            float values[16];
            where_at_least(exponent, cuts, exp(exponent)).store(values);
            for (int64_t i = 0; i < 16 && block + i < blocks; ++i) block_maxima[block + i] = values[i];
        }
    }

    double total() const {
        double sum = 0.0;
        for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(block_sums[block]);
        return sum;
    }

    // The smallest weight that top_p keeps.
    float nucleus_threshold(double top_p) const {
        const double goal = top_p * total();
        const int64_t likely = blocks / 4 < LIKELY_BLOCKS ? blocks / 4 : LIKELY_BLOCKS;
        if (likely > 0) {
            const float bound = threshold_of<false>(block_maxima, blocks, static_cast<double>(likely), memory);
            const f32x16 bounds = f32x16::set(bound);
            int64_t count = 0;
            for (int64_t block = 0; block < blocks && bound > 0.0f; ++block) {
                if (block_maxima[block] < bound) continue;
                for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i += 16) {
                    const f32x16 weight = f32x16::load(weights + i);
                    count += store_selected(weight, at_least(weight, bounds), memory + count);
                }
            }
            // All weights of at least `bound` are there: when they are enough, the others do not matter.
            if (count > 0 && sum_of(memory, count) >= goal) return threshold_of<true>(memory, count, goal, memory + count + 16);
        }
        return threshold_of<true>(weights, blocks * BLOCK, goal, memory);
    }

    // Forget the weights below `bound`.
    void keep_from(float bound) {
        const f32x16 bounds = f32x16::set(bound);
        for (int64_t block = 0; block < blocks; ++block) {
            f32x16 sum = f32x16::zero();
            if (block_maxima[block] >= bound) {
                for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i += 16) {
                    const f32x16 weight = f32x16::load(weights + i);
                    sum = sum + where_at_least(weight, bounds, weight);
                }
            }
            block_sums[block] = reduce_add(sum);
        }
    }

    // A token with a weight of at least `bound`, in proportion to the weights: a race of blocks, then one of the winner's tokens.
    int64_t draw(uint64_t start, float bound) const {
        Race of_blocks{start};
        for (int64_t first = 0; first < blocks; first += FIELD)
            of_blocks.run(0, first, block_sums + first, blocks - first < FIELD ? blocks - first : FIELD, 0.0f);
        Race of_tokens{start};
        const int64_t first = of_blocks.winner * BLOCK;
        static_assert(BLOCK <= FIELD, "all tokens of a block run together");
        of_tokens.run(FIRST_TOKEN, first, weights + first, end_of(of_blocks.winner) - first, bound);
        return of_tokens.winner;
    }
};

// Penalties, then biases, then masks.
inline void edit_logits(const SampleCall& call, const SamplingSlot& slot, int64_t position, float* logits) {
    for (int64_t i = 0; i < slot.used.count; ++i) {
        float& logit = logits[slot.used.ids[i]];
        const float times = slot.used.values[i];
        float value = logit > 0.0f ? logit / slot.repetition : logit * slot.repetition;
        value -= times * slot.frequency;
        logit = times > 0.0f ? value - slot.presence : value;
    }
    const TokenList& biased = slot.biased;
    if (slot.only_biased) {
        float* const kept = static_cast<float*>(scratch(1, (biased.count + 1) * 4));
        for (int64_t i = 0; i < biased.count; ++i) kept[i] = logits[biased.ids[i]];
        for (int64_t i = 0; i < call.vocab_size; ++i) logits[i] -= __builtin_inff();  // not a number stays what it is
        for (int64_t i = 0; i < biased.count; ++i) logits[biased.ids[i]] = kept[i] + biased.values[i];
    } else {
        for (int64_t i = 0; i < biased.count; ++i) logits[biased.ids[i]] += biased.values[i];
    }
    if (position < slot.end_position)
        for (int64_t i = 0; i < slot.stops.count; ++i) logits[slot.stops.ids[i]] = -__builtin_inff();
}

inline int64_t draw_token(LogitRow& row, const SamplingSlot& slot, int64_t position) {
    const float temperature = slot.temperature > 1.17549435e-38f ? slot.temperature : 1.17549435e-38f;
    const bool k_on = slot.top_k < row.vocab_size, p_on = slot.top_p < 1.0, m_on = slot.min_p > 0.0;
    const float likely = m_on ? static_cast<float>(__builtin_log(slot.min_p)) : -__builtin_inff();
    // top_k and, where it may come first, min_p are thresholds of exponents: those are exact.
    float cut = k_on ? (row.kth_largest(slot.top_k) - row.maximum) / temperature : -__builtin_inff();
    if (!p_on && likely > cut) cut = likely;
    row.weigh(temperature, cut);
    float bound = 0.0f;
    if (p_on) {
        bound = row.nucleus_threshold(slot.top_p);
        if (m_on) {
            float weight[16];
            exp(f32x16::set(likely)).store(weight);
            bound = weight[0] > bound ? weight[0] : bound;
        }
        row.keep_from(bound);
    }
    return row.draw(position_start(slot.key, position), bound);
}

inline void sample_row(const SampleCall& call, int64_t index) {
    const SamplingSlot& slot = call.slots[call.slot_of_row[index]];
    const int64_t position = call.positions[index];
    float* const logits = call.logits + index * call.stride;
    edit_logits(call, slot, position, logits);
    LogitRow row(logits, call.vocab_size);
    const bool failed = row.has_nan || !__builtin_isfinite(row.maximum);
    call.failed[index] = failed;
    if (failed) call.token_ids[index] = 0;
    else call.token_ids[index] = slot.temperature > 0.0f ? draw_token(row, slot, position) : row.first_largest();
}

// The `num_top` most likely tokens, lower ids first among equals.
inline void find_top(const LogitRow& row, int64_t num_top, int64_t* ids, float* values) {
    const float kth = row.kth_largest(num_top);
    int64_t count = 0;
    for (int pass = 0; pass < 2; ++pass) {  // those above the last one, then its equals as far as there is room
        for (int64_t block = 0; block < row.blocks && count < num_top; ++block) {
            if (row.block_maxima[block] < kth) continue;
            for (int64_t token = block * BLOCK, end = row.end_of(block); token < end && count < num_top; ++token) {
                const float value = row.logits[token];
                if (pass == 0 ? !(value > kth) : value != kth) continue;
                int64_t place = count++;
                for (; place > 0 && values[place - 1] < value; --place) {
                    values[place] = values[place - 1];
                    ids[place] = ids[place - 1];
                }
                values[place] = value;
                ids[place] = token;
            }
        }
    }
}

inline void logprob_row(const LogprobCall& call, int64_t index) {
    LogitRow row(call.logits + (call.logit_rows ? call.logit_rows[index] : index) * call.stride, call.vocab_size);
    int64_t* const top_ids = call.top_ids + index * call.num_top;
    float* const top = call.top_logprobs + index * call.num_top;
    if (row.has_nan || !__builtin_isfinite(row.maximum)) {
        call.logprobs[index] = __builtin_nanf("");
        call.ranks[index] = 1;
        for (int64_t i = 0; i < call.num_top; ++i) top[i] = __builtin_nanf(""), top_ids[i] = i;
        return;
    }
    const float chosen = row.logits[call.token_ids[index]];
    const f32x16 chosen_everywhere = f32x16::set(chosen);
    int64_t rank = 1;
    for (int64_t block = 0; block < row.blocks; ++block) {
        if (!(row.block_maxima[block] > chosen)) continue;
        for (int64_t i = block * BLOCK, end = row.end_of(block); i < end; i += 16)
            rank += __builtin_popcount(greater(row.load(i), chosen_everywhere));
    }
    if (call.num_top > 0) find_top(row, call.num_top, top_ids, top);
    row.weigh(1.0f, -__builtin_inff());
    const double normalizer = static_cast<double>(row.maximum) + __builtin_log(row.total());
    call.logprobs[index] = static_cast<float>(static_cast<double>(chosen) - normalizer);
    call.ranks[index] = rank;
    for (int64_t i = 0; i < call.num_top; ++i) top[i] = static_cast<float>(static_cast<double>(top[i]) - normalizer);
}
