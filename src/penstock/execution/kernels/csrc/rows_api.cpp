// C functions for work on rows: normalisation, activation, rotation and the writing of keys and values. Mirrored in kernels/rows.py.
#include <cstring>

#include "kernels.h"
#include "team.h"

namespace {

// Rows per tile: enough work to be worth claiming.
constexpr int64_t ROWS_PER_TILE = 8;

template <class F> void for_rows(int64_t rows, F&& body) {
    if (rows <= ROWS_PER_TILE) {
        for (int64_t row = 0; row < rows; ++row) body(row);
        return;
    }
    penstock::run_team([&](penstock::Team& team) {
        team.for_tiles((rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE, [&](int64_t tile) {
            const int64_t end = (tile + 1) * ROWS_PER_TILE < rows ? (tile + 1) * ROWS_PER_TILE : rows;
            for (int64_t row = tile * ROWS_PER_TILE; row < end; ++row) body(row);
        });
    });
}

penstock::Rows float_rows(float* data, int64_t features) {
    return {penstock::ROW_FLOAT32, static_cast<int32_t>(features), features, features, data, nullptr, nullptr, nullptr};
}

}  // namespace

// output [rows, features] = input / sqrt(mean(input^2) + eps) * weight.
PENSTOCK_EXPORT void penstock_rms_norm(const float* input, int64_t input_stride, const float* weight, float eps, float* output, int64_t rows,
                                       int64_t features) {
    const penstock::Rows target = float_rows(output, features);
    const penstock::NormCall call{input, input_stride, features, weight, eps, &target, 1};
    for_rows(rows, [&](int64_t row) { penstock::kernels().norm_row(call, row); });
}

// output [rows, features] = silu(gate) * up of gate_up [rows, 2 * features].
PENSTOCK_EXPORT void penstock_silu_and_mul(const float* gate_up, float* output, int64_t rows, int64_t features) {
    const penstock::Rows target = float_rows(output, features);
    const penstock::SiluCall call{gate_up, features, &target, 1};
    for_rows(rows, [&](int64_t row) { penstock::kernels().silu_row(call, row); });
}

// See RotaryCall.
PENSTOCK_EXPORT void penstock_rotary_and_write(const penstock::RotaryCall* call, int64_t rows) {
    for_rows(rows, [&](int64_t row) { penstock::kernels().rotary_row(*call, row); });
}

// Write key and value, rows of KVH * D floats that are key_stride and value_stride apart, at call->slot_mapping. Of the call only sizes, slots
// and the cache are read.
PENSTOCK_EXPORT void penstock_kv_write(const penstock::RotaryCall* call, const float* key, int64_t key_stride, const float* value,
                                       int64_t value_stride, int64_t rows) {
    const int64_t width = static_cast<int64_t>(call->num_kv_heads) * call->head_dim;
    for_rows(rows, [&](int64_t row) {
        float* both = static_cast<float*>(penstock::scratch(5, 2 * width * static_cast<int64_t>(sizeof(float))));
        std::memcpy(both, key + row * key_stride, static_cast<size_t>(width) * sizeof(float));
        std::memcpy(both + width, value + row * value_stride, static_cast<size_t>(width) * sizeof(float));
        penstock::RotaryCall one = *call;
        one.qkv = both, one.qkv_stride = 0, one.num_heads = 0, one.cos_sin = nullptr;
        penstock::kernels().rotary_row(one, row);
    });
}
