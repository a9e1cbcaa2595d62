// A whole stack of pre-norm decoder layers (Llama and its relatives) in one parallel region.
//
// The threads stay together from the first layer to the last and meet at a barrier after each kernel; between two kernels there is no
// Python, no allocation and no start of threads. What the layers are made of comes from models/native_decoder.py; each kernel is the
// same one that the modules use on their own.
//
//     residual ─┬─ norm ─ qkv ─ rotate, write KV ─ attention ─ o ─(+)─┬─ norm ─ gate, up ─ silu * ─ down ─(+)─ …
//               └─────────────────────────────────────────────────┘   └──────────────────────────────────┘
//
// In place of gate, up and down a layer may have a mixture of experts (moe.h), before which its router multiplies the same norm.
//
// With tensor parallelism every rank has a part of each layer, and o and down give a part of what is to be added. Rank 0 adds its part to
// the residual, the others put theirs in its place, and then the residuals are summed over the ranks: the sum needs no memory of its own.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "abi.h"
#include "kernels.h"
#include "layer.h"
#include "moe.h"
#include "team.h"

namespace penstock {

// One layer's weights. Norm weights are float32; q_norm and k_norm are null where heads are not normalised. A layer has gate_up and down, or
// router and experts; the others are null.
struct DecoderLayer {
    const float* input_norm;
    const float* post_attention_norm;
    const float* q_norm;
    const float* k_norm;
    const LinearLayer* qkv;
    const LinearLayer* o;
    const LinearLayer* gate_up;
    const LinearLayer* down;
    const LinearLayer* router;
    const ExpertLayer* experts;
    int32_t sliding_window;  // 0: none
};

// num_heads, num_kv_heads and intermediate_size are those of this rank. final_norm: null where another process has it; the result is then
// the residual. all_reduce: replaces `count` floats by their sum over all ranks, the same bits on each, and answers 0, or something else
// when a rank is gone; null when there is one rank.
struct DecoderSpec {
    int32_t num_layers;
    int32_t num_heads, num_kv_heads, head_dim;
    int64_t hidden_size, intermediate_size;
    float norm_eps;
    const float* final_norm;
    const DecoderLayer* layers;
    int32_t (*all_reduce)(void* context, float* data, int64_t count);
    void* reduce_context;
    int32_t rank;
};

// One step; see attention/context.py for the metadata. residual [T, hidden_size] holds the embeddings, or what the layers before these
// gave, and is overwritten; hidden [T, hidden_size] gets the normalised output. caches: one per layer.
struct DecoderStep {
    int64_t num_tokens;
    float* residual;
    float* hidden;
    const int64_t* positions;
    const float* cos_sin;
    const int64_t* slot_mapping;
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* block_tables;
    int64_t block_table_stride;
    const KVCacheLayer* caches;
    int32_t num_requests;
    int32_t block_size;
    int32_t kv_kind;
};

namespace {

constexpr int64_t ROWS_PER_TILE = 4;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory of one step, reused by all layers and kept between steps.
class Workspace {
  public:
    ~Workspace() { std::free(memory_); }
    void reserve(int64_t bytes) {
        if (bytes <= bytes_) return;
        std::free(memory_);
        bytes_ = 0;
        memory_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(aligned(bytes))));
        if (memory_ == nullptr) throw std::bad_alloc();
        bytes_ = bytes;
    }
    char* data() { return memory_; }

  private:
    char* memory_ = nullptr;
    int64_t bytes_ = 0;
};

class Decoder {
  public:
    explicit Decoder(const DecoderSpec& spec) : spec_(spec) {}

    // False when a sum over ranks has failed.
    bool forward(const DecoderStep& step) {
        plan(step);
        failed_ = false;
        const std::thread::id caller = std::this_thread::get_id();
        run_team([&](Team& team) {
            const bool speaks = std::this_thread::get_id() == caller;
            ExpertWork* mixture = mixtures_.data();
            for (int32_t index = 0; index < spec_.num_layers; ++index) {
                const DecoderLayer& layer = spec_.layers[index];
                attend(team, step, layer, step.caches[index]);
                if (!sum_over_ranks(team, step, speaks)) return;
                if (layer.experts == nullptr) feed_forward(team, step, layer);
                else mix_experts(team, step, layer, *mixture++);
                if (!sum_over_ranks(team, step, speaks)) return;
            }
            if (spec_.final_norm == nullptr) return;
            Rows target{ROW_FLOAT32, 0, spec_.hidden_size, spec_.hidden_size, step.hidden, nullptr, nullptr, nullptr};
            norm(team, step, spec_.final_norm, &target, 1);
        });
        return !failed_;
    }

  private:
    int64_t query_width() const { return int64_t(spec_.num_heads) * spec_.head_dim; }
    int64_t qkv_width() const { return query_width() + 2 * int64_t(spec_.num_kv_heads) * spec_.head_dim; }

