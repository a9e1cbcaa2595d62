// The table of kernels that each instruction set provides, and what they are called with.
//
// Every kernel is a number of independent tiles (see team.h): `*_tiles` says how many, `*_tile` does one. A row's result is bitwise the
// same whatever the number of rows and threads.
#pragma once

#include <cstdint>

#include "abi.h"
#include "sampling_call.h"

namespace penstock {

// Where a row of activations goes, in the form that a weight wants: float32, bfloat16, or int8 with one scale per `group` input features.
//
// int8: x[k] ~ scales[row * groups + g] * data[row * stride + k], symmetric, |data| <= 127; sums: the sum of data over each group (int32),
// which is what the unsigned codes of a weight need to get their zero right. Rows are padded with zeros to `stride` elements.
enum RowKind : int32_t { ROW_FLOAT32 = 0, ROW_BFLOAT16 = 1, ROW_INT8 = 2 };
struct Rows {
    int32_t kind;
    int32_t group;
    int64_t features;
    int64_t stride;
    void* data;
    float* scales;
    int32_t* sums;
    const int32_t* order;  // the weight's input_order
};

// output[m, n] (+)= rows[m] . weight[n] + bias[n], for M rows; the output's rows are `output_stride` floats apart.
struct LinearCall {
    const PackedWeight* weight;
    const Rows* rows;
    int64_t count;
    float* output;
    int64_t output_stride;
    bool accumulate;
};

// normalised = x / sqrt(mean(x^2) + eps) * weight for rows of `features` floats, given to every target.
struct NormCall {
    const float* input;
    int64_t input_stride;
    int64_t features;
    const float* weight;
    float eps;
    const Rows* targets;
    int32_t num_targets;
};

// gate_up [M, 2 * features], the gate first: silu(gate) * up, given to every target.
struct SiluCall {
    const float* gate_up;
    int64_t features;
    const Rows* targets;
    int32_t num_targets;
};

// output (+)= the sum over i of weights[i] * row places[i] of input, in the order of i; rows of `features` floats. A place of -1 is left out.
struct MixCall {
    const float* input;
    int64_t features;
    const int32_t* places;
    const float* weights;
    int32_t count;
    float* output;
    bool accumulate;
};

// Rotate queries and keys of qkv [T, (H + 2 KVH) * D] in place by cos_sin [positions][D]: D/2 cosines, then D/2 sines; halves form pairs as in
// layers/rotary.py. With q_norm and k_norm [D], heads are normalised first. Then write keys and values into the cache at slot_mapping.
struct RotaryCall {
    float* qkv;
    int64_t qkv_stride;
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    const int64_t* positions;
    const float* cos_sin;
    const float* q_norm;
    const float* k_norm;
    float norm_eps;
    const int64_t* slot_mapping;
    int32_t kv_kind;
    KVCacheLayer cache;
};

// Causal attention of the queries in qkv over the paged context; see attention/context.py for the metadata. output [T, H * D].
// sliding_window: tokens that a token sees, itself included; 0: all.
// partials: memory of attention_partial_floats() for results of context pieces, which attention_merge_tile puts together.
struct AttentionCall {
    const float* query;
    int64_t query_stride;
    float* output;
    int64_t output_stride;
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    int32_t num_requests, kv_kind;
    int64_t num_tokens;
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* block_tables;
    int64_t block_table_stride;
    float scale;
    int32_t sliding_window;
    KVCacheLayer cache;
    float* partials;
};

struct KernelTable {
    const char* name;
    // Rows of activations, copied from floats into one target. (activations.h)
    void (*emit_row)(const float* input, const Rows& target, int64_t row);
    // Matrix products. (linear.h)
    int64_t (*linear_tiles)(const LinearCall& call);
    void (*linear_tile)(const LinearCall& call, int64_t tile);
    void (*dequantize_row)(const PackedWeight& weight, int64_t row, float* output);
    // Row by row. (rows.h)
    void (*norm_row)(const NormCall& call, int64_t row);
    void (*silu_row)(const SiluCall& call, int64_t row);
    void (*mix_row)(const MixCall& call);
    void (*rotary_row)(const RotaryCall& call, int64_t row);
    // Attention. (attention.h) tiles → tile … → merge_tiles → merge_tile …
    int64_t (*attention_partial_floats)(const AttentionCall& call);
    int64_t (*attention_tiles)(const AttentionCall& call);
    void (*attention_tile)(const AttentionCall& call, int64_t tile);
    int64_t (*attention_merge_tiles)(const AttentionCall& call);
    void (*attention_merge_tile)(const AttentionCall& call, int64_t tile);
    // Tokens from logits, row by row. (sampling.h)
    void (*sample_row)(const SampleCall& call, int64_t row);
    void (*logprob_row)(const LogprobCall& call, int64_t row);
};

// The best table for this processor, or the one that PENSTOCK_CPU_ISA names.
const KernelTable& kernels();

}  // namespace penstock
