// What Python and C++ share: plain structures and C functions, mirrored in kernels/native.py and its neighbours with ctypes.
//
// All pointers stay owned by the caller and live at least as long as the call (weights: as long as whatever was built from them).
// Sizes count elements unless a name says bytes. M rows, K input features, N output features.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define PENSTOCK_EXPORT extern "C" __declspec(dllexport)
#else
#define PENSTOCK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a structure or function below changes; Python refuses a library with another number.
constexpr int32_t PENSTOCK_ABI_VERSION = 2;

enum WeightKind : int32_t { WEIGHT_FLOAT32 = 0, WEIGHT_BFLOAT16 = 1, WEIGHT_FLOAT16 = 2, WEIGHT_INT8 = 3, WEIGHT_INT4 = 4 };

// One packed weight, [N, K]. Panels of 16 output features lie one after the other, and within a panel the memory is read in order:
//
//   float32           [N/16][K][16]                     float16           [N/16][K][16]
//   bfloat16          [N/16][K/2][16][2]                int8 (unsigned)   [N/16][K/4][16][4]
//   int4 (unsigned)   [N/16][K/8][16][4 bytes]          byte j of a column: low nibble k = 8 i + j, high nibble k = 8 i + 4 + j
//
// N is padded to a multiple of 16 and K to a multiple of 8; padding holds zeros (quantised: the zero code).
// weight[n, k] = scales[g][n] * code - offsets[g][n], scales and offsets as float16 [N/16][K/group][16] when grouped (group < K) and
// as float32 [N] when there is one scale per output feature (group == in_features; always symmetric).
// Without offsets the zero is the middle code, 128 or 8.
struct PackedWeight {
    int32_t kind;
    int32_t group;
    int64_t out_features;
    int64_t in_features;
    const void* data;
    const void* scales;
    const void* offsets;         // null: symmetric
    const float* bias;           // [N padded], or null
    const int32_t* input_order;  // [K]: column k of the weight belongs to input feature input_order[k]; null: k
};

// A linear layer: up to three weights with the same input, whose outputs lie side by side.
struct LinearLayer {
    int32_t segments;
    int32_t bf16_arithmetic;  // bfloat16 weights: round activations and use the processor's bf16 units where there are any
    PackedWeight segment[3];
};

enum KVKind : int32_t { KV_FLOAT32 = 0, KV_BFLOAT16 = 1, KV_INT8 = 2 };

// One layer's paged keys and values. Tiles of 16 tokens; block_size is a multiple of 16:
//
//   key     [num_blocks][KVH][block_size/16][D][16 tokens]
//   value   [num_blocks][KVH][block_size/16][16 tokens][D]
//   scales  float32, int8 only: [num_blocks][KVH][block_size], one for each token's key and one for its value
struct KVCacheLayer {
    void* key;
    void* value;
    float* key_scales;
    float* value_scales;
};
