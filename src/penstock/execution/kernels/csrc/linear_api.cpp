// Linear layers for Python, and the plumbing of their inputs.
#include "layer.h"
#include "team.h"

namespace penstock {
namespace {

// What a weight wants its input rows to be; data pointers are left empty.
Rows wanted_rows(const LinearLayer& layer, const PackedWeight& weight) {
    Rows rows{};
    rows.features = weight.in_features;
    rows.group = static_cast<int32_t>(weight.in_features);
    rows.order = weight.input_order;
    int64_t line = 16;  // elements in 64 bytes
    if (weight.kind == WEIGHT_INT8 || weight.kind == WEIGHT_INT4) {
        rows.kind = ROW_INT8;
        rows.group = weight.group;
        line = 64;
    } else if (weight.kind == WEIGHT_BFLOAT16 && layer.bf16_arithmetic) {
        rows.kind = ROW_BFLOAT16;
        line = 32;
    } else {
        rows.kind = ROW_FLOAT32;
    }
    // An odd number of cache lines: rows at distances of powers of two would share few sets of the cache.
    const int64_t lines = (weight.in_features + line - 1) / line;
    rows.stride = (lines | 1) * line;
    return rows;
}

bool same_form(const Rows& a, const Rows& b) { return a.kind == b.kind && a.group == b.group && a.order == b.order; }

int64_t element_bytes(const Rows& rows) { return rows.kind == ROW_INT8 ? 1 : rows.kind == ROW_BFLOAT16 ? 2 : 4; }

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t data_bytes(const Rows& rows, int64_t count) { return whole_lines(count * rows.stride * element_bytes(rows)); }

// Of the scales; the sums take as much again.
int64_t scale_bytes(const Rows& rows, int64_t count) {
    return rows.kind == ROW_INT8 ? whole_lines(count * (rows.features / rows.group) * 4) : 0;
}

LayerInput input_forms(const LinearLayer& layer) {
    LayerInput input{};
    for (int32_t s = 0; s < layer.segments; ++s) {
        const Rows rows = wanted_rows(layer, layer.segment[s]);
        int32_t form = 0;
        while (form < input.num_rows && !same_form(input.rows[form], rows)) ++form;
        if (form == input.num_rows) input.rows[input.num_rows++] = rows;
        input.of_segment[s] = form;
    }
    return input;
}

}  // namespace

int64_t layer_input_bytes(const LinearLayer& layer, int64_t count) {
    const LayerInput input = input_forms(layer);
    int64_t bytes = 0;
    for (int32_t form = 0; form < input.num_rows; ++form)
        bytes += data_bytes(input.rows[form], count) + 2 * scale_bytes(input.rows[form], count);
    return bytes;
}

LayerInput layer_input(const LinearLayer& layer, int64_t count, void* memory) {
    LayerInput input = input_forms(layer);
    char* place = static_cast<char*>(memory);
    for (int32_t form = 0; form < input.num_rows; ++form) {
        Rows& rows = input.rows[form];
        rows.data = place;
        place += data_bytes(rows, count);
        if (rows.kind != ROW_INT8) continue;
        rows.scales = reinterpret_cast<float*>(place);
        place += scale_bytes(rows, count);
        rows.sums = reinterpret_cast<int32_t*>(place);
        place += scale_bytes(rows, count);
    }
    return input;
}

LayerProduct layer_product(const KernelTable& table, const LinearLayer& layer, const LayerInput& input, int64_t count, float* output,
                           int64_t output_stride, bool accumulate) {
    LayerProduct product{};
    product.segments = layer.segments;
    for (int32_t s = 0; s < layer.segments; ++s) {
        product.calls[s] = {&layer.segment[s], &input.rows[input.of_segment[s]], count, output, output_stride, accumulate};
        output += layer.segment[s].out_features;
        product.first_tile[s + 1] = product.first_tile[s] + table.linear_tiles(product.calls[s]);
    }
    product.tiles = product.first_tile[layer.segments];
    return product;
}

}  // namespace penstock

// output [count, sum of N] (+)= x [count, K] times the layer's weights; x_stride and output_stride in floats.
PENSTOCK_EXPORT void penstock_linear(const LinearLayer* layer, const float* x, int64_t count, int64_t x_stride, float* output,
                                     int64_t output_stride, int32_t accumulate) {
    using namespace penstock;
    if (count == 0) return;
    const KernelTable& table = kernels();
    // Slot 3 of the calling thread: the kernels use the others.
    LayerInput input = layer_input(*layer, count, scratch(3, layer_input_bytes(*layer, count)));
    bool direct[3] = {};
    for (int32_t form = 0; form < input.num_rows; ++form) {
        Rows& rows = input.rows[form];
        direct[form] = rows.kind == ROW_FLOAT32 && rows.order == nullptr && rows.features % 8 == 0;
        if (!direct[form]) continue;
        rows.data = const_cast<float*>(x);
        rows.stride = x_stride;
    }
    const LayerProduct product = layer_product(table, *layer, input, count, output, output_stride, accumulate != 0);
    run_team([&](Team& team) {
        for (int32_t form = 0; form < input.num_rows; ++form) {
            if (direct[form]) continue;
            team.for_tiles(count, [&](int64_t row) { table.emit_row(x + row * x_stride, input.rows[form], row); });
        }
        team.for_tiles(product.tiles, [&](int64_t tile) { run_layer_tile(table, product, tile); });
    });
}

// output [count, K]: rows `ids` of the layer's weights, one segment after the other, as float32. Ids must be within range.
PENSTOCK_EXPORT void penstock_dequantize_rows(const LinearLayer* layer, const int64_t* ids, int64_t count, float* output) {
    using namespace penstock;
    const KernelTable& table = kernels();
    const int64_t features = layer->segment[0].in_features;
    run_team([&](Team& team) {
        team.for_tiles(count, [&](int64_t row) {
            int64_t id = ids[row];
            int32_t segment = 0;
            while (id >= layer->segment[segment].out_features) id -= layer->segment[segment++].out_features;
            table.dequantize_row(layer->segment[segment], id, output + row * features);
        });
    });
}
