// A linear layer's products from the kernels of one instruction set: what decoder.cpp and linear_api.cpp share.
//
//     LayerInput input = layer_input(layer, count, memory);           // memory: layer_input_bytes(layer, count)
//     … emit rows into input.rows[0 … num_rows) …
//     LayerProduct product = layer_product(kernels, layer, input, count, output, output_stride, accumulate);
//     … run_layer_tile(kernels, product, tile) for tile in 0 … product.tiles …
#pragma once

#include "kernels.h"

namespace penstock {

// The forms of a layer's input: those that its segments want, equal ones once. Segment s reads rows[of_segment[s]].
struct LayerInput {
    int32_t num_rows;
    int32_t of_segment[3];
    Rows rows[3];
};

// One layer's products, as tiles: those of segment s are [first_tile[s], first_tile[s + 1]).
struct LayerProduct {
    int32_t segments;
    LinearCall calls[3];
    int64_t first_tile[4];
    int64_t tiles;
};

// Bytes that layer_input() lays out for `count` rows, a multiple of 64.
int64_t layer_input_bytes(const LinearLayer& layer, int64_t count);

// The rows to be filled, in `memory` (aligned to 64 bytes). Calls of layer_product keep pointers into the result.
LayerInput layer_input(const LinearLayer& layer, int64_t count, void* memory);

// output [count, sum of N] (+)= input times the layer; `input` must outlive the product.
LayerProduct layer_product(const KernelTable& table, const LinearLayer& layer, const LayerInput& input, int64_t count, float* output,
                           int64_t output_stride, bool accumulate);

inline void run_layer_tile(const KernelTable& table, const LayerProduct& product, int64_t tile) {
    int32_t segment = 0;
    while (tile >= product.first_tile[segment + 1]) ++segment;
    table.linear_tile(product.calls[segment], tile - product.first_tile[segment]);
}

}  // namespace penstock