    AttentionCall attention_call(const DecoderStep& step, const DecoderLayer& layer, const KVCacheLayer& cache) const {
        AttentionCall call{};
        call.query = qkv_, call.query_stride = qkv_width();
        call.output = attended_, call.output_stride = query_width();
        call.num_heads = spec_.num_heads, call.num_kv_heads = spec_.num_kv_heads, call.head_dim = spec_.head_dim;
        call.block_size = step.block_size, call.num_requests = step.num_requests, call.kv_kind = step.kv_kind;
        call.num_tokens = step.num_tokens;
        call.query_start = step.query_start, call.seq_lens = step.seq_lens;
        call.block_tables = step.block_tables, call.block_table_stride = step.block_table_stride;
        call.scale = scale_, call.sliding_window = layer.sliding_window;
        call.cache = cache, call.partials = partials_;
        return call;
    }

    // Lay out the workspace for this step.
    //
    //   qkv | attended | gate_up | rows (the input of one linear layer) | attention partials | normalised | logits of the router | experts
    void plan(const DecoderStep& step) {
        const int64_t tokens = step.num_tokens;
        int64_t rows = 0, partials = 0, logits = 0, experts = 0;
        mixtures_.clear();
        for (int32_t index = 0; index < spec_.num_layers; ++index) {
            const DecoderLayer& layer = spec_.layers[index];
            for (const LinearLayer* linear : {layer.qkv, layer.o, layer.gate_up, layer.down, layer.router})
                if (linear != nullptr) rows = std::max(rows, layer_input_bytes(*linear, tokens));
            if (layer.experts != nullptr) {
                mixtures_.emplace_back(*layer.experts, tokens);
                logits = std::max(logits, tokens * layer.experts->num_experts);
                experts = std::max(experts, mixtures_.back().bytes());
            }
            partials = std::max(partials, kernels().attention_partial_floats(attention_call(step, layer, KVCacheLayer{})));
        }
        const int64_t sizes[] = {aligned(tokens * qkv_width() * 4), aligned(tokens * query_width() * 4),
                                 aligned(tokens * 2 * spec_.intermediate_size * 4), aligned(rows), aligned(partials * 4),
                                 mixtures_.empty() ? 0 : aligned(tokens * spec_.hidden_size * 4), aligned(logits * 4), aligned(experts)};
        int64_t total = 0;
        for (int64_t size : sizes) total += size;
        workspace_.reserve(total);
        char* next = workspace_.data();
        qkv_ = reinterpret_cast<float*>(next), next += sizes[0];
        attended_ = reinterpret_cast<float*>(next), next += sizes[1];
        gate_up_ = reinterpret_cast<float*>(next), next += sizes[2];
        rows_ = next, next += sizes[3];
        partials_ = reinterpret_cast<float*>(next), next += sizes[4];
        normalized_ = reinterpret_cast<float*>(next), next += sizes[5];
        logits_ = reinterpret_cast<float*>(next), next += sizes[6];
        for (ExpertWork& mixture : mixtures_) mixture.use(next);
    }

    // Sum the residual over the ranks. Only the thread that called forward() speaks to the others: it is the one that Python knows. Every
    // thread gets the same answer: whether that went well.
    bool sum_over_ranks(Team& team, const DecoderStep& step, bool speaks) {
        if (spec_.all_reduce == nullptr) return true;
        if (speaks) failed_ = spec_.all_reduce(spec_.reduce_context, step.residual, step.num_tokens * spec_.hidden_size) != 0;
        team.for_tiles(0, [](int64_t) {});
        return !failed_;
    }

