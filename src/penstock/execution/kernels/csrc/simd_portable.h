// The sixteen lanes of simd.h as arrays, for processors without a version of their own; compilers turn most of it into vector instructions
// (NEON on ARM, where the products of bytes use the dot product instruction if the compiler was allowed to).

struct f32x16 {
    float v[16];
    static f32x16 zero() { return set(0.0f); }
    static f32x16 set(float x) {
        f32x16 a;
        for (float& lane : a.v) lane = x;
        return a;
    }
    static f32x16 load(const float* p) {
        f32x16 a;
        std::memcpy(a.v, p, sizeof a.v);
        return a;
    }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
};
struct i32x16 {
    int32_t v[16];
    static i32x16 zero() { return set(0); }
    static i32x16 set(int32_t x) {
        i32x16 a;
        for (int32_t& lane : a.v) lane = x;
        return a;
    }
    static i32x16 load(const int32_t* p) {
        i32x16 a;
        std::memcpy(a.v, p, sizeof a.v);
        return a;
    }
    void store(int32_t* p) const { std::memcpy(p, v, sizeof v); }
};
struct u8x64 {
    uint8_t v[64];
    static u8x64 load(const void* p) {
        u8x64 a;
        std::memcpy(a.v, p, sizeof a.v);
        return a;
    }
    u8x64 low_nibbles() const {
        u8x64 a;
        for (int i = 0; i < 64; ++i) a.v[i] = v[i] & 15;
        return a;
    }
    u8x64 high_nibbles() const {
        u8x64 a;
        for (int i = 0; i < 64; ++i) a.v[i] = v[i] >> 4;
        return a;
    }
};
#define PENSTOCK_LANES(type, expression) \
    type result;                         \
    for (int i = 0; i < 16; ++i) result.v[i] = expression; \
    return result
