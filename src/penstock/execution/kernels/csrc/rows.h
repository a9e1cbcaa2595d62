// Work on single rows of activations: RMSNorm, SiLU of the gate times up, weighted sums, rotation of queries and keys. Uses scratch slots 4 to 6.
#include "kv_cache.h"

// Sum of squares in one fixed order: four accumulators of 16 lanes, then what is left, feature by feature.
inline float sum_of_squares(const float* x, int64_t features) {
    f32x16 sums[4] = {f32x16::zero(), f32x16::zero(), f32x16::zero(), f32x16::zero()};
    int64_t k = 0;
    for (; k + 64 <= features; k += 64)
        for (int i = 0; i < 4; ++i) {
            const f32x16 part = f32x16::load(x + k + 16 * i);
            sums[i] = fma(part, part, sums[i]);
        }
    for (; k + 16 <= features; k += 16) {
        const f32x16 part = f32x16::load(x + k);
        sums[0] = fma(part, part, sums[0]);
    }
    float total = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < features; ++k) total += x[k] * x[k];
    return total;
}

// output = x / sqrt(mean(x^2) + eps) * weight; output may be x.
inline void normalize(const float* x, int64_t features, const float* weight, float eps, float* output) {
    const float mean = sum_of_squares(x, features) / static_cast<float>(features);
    const float factor = 1.0f / std::sqrt(mean + eps);
    const f32x16 factors = f32x16::set(factor);
    int64_t k = 0;
    for (; k + 16 <= features; k += 16) (f32x16::load(x + k) * factors * f32x16::load(weight + k)).store(output + k);
    for (; k < features; ++k) output[k] = x[k] * factor * weight[k];
}

// Where a row is computed: in the first target that takes floats as they are, otherwise in scratch memory.
inline float* row_memory(const Rows* targets, int32_t num_targets, int64_t row, int64_t features) {
    for (int32_t i = 0; i < num_targets; ++i)
        if (targets[i].kind == ROW_FLOAT32 && targets[i].order == nullptr)
            return static_cast<float*>(targets[i].data) + row * targets[i].stride;
    return static_cast<float*>(scratch(4, features * static_cast<int64_t>(sizeof(float))));
}

inline void norm_row(const NormCall& call, int64_t row) {
    float* output = row_memory(call.targets, call.num_targets, row, call.features);
    normalize(call.input + row * call.input_stride, call.features, call.weight, call.eps, output);
    for (int32_t i = 0; i < call.num_targets; ++i) emit_row(output, call.targets[i], row);
}

inline f32x16 silu(f32x16 x) { return x / (f32x16::set(1.0f) + exp(f32x16::zero() - x)); }

inline void silu_row(const SiluCall& call, int64_t row) {
    const int64_t features = call.features;
    const float* gate = call.gate_up + row * 2 * features;
    const float* up = gate + features;
    float* output = row_memory(call.targets, call.num_targets, row, features);
    int64_t k = 0;
    for (; k + 16 <= features; k += 16) (silu(f32x16::load(gate + k)) * f32x16::load(up + k)).store(output + k);
    if (k < features) {
        float tail[16] = {};
        std::memcpy(tail, gate + k, static_cast<size_t>(features - k) * sizeof(float));
        silu(f32x16::load(tail)).store(tail);
        for (int64_t i = k; i < features; ++i) output[i] = tail[i - k] * up[i];
    }
    for (int32_t i = 0; i < call.num_targets; ++i) emit_row(output, call.targets[i], row);
}

// One output row; four lanes of 16 features at a time, so that rows are read in runs of four cache lines.
inline void mix_row(const MixCall& call) {
    const int64_t features = call.features;
    int64_t k = 0;
    for (; k + 64 <= features; k += 64) {
        f32x16 sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = call.accumulate ? f32x16::load(call.output + k + 16 * i) : f32x16::zero();
        for (int32_t n = 0; n < call.count; ++n) {
            if (call.places[n] < 0) continue;
            const f32x16 weight = f32x16::set(call.weights[n]);
            const float* input = call.input + call.places[n] * features + k;
            for (int i = 0; i < 4; ++i) sums[i] = sums[i] + weight * f32x16::load(input + 16 * i);
        }
        for (int i = 0; i < 4; ++i) sums[i].store(call.output + k + 16 * i);
    }
    for (; k < features; ++k) {
        float sum = call.accumulate ? call.output[k] : 0.0f;
        for (int32_t n = 0; n < call.count; ++n)
            if (call.places[n] >= 0) sum = sum + call.weights[n] * call.input[call.places[n] * features + k];
        call.output[k] = sum;
    }
}

// Pairs (first[i], second[i]) turned by the angles whose cosines and sines are given.
inline void rotate(float* __restrict first, float* __restrict second, const float* __restrict cosine, const float* __restrict sine, int32_t half) {
    for (int32_t i = 0; i < half; ++i) {
        const float a = first[i], b = second[i];
        first[i] = a * cosine[i] - b * sine[i];
        second[i] = b * cosine[i] + a * sine[i];
    }
}

// Without cos_sin nothing is rotated or normalised: the keys and values are only written.
inline void rotary_row(const RotaryCall& call, int64_t row) {
    const int32_t dim = call.head_dim, half = dim / 2;
    float* query = call.qkv + row * call.qkv_stride;
    float* key = query + static_cast<int64_t>(call.num_heads) * dim;
    const float* value = key + static_cast<int64_t>(call.num_kv_heads) * dim;
    if (call.cos_sin != nullptr) {
        const float* cosine = call.cos_sin + call.positions[row] * dim;
        for (int32_t head = 0; head < call.num_heads + call.num_kv_heads; ++head) {
            float* x = query + static_cast<int64_t>(head) * dim;
            const float* weight = head < call.num_heads ? call.q_norm : call.k_norm;
            if (weight != nullptr) normalize(x, dim, weight, call.norm_eps, x);
            rotate(x, x + half, cosine, cosine + half, half);
        }
    }
    const int64_t block = call.slot_mapping[row] / call.block_size, offset = call.slot_mapping[row] % call.block_size;
    for (int32_t head = 0; head < call.num_kv_heads; ++head) {
        const int64_t place = block * call.num_kv_heads + head;
        write_key_value(call.cache, call.kv_kind, place, offset, call.block_size, dim, key + static_cast<int64_t>(head) * dim,
                        value + static_cast<int64_t>(head) * dim);
    }
}
