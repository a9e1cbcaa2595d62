// Elements of the paged KV cache; the layout is in abi.h. `place` counts (block, KV head) pairs: block * KVH + head.

inline f32x16 load_cached(const float* p) { return f32x16::load(p); }
inline f32x16 load_cached(const uint16_t* p) { return load_bf16(p); }
inline f32x16 load_cached(const int8_t* p) { return load_i8(p); }

// First element of the tile of 16 tokens that holds token `offset` of a block, keys or values.
inline int64_t tile_start(int64_t place, int64_t offset, int32_t block_size, int32_t head_dim) {
    return (place * block_size + offset / 16 * 16) * head_dim;
}

template <class T> inline void scatter_key(const T* key, int32_t head_dim, T* column) {
    for (int32_t d = 0; d < head_dim; ++d) column[16 * d] = key[d];
}

// One token's key and value of one head. Uses scratch slot 6.
inline void write_key_value(const KVCacheLayer& cache, int32_t kind, int64_t place, int64_t offset, int32_t block_size, int32_t head_dim,
                            const float* key, const float* value) {
    const int64_t tile = tile_start(place, offset, block_size, head_dim), token = offset % 16;
    if (kind == KV_FLOAT32) {
        scatter_key(key, head_dim, static_cast<float*>(cache.key) + tile + token);
        std::memcpy(static_cast<float*>(cache.value) + tile + token * head_dim, value, static_cast<size_t>(head_dim) * sizeof(float));
    } else if (kind == KV_BFLOAT16) {
        uint16_t* rounded = static_cast<uint16_t*>(scratch(6, head_dim * static_cast<int64_t>(sizeof(uint16_t))));
        emit_bfloat16(key, head_dim, rounded);
        scatter_key(rounded, head_dim, static_cast<uint16_t*>(cache.key) + tile + token);
        emit_bfloat16(value, head_dim, static_cast<uint16_t*>(cache.value) + tile + token * head_dim);
    } else {
        const int64_t slot = place * block_size + offset;
        int32_t sum;
        int8_t* codes = static_cast<int8_t*>(scratch(6, head_dim));
        emit_int8_group(key, head_dim, codes, cache.key_scales + slot, &sum);
        scatter_key(codes, head_dim, static_cast<int8_t*>(cache.key) + tile + token);
        emit_int8_group(value, head_dim, static_cast<int8_t*>(cache.value) + tile + token * head_dim, cache.value_scales + slot, &sum);
    }
}