    // Rows in tiles: one claim of the counter for a few of them.
    template <class F> void for_rows(Team& team, int64_t rows, F&& body) {
        team.for_tiles((rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE, [&](int64_t tile) {
            const int64_t end = std::min(rows, (tile + 1) * ROWS_PER_TILE);
            for (int64_t row = tile * ROWS_PER_TILE; row < end; ++row) body(row);
        });
    }

    void norm(Team& team, const DecoderStep& step, const float* weight, const Rows* targets, int32_t num_targets) {
        const NormCall call{step.residual, spec_.hidden_size, spec_.hidden_size, weight, spec_.norm_eps, targets, num_targets};
        for_rows(team, step.num_tokens, [&](int64_t row) { kernels().norm_row(call, row); });
    }

    void attend(Team& team, const DecoderStep& step, const DecoderLayer& layer, const KVCacheLayer& cache) {
        const int64_t tokens = step.num_tokens;
        const LayerInput qkv_input = layer_input(*layer.qkv, tokens, rows_);
        norm(team, step, layer.input_norm, qkv_input.rows, qkv_input.num_rows);
        multiply(team, *layer.qkv, qkv_input, tokens, qkv_, qkv_width(), false);

        RotaryCall rotary{};
        rotary.qkv = qkv_, rotary.qkv_stride = qkv_width();
        rotary.num_heads = spec_.num_heads, rotary.num_kv_heads = spec_.num_kv_heads, rotary.head_dim = spec_.head_dim;
        rotary.block_size = step.block_size, rotary.positions = step.positions, rotary.cos_sin = step.cos_sin;
        rotary.q_norm = layer.q_norm, rotary.k_norm = layer.k_norm, rotary.norm_eps = spec_.norm_eps;
        rotary.slot_mapping = step.slot_mapping, rotary.kv_kind = step.kv_kind, rotary.cache = cache;
        for_rows(team, tokens, [&](int64_t row) { kernels().rotary_row(rotary, row); });

        const AttentionCall call = attention_call(step, layer, cache);
        team.for_tiles(kernels().attention_tiles(call), [&](int64_t tile) { kernels().attention_tile(call, tile); });
        if (const int64_t tiles = kernels().attention_merge_tiles(call))
            team.for_tiles(tiles, [&](int64_t tile) { kernels().attention_merge_tile(call, tile); });

        const LayerInput o_input = layer_input(*layer.o, tokens, rows_);
        for_rows(team, tokens, [&](int64_t row) {
            for (int32_t i = 0; i < o_input.num_rows; ++i)
                kernels().emit_row(attended_ + row * query_width(), o_input.rows[i], row);
        });
        multiply(team, *layer.o, o_input, tokens, step.residual, spec_.hidden_size, spec_.rank == 0);
    }

    void feed_forward(Team& team, const DecoderStep& step, const DecoderLayer& layer) {
        const int64_t tokens = step.num_tokens;
        const LayerInput input = layer_input(*layer.gate_up, tokens, rows_);
        norm(team, step, layer.post_attention_norm, input.rows, input.num_rows);
        multiply(team, *layer.gate_up, input, tokens, gate_up_, 2 * spec_.intermediate_size, false);

        const LayerInput down_input = layer_input(*layer.down, tokens, rows_);
        const SiluCall silu{gate_up_, spec_.intermediate_size, down_input.rows, down_input.num_rows};
        for_rows(team, tokens, [&](int64_t row) { kernels().silu_row(silu, row); });
        multiply(team, *layer.down, down_input, tokens, step.residual, spec_.hidden_size, spec_.rank == 0);
    }

    void mix_experts(Team& team, const DecoderStep& step, const DecoderLayer& layer, ExpertWork& mixture) {
        const int64_t tokens = step.num_tokens, hidden = spec_.hidden_size, experts = layer.experts->num_experts;
        const LayerInput input = layer_input(*layer.router, tokens, rows_);
        Rows targets[4] = {{ROW_FLOAT32, 0, hidden, hidden, normalized_, nullptr, nullptr, nullptr}};
        std::copy(input.rows, input.rows + input.num_rows, targets + 1);
        norm(team, step, layer.post_attention_norm, targets, 1 + input.num_rows);
        multiply(team, *layer.router, input, tokens, logits_, experts, false);
        mixture.run(team, normalized_, logits_, step.residual, spec_.rank == 0);
    }

    void multiply(Team& team, const LinearLayer& layer, const LayerInput& input, int64_t tokens, float* output, int64_t stride,
                  bool accumulate) {
        const LayerProduct product = layer_product(kernels(), layer, input, tokens, output, stride, accumulate);
        team.for_tiles(product.tiles, [&](int64_t tile) { run_layer_tile(kernels(), product, tile); });
    }

    const DecoderSpec spec_;
    const float scale_ = 1.0f / std::sqrt(static_cast<float>(spec_.head_dim));
    Workspace workspace_;
    float *qkv_ = nullptr, *attended_ = nullptr, *gate_up_ = nullptr, *partials_ = nullptr, *normalized_ = nullptr, *logits_ = nullptr;
    std::vector<ExpertWork> mixtures_;  // of the layers that have one, in their order
    char* rows_ = nullptr;
    bool failed_ = false;  // written before a barrier, read after it
};

}  // namespace
}  // namespace penstock

// A decoder over `spec`, which is copied; what it points to stays the caller's.
PENSTOCK_EXPORT void* penstock_decoder_create(const penstock::DecoderSpec* spec) {
    return new (std::nothrow) penstock::Decoder(*spec);
}

PENSTOCK_EXPORT void penstock_decoder_destroy(void* decoder) { delete static_cast<penstock::Decoder*>(decoder); }

// 0: done. 1: out of memory; nothing has been computed. 2: the sum over ranks has failed.
PENSTOCK_EXPORT int32_t penstock_decoder_forward(void* decoder, const penstock::DecoderStep* step) {
    try {
        return static_cast<penstock::Decoder*>(decoder)->forward(*step) ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