inline float float_from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline f32x16 operator+(f32x16 a, f32x16 b) { PENSTOCK_LANES(f32x16, a.v[i] + b.v[i]); }
inline f32x16 operator-(f32x16 a, f32x16 b) { PENSTOCK_LANES(f32x16, a.v[i] - b.v[i]); }
inline f32x16 operator*(f32x16 a, f32x16 b) { PENSTOCK_LANES(f32x16, a.v[i] * b.v[i]); }
inline f32x16 operator/(f32x16 a, f32x16 b) { PENSTOCK_LANES(f32x16, a.v[i] / b.v[i]); }
#if defined(__FP_FAST_FMAF)
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { PENSTOCK_LANES(f32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else
// A library call for every fused product would be far too slow: two roundings on processors without the instruction.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { PENSTOCK_LANES(f32x16, a.v[i] * b.v[i] + c.v[i]); }
#endif
inline f32x16 max(f32x16 a, f32x16 b) { PENSTOCK_LANES(f32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline f32x16 min(f32x16 a, f32x16 b) { PENSTOCK_LANES(f32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline f32x16 abs(f32x16 a) { PENSTOCK_LANES(f32x16, __builtin_fabsf(a.v[i])); }
inline f32x16 round(f32x16 a) { PENSTOCK_LANES(f32x16, __builtin_nearbyintf(a.v[i])); }
inline i32x16 to_int(f32x16 a) { PENSTOCK_LANES(i32x16, static_cast<int32_t>(__builtin_nearbyintf(a.v[i]))); }
inline f32x16 to_float(i32x16 a) { PENSTOCK_LANES(f32x16, static_cast<float>(a.v[i])); }
inline i32x16 operator+(i32x16 a, i32x16 b) { PENSTOCK_LANES(i32x16, a.v[i] + b.v[i]); }
inline i32x16 operator*(i32x16 a, i32x16 b) { PENSTOCK_LANES(i32x16, a.v[i] * b.v[i]); }
template <int N> inline i32x16 shift_left(i32x16 a) { PENSTOCK_LANES(i32x16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N)); }
inline f32x16 as_float(i32x16 a) { PENSTOCK_LANES(f32x16, float_from_bits(static_cast<uint32_t>(a.v[i]))); }
inline i32x16 as_int(f32x16 a) { PENSTOCK_LANES(i32x16, static_cast<int32_t>(bits_from_float(a.v[i]))); }
inline float float_from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -small : small;
}
inline f32x16 load_f16(const void* p) {
    uint16_t halves[16];
    std::memcpy(halves, p, sizeof halves);
    PENSTOCK_LANES(f32x16, float_from_half(halves[i]));
}
inline f32x16 load_bf16(const void* p) {
    uint16_t words[16];
    std::memcpy(words, p, sizeof words);
    PENSTOCK_LANES(f32x16, float_from_bits(static_cast<uint32_t>(words[i]) << 16));
}
inline f32x16 load_i8(const int8_t* p) { PENSTOCK_LANES(f32x16, static_cast<float>(p[i])); }
inline void store_i8(i32x16 a, int8_t* p) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline void store_u16(i32x16 a, uint16_t* p) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(a.v[i]);
}
inline f32x16 bf16_first(u8x64 a) {
    uint32_t words[16];
    std::memcpy(words, a.v, sizeof words);
    PENSTOCK_LANES(f32x16, float_from_bits(words[i] << 16));
}
inline f32x16 bf16_second(u8x64 a) {
    uint32_t words[16];
    std::memcpy(words, a.v, sizeof words);
    PENSTOCK_LANES(f32x16, float_from_bits(words[i] & 0xffff0000u));
}
inline uint32_t greater(f32x16 a, f32x16 b) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
    return bits;
}
inline uint32_t at_least(f32x16 a, f32x16 b) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return bits;
}
inline uint32_t is_nan(f32x16 a) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] != a.v[i]) << i;
    return bits;
}
inline f32x16 where_greater(f32x16 b, f32x16 bound, f32x16 a) { PENSTOCK_LANES(f32x16, b.v[i] > bound.v[i] ? a.v[i] : 0.0f); }
inline f32x16 where_at_least(f32x16 b, f32x16 bound, f32x16 a) { PENSTOCK_LANES(f32x16, b.v[i] >= bound.v[i] ? a.v[i] : 0.0f); }
inline int store_selected(f32x16 a, uint32_t lanes, float* p) {
    int count = 0;
    for (; lanes; lanes &= lanes - 1) p[count++] = a.v[__builtin_ctz(lanes)];
    return count;
}
#undef PENSTOCK_LANES
inline float reduce_add(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
    return a.v[0];
}
inline float reduce_max(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    return a.v[0];
}
inline int32_t reduce_add(i32x16 a) {
    int32_t sum = 0;
    for (int32_t lane : a.v) sum += lane;
    return sum;
}
#if defined(__ARM_FEATURE_DOTPROD)
inline i32x16 dot4(i32x16 acc, u8x64 weight, int32_t x) {
    // The instruction multiplies signed bytes: weight - 128, and 128 times the sum of x added back.
    const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(x));
    const int32x4_t correction = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), b), 7);
    for (int i = 0; i < 4; ++i) {
        const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weight.v + 16 * i), vdupq_n_u8(128)));
        vst1q_s32(acc.v + 4 * i, vdotq_s32(vaddq_s32(vld1q_s32(acc.v + 4 * i), correction), w, b));
    }
    return acc;
}
#else
inline i32x16 dot4(i32x16 acc, u8x64 weight, int32_t x) {
    int8_t b[4];
    std::memcpy(b, &x, 4);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int32_t>(weight.v[4 * i + j]) * b[j];
    return acc;
}
#endif
inline i32x16 dot4_nibbles(i32x16 acc, u8x64 weight, int32_t x) { return dot4(acc, weight, x); }
inline i32x16 max(i32x16 a, i32x16 b) {
    for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline int32_t reduce_max(i32x16 a) {
    int32_t largest = a.v[0];
    for (int32_t lane : a.v) largest = lane > largest ? lane : largest;
    return largest;
}
inline void store(u8x64 a, void* p) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_bf16(f32x16 a, void* p) {
    uint16_t words[16];
    for (int i = 0; i < 16; ++i) {
        const uint32_t bits = bits_from_float(a.v[i]);
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        words[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    std::memcpy(p, words, sizeof words);
}
inline f32x16 first_lanes(int count, f32x16 a, f32x16 b) {
    for (int i = count; i < 16; ++i) a.v[i] = b.v[i];
    return a;
}
