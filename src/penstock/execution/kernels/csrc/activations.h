// Rows of activations in the form that a weight wants; see Rows in kernels.h.

// One group of an int8 row. scale = largest magnitude / 127; codes = x * (127 / largest), rounded to nearest, ties to even. The largest
// magnitude is compared as an integer, so that a NaN wins: then the scale is NaN, and every product with this group.
inline void emit_int8_group(const float* input, int64_t features, int8_t* data, float* scale, int32_t* sum) {
    const int64_t whole = features / 16 * 16;
    float tail[16] = {};
    for (int64_t k = whole; k < features; ++k) tail[k - whole] = input[k];
    i32x16 largest = i32x16::zero();
    for (int64_t k = 0; k < whole; k += 16) largest = max(largest, as_int(abs(f32x16::load(input + k))));
    if (whole < features) largest = max(largest, as_int(abs(f32x16::load(tail))));
    const int32_t bits = reduce_max(largest);
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    // Below 2^-100 the reciprocal might overflow: such a group is zero.
    const f32x16 factor = f32x16::set(magnitude >= 7.8886090522101181e-31f ? 127.0f / magnitude : 0.0f);
    i32x16 total = i32x16::zero();
    for (int64_t k = 0; k < whole; k += 16) {
        const i32x16 codes = to_int(f32x16::load(input + k) * factor);
        total = total + codes;
        store_i8(codes, data + k);
    }
    if (whole < features) {
        const i32x16 codes = to_int(f32x16::load(tail) * factor);
        total = total + codes;
        int8_t bytes[16];
        store_i8(codes, bytes);
        std::memcpy(data + whole, bytes, static_cast<size_t>(features - whole));
    }
    *scale = magnitude / 127.0f;
    *sum = reduce_add(total);
}

inline void emit_bfloat16(const float* input, int64_t features, uint16_t* data) {
    const int64_t whole = features / 16 * 16;
    for (int64_t k = 0; k < whole; k += 16) store_bf16(f32x16::load(input + k), data + k);
    if (whole == features) return;
    float tail[16] = {};
    std::memcpy(tail, input + whole, static_cast<size_t>(features - whole) * sizeof(float));
    uint16_t words[16];
    store_bf16(f32x16::load(tail), words);
    std::memcpy(data + whole, words, static_cast<size_t>(features - whole) * sizeof(uint16_t));
}

// Row `row` of `target` from `features` floats. Uses scratch slot 0 when the target reorders features.
inline void emit_row(const float* input, const Rows& target, int64_t row) {
    const int64_t features = target.features, padding = target.stride - features;
    if (target.order != nullptr) {
        float* ordered = static_cast<float*>(scratch(0, features * static_cast<int64_t>(sizeof(float))));
        for (int64_t k = 0; k < features; ++k) ordered[k] = input[target.order[k]];
        input = ordered;
    }
    if (target.kind == ROW_FLOAT32) {
        float* data = static_cast<float*>(target.data) + row * target.stride;
        if (data != input) std::memcpy(data, input, static_cast<size_t>(features) * sizeof(float));
        std::memset(data + features, 0, static_cast<size_t>(padding) * sizeof(float));
    } else if (target.kind == ROW_BFLOAT16) {
        uint16_t* data = static_cast<uint16_t*>(target.data) + row * target.stride;
        emit_bfloat16(input, features, data);
        std::memset(data + features, 0, static_cast<size_t>(padding) * sizeof(uint16_t));
    } else {
        int8_t* data = static_cast<int8_t*>(target.data) + row * target.stride;
        const int64_t group = target.group, groups = features / group;
        for (int64_t g = 0; g < groups; ++g)
            emit_int8_group(input + g * group, group, data + g * group, target.scales + row * groups + g, target.sums + row * groups + g);
        std::memset(data + features, 0, static_cast<size_t>(padding));
    }
}
