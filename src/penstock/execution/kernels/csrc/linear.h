// Matrix products of every kind of weight: which kernel does it, and single rows of a weight as floats.
#include "linear_tile.h"
#include "linear_amx.h"
#include "linear_int8.h"
#include "linear_grouped.h"
#include "linear_float.h"

// Calls `visit` with the kernel for this call.
template <class Visitor> inline auto with_kernel(const LinearCall& call, Visitor&& visit) {
    const PackedWeight& weight = *call.weight;
    const bool grouped = weight.group < weight.in_features;
    const bool pairs = call.rows->kind == ROW_BFLOAT16;
    switch (weight.kind) {
        case WEIGHT_INT8: return grouped ? visit(GroupedKernel<Int8Codes>()) : visit(ChannelKernel<Int8Codes>());
        case WEIGHT_INT4: return grouped ? visit(GroupedKernel<Int4Codes>()) : visit(ChannelKernel<Int4Codes>());
        case WEIGHT_FLOAT16: return visit(FloatKernel<Float16Weights, Float32Inputs>());
        case WEIGHT_BFLOAT16:
            if (!pairs) return visit(FloatKernel<Bfloat16Weights, Float32Inputs>());
#if defined(__AVX512BF16__)
            return visit(PairKernel());
#else
            return visit(FloatKernel<Bfloat16Weights, Bfloat16Inputs>());
#endif
        default: return visit(FloatKernel<Float32Weights, Float32Inputs>());
    }
}

inline int64_t linear_tiles(const LinearCall& call) {
    return with_kernel(call, [&](auto kernel) { return kernel_tiles<decltype(kernel)>(call); });
}

inline void linear_tile(const LinearCall& call, int64_t tile) {
    with_kernel(call, [&](auto kernel) { kernel_tile<decltype(kernel)>(call, tile); });
}

inline float half_to_float(uint16_t half) {
    const uint16_t halves[16] = {half};
    float lanes[16];
    load_f16(halves).store(lanes);
    return lanes[0];
}

// Element [row, k] of a quantised weight's codes.
inline int32_t code_at(const PackedWeight& weight, int64_t row, int64_t k) {
    const int64_t features = padded_features(weight), panel = row / 16, lane = row % 16;
    const uint8_t* data = static_cast<const uint8_t*>(weight.data);
    if (weight.kind == WEIGHT_INT8) return data[16 * features * panel + k / 4 * 64 + 4 * lane + k % 4];
    const uint8_t both = data[8 * features * panel + k / 8 * 64 + 4 * lane + k % 4];
    return k % 8 < 4 ? both & 15 : both >> 4;
}

inline void dequantize_codes(const PackedWeight& weight, int64_t row, float* output) {
    const int64_t panel = row / 16, lane = row % 16, groups = weight.in_features / weight.group;
    const int32_t zero = weight.offsets != nullptr ? 0 : weight.kind == WEIGHT_INT8 ? 128 : 8;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t place = (panel * groups + g) * 16 + lane;
        const float scale = groups == 1 ? static_cast<const float*>(weight.scales)[row]
                                        : half_to_float(static_cast<const uint16_t*>(weight.scales)[place]);
        const float offset = weight.offsets == nullptr ? 0.0f : half_to_float(static_cast<const uint16_t*>(weight.offsets)[place]);
        for (int64_t k = g * weight.group; k < (g + 1) * weight.group; ++k) {
            const float value = static_cast<float>(code_at(weight, row, k) - zero) * scale - offset;
            output[weight.input_order != nullptr ? weight.input_order[k] : k] = value;
        }
    }
}

// Row `row` of a weight as float32 [K], input features in their own order.
inline void dequantize_row(const PackedWeight& weight, int64_t row, float* output) {
    const int64_t features = padded_features(weight), panel = row / 16, lane = row % 16;
    const uint16_t* words = static_cast<const uint16_t*>(weight.data) + 16 * features * panel;
    switch (weight.kind) {
        case WEIGHT_FLOAT32:
            for (int64_t k = 0; k < weight.in_features; ++k)
                output[k] = static_cast<const float*>(weight.data)[16 * features * panel + 16 * k + lane];
            return;
        case WEIGHT_BFLOAT16:
            for (int64_t k = 0; k < weight.in_features; ++k) {
                const uint32_t bits = static_cast<uint32_t>(words[32 * (k / 2) + 2 * lane + k % 2]) << 16;
                std::memcpy(output + k, &bits, 4);
            }
            return;
        case WEIGHT_FLOAT16:
            for (int64_t k = 0; k < weight.in_features; ++k) output[k] = half_to_float(words[16 * k + lane]);
            return;
        default: dequantize_codes(weight, row, output);
    }
}
