#include "moe.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "abi.h"

namespace penstock {
namespace {

constexpr int64_t ROWS_PER_TILE = 4;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The most that one row of input takes, over all experts. Several rows never take more than as many times that.
int64_t row_bytes(const ExpertLayer& layer, const LinearLayer* Expert::*product) {
    int64_t most = 0;
    for (int32_t i = 0; i < layer.num_present; ++i) most = std::max(most, layer_input_bytes(*(layer.experts[i].*product), 1));
    return most;
}

template <class F> void for_rows(Team& team, int64_t rows, F&& body) {
    team.for_tiles((rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE, [&](int64_t tile) {
        const int64_t end = std::min(rows, (tile + 1) * ROWS_PER_TILE);
        for (int64_t row = tile * ROWS_PER_TILE; row < end; ++row) body(row);
    });
}

// The larger of two places in `values`, the first one when they are equal. A number is larger than none.
int32_t better(const float* values, int32_t best, int32_t other) { return best < 0 || values[other] > values[best] ? other : best; }

// Memory of the calling thread, kept between steps.
class Workspace {
  public:
    ~Workspace() { std::free(memory_); }
    void* reserve(int64_t bytes) {
        if (bytes <= bytes_) return memory_;
        std::free(memory_);
        memory_ = std::aligned_alloc(64, static_cast<size_t>(bytes));
        bytes_ = memory_ == nullptr ? 0 : bytes;
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace

ExpertWork::ExpertWork(const ExpertLayer& layer, int64_t tokens) : layer_(layer), tokens_(tokens) {}

int64_t ExpertWork::bytes() const {
    const int64_t pairs = tokens_ * layer_.per_token;
    return 5 * aligned(pairs * 4) + aligned(layer_.num_present * static_cast<int64_t>(sizeof(Active))) +
           aligned(pairs * std::max(2 * layer_.intermediate_size, layer_.hidden_size) * 4) + pairs * row_bytes(layer_, &Expert::gate_up) +
           pairs * row_bytes(layer_, &Expert::down);
}

void ExpertWork::use(void* memory) {
    const int64_t pairs = tokens_ * layer_.per_token;
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t bytes) {
        char* place = next;
        next += aligned(bytes);
        return place;
    };
    chosen_ = reinterpret_cast<int32_t*>(take(pairs * 4));
    weights_ = reinterpret_cast<float*>(take(pairs * 4));
    places_ = reinterpret_cast<int32_t*>(take(pairs * 4));
    pair_token_ = reinterpret_cast<int32_t*>(take(pairs * 4));
    pair_active_ = reinterpret_cast<int32_t*>(take(pairs * 4));
    active_ = reinterpret_cast<Active*>(take(layer_.num_present * static_cast<int64_t>(sizeof(Active))));
    gate_up_ = reinterpret_cast<float*>(take(pairs * std::max(2 * layer_.intermediate_size, layer_.hidden_size) * 4));
    inputs_ = take(pairs * row_bytes(layer_, &Expert::gate_up));
    down_inputs_ = next;
}

void ExpertWork::run(Team& team, const float* x, const float* logits, float* output, bool accumulate) {
    const KernelTable& table = kernels();
    const int64_t hidden = layer_.hidden_size, inner = layer_.intermediate_size;
    for_rows(team, tokens_, [&](int64_t token) { route(logits, token); });
    team.for_tiles(1, [&](int64_t) { arrange(); });
    for_rows(team, pairs_, [&](int64_t pair) {
        const Active& active = active_[pair_active_[pair]];
        for (int32_t form = 0; form < active.gate_up_input.num_rows; ++form)
            table.emit_row(x + pair_token_[pair] * hidden, active.gate_up_input.rows[form], pair - active.start);
    });
    const int64_t last = num_active_ - 1;
    const int64_t tiles = num_active_ == 0 ? 0 : active_[last].gate_up_end, down_tiles = num_active_ == 0 ? 0 : active_[last].down_end;
    team.for_tiles(tiles, [&](int64_t tile) { run_tile(tile, &Active::gate_up, &Active::gate_up_end); });
    for_rows(team, pairs_, [&](int64_t pair) {
        const Active& active = active_[pair_active_[pair]];
        const SiluCall silu{gate_up_ + active.start * 2 * inner, inner, active.down_input.rows, active.down_input.num_rows};
        table.silu_row(silu, pair - active.start);
    });
    team.for_tiles(down_tiles, [&](int64_t tile) { run_tile(tile, &Active::down, &Active::down_end); });
    for_rows(team, tokens_, [&](int64_t token) {
        const int64_t first = token * layer_.per_token;
        table.mix_row({gate_up_, hidden, places_ + first, weights_ + first, layer_.per_token, output + token * hidden, accumulate});
    });
}

// The experts of one token, the largest share first, and their weights. Of equal shares the expert with the lower number comes first.
void ExpertWork::route(const float* logits, int64_t token) {
    const int32_t experts = layer_.num_experts, per_token = layer_.per_token;
    const float* const row = logits + token * experts;
    float* const shares = static_cast<float*>(scratch(2, experts * static_cast<int64_t>(sizeof(float))));
    const float largest = *std::max_element(row, row + experts);
    float sum = 0.0f;
    for (int32_t e = 0; e < experts; ++e) sum += shares[e] = std::exp(row[e] - largest);
    int32_t* const chosen = chosen_ + token * per_token;
    float* const weights = weights_ + token * per_token;
    float chosen_sum = 0.0f;
    for (int32_t k = 0; k < per_token; ++k) {
        int32_t best = -1;
        for (int32_t e = 0; e < experts; ++e)
            if (std::find(chosen, chosen + k, e) == chosen + k) best = better(shares, best, e);
        chosen[k] = best;
        chosen_sum += weights[k] = shares[best] / sum;
    }
    if (!layer_.renormalize) return;
    for (int32_t k = 0; k < per_token; ++k) weights[k] /= chosen_sum;
}

// Put pairs in order and plan the products of every expert that has some. One thread does it.
void ExpertWork::arrange() {
    const int64_t wanted = tokens_ * layer_.per_token;
    for (int32_t i = 0; i < layer_.num_present; ++i) active_[i].count = 0;
    for (int64_t pair = 0; pair < wanted; ++pair) {
        const int32_t local = chosen_[pair] - layer_.first_expert;
        if (local >= 0 && local < layer_.num_present) ++active_[local].count;
    }
    pairs_ = 0;
    for (int32_t i = 0; i < layer_.num_present; ++i) {
        active_[i].start = pairs_;
        pairs_ += active_[i].count;
    }
    for (int64_t pair = 0; pair < wanted; ++pair) {
        const int32_t local = chosen_[pair] - layer_.first_expert;
        places_[pair] = -1;
        if (local < 0 || local >= layer_.num_present) continue;
        const int64_t place = active_[local].start++;
        places_[pair] = static_cast<int32_t>(place);
        pair_token_[place] = static_cast<int32_t>(pair / layer_.per_token);
    }
    num_active_ = 0;
    char *inputs = inputs_, *down_inputs = down_inputs_;
    for (int32_t i = 0; i < layer_.num_present; ++i) {
        const int64_t count = active_[i].count, end = active_[i].start;
        if (count == 0) continue;
        // An entry moves to the front only over entries that have been read.
        Active& active = active_[num_active_];
        active.start = end - count, active.count = count;
        plan(active, layer_.experts[i], inputs, down_inputs);
        inputs += layer_input_bytes(*layer_.experts[i].gate_up, count);
        down_inputs += layer_input_bytes(*layer_.experts[i].down, count);
        std::fill(pair_active_ + active.start, pair_active_ + end, num_active_++);
    }
}

void ExpertWork::plan(Active& active, const Expert& expert, char* inputs, char* down_inputs) {
    const KernelTable& table = kernels();
    const int64_t hidden = layer_.hidden_size, both = 2 * layer_.intermediate_size;
    active.gate_up_input = layer_input(*expert.gate_up, active.count, inputs);
    active.gate_up = layer_product(table, *expert.gate_up, active.gate_up_input, active.count, gate_up_ + active.start * both, both, false);
    active.down_input = layer_input(*expert.down, active.count, down_inputs);
    active.down = layer_product(table, *expert.down, active.down_input, active.count, gate_up_ + active.start * hidden, hidden, false);
    const Active* before = &active == active_ ? nullptr : &active - 1;
    active.gate_up_end = active.gate_up.tiles + (before == nullptr ? 0 : before->gate_up_end);
    active.down_end = active.down.tiles + (before == nullptr ? 0 : before->down_end);
}

void ExpertWork::run_tile(int64_t tile, LayerProduct Active::*product, int64_t Active::*end) const {
    const Active* owner = std::upper_bound(active_, active_ + num_active_, tile, [&](int64_t t, const Active& a) { return t < a.*end; });
    run_layer_tile(kernels(), owner->*product, tile - (owner->*end - (owner->*product).tiles));
}

}  // namespace penstock

// output [tokens, H] (+)= what the experts give for x [tokens, H] with the router's logits [tokens, num_experts]. 0: done. 1: out of memory;
// nothing has been computed.
PENSTOCK_EXPORT int32_t penstock_experts(const penstock::ExpertLayer* layer, const float* x, const float* logits, int64_t tokens,
                                         float* output, int32_t accumulate) {
    using namespace penstock;
    if (tokens == 0) return 0;
    thread_local Workspace workspace;
    ExpertWork work(*layer, tokens);
    void* memory = workspace.reserve(aligned(work.bytes()));
    if (memory == nullptr) return 1;
    work.use(memory);
    run_team([&](Team& team) { work.run(team, x, logits, output, accumulate != 0); });
    return 0;
}
