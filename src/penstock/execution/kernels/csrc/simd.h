// Sixteen lanes of arithmetic, whatever the instruction set: one AVX-512 register, two AVX2 registers, four NEON registers, or an array.
//
// Included once per instruction set (isa_*.cpp), inside its namespace; kernels are written once on top of it. Sixteen is the number of
// output features in a weight's panel and of tokens in a tile of the KV cache. Nothing here depends on how many rows are computed, so
// a result never does. Compiled with -ffp-contract=off: a multiplication and an addition are fused only where fma() says so.

#if !defined(PENSTOCK_ISA)
#error "define PENSTOCK_ISA and include isa_kernels.h"
#endif

struct i32x16;

#if defined(__AVX512F__)

struct f32x16 {
    __m512 v;
    static f32x16 zero() { return {_mm512_setzero_ps()}; }
    static f32x16 set(float x) { return {_mm512_set1_ps(x)}; }
    static f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
};
struct i32x16 {
    __m512i v;
    static i32x16 zero() { return {_mm512_setzero_si512()}; }
    static i32x16 set(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static i32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
// 64 bytes: four input values of 16 output features.
struct u8x64 {
    __m512i v;
    static u8x64 load(const void* p) { return {_mm512_loadu_si512(p)}; }
    u8x64 low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
    u8x64 high_nibbles() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
};
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c, rounded once.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
// Rounded to the nearest integer, ties to even; as float and as integer.
inline f32x16 round(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline i32x16 to_int(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline i32x16 operator*(i32x16 a, i32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
template <int N> inline i32x16 shift_left(i32x16 a) { return {_mm512_slli_epi32(a.v, N)}; }
inline f32x16 as_float(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline i32x16 as_int(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline f32x16 load_f16(const void* p) { return {_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
inline f32x16 load_bf16(const void* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16))};
}
inline f32x16 load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Sixteen integers within [-128, 127] as bytes.
inline void store_i8(i32x16 a, int8_t* p) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v)); }
// Sixteen integers within [0, 65535] as 16-bit words.
inline void store_u16(i32x16 a, uint16_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v)); }
// Pairs of bfloat16 in 64 bytes [16][2]: the first and the second of each pair.
inline f32x16 bf16_first(u8x64 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline f32x16 bf16_second(u8x64 a) { return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(int(0xffff0000))))}; }
inline float reduce_add(f32x16 a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(f32x16 a) { return _mm512_reduce_max_ps(a.v); }
inline int32_t reduce_add(i32x16 a) { return _mm512_reduce_add_epi32(a.v); }

// acc[n] += sum over j of weight[n][j] * x[j] for four unsigned weights and four signed bytes x of each of 16 features; |x| <= 127.
inline i32x16 dot4(i32x16 acc, u8x64 weight, int32_t x) {
    const __m512i b = _mm512_set1_epi32(x);
#if defined(__AVX512VNNI__)
    // Not _mm512_dpbusd_epi32: gcc copies the accumulators of that one around and runs out of registers.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(weight.v), "v"(b));
    return acc;
#else
    // Without VNNI: products of even and odd bytes as 16-bit words, so that nothing saturates.
    const __m512i low = _mm512_set1_epi16(255);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(weight.v, low), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(weight.v, 8), _mm512_srai_epi16(b, 8));
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
#endif
}
// The same for weights of at most 15 (products of pairs fit into 16 bits).
inline i32x16 dot4_nibbles(i32x16 acc, u8x64 weight, int32_t x) {
#if defined(__AVX512VNNI__)
    return dot4(acc, weight, x);
#else
    const __m512i pairs = _mm512_maddubs_epi16(weight.v, _mm512_set1_epi32(x));
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
// The larger integer.
inline i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t reduce_max(i32x16 a) { return _mm512_reduce_max_epi32(a.v); }
inline void store(u8x64 a, void* p) { _mm512_storeu_si512(p, a.v); }
// Sixteen bfloat16, rounded to nearest even; NaN stays NaN.
inline void store_bf16(f32x16 a, void* p) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// Comparisons, as one bit per lane (not a number compares false), and lanes of `a` where b compares true, else 0.
inline uint32_t greater(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline uint32_t at_least(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline uint32_t is_nan(f32x16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline f32x16 where_greater(f32x16 b, f32x16 bound, f32x16 a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b.v, bound.v, _CMP_GT_OQ), a.v)};
}
inline f32x16 where_at_least(f32x16 b, f32x16 bound, f32x16 a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b.v, bound.v, _CMP_GE_OQ), a.v)};
}
// The lanes whose bits are set, one after the other at p, which has room for sixteen; how many they are.
inline int store_selected(f32x16 a, uint32_t lanes, float* p) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), a.v));
    return __builtin_popcount(lanes);
}
// Lanes below `count` of a, the others of b; 0 <= count <= 16.
inline f32x16 first_lanes(int count, f32x16 a, f32x16 b) {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1u), b.v, a.v)};
}

#elif defined(__AVX2__)

struct f32x16 {
    __m256 v[2];
    static f32x16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static f32x16 set(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
    static f32x16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
    void store(float* p) const { _mm256_storeu_ps(p, v[0]), _mm256_storeu_ps(p + 8, v[1]); }
};
struct i32x16 {
    __m256i v[2];
    static i32x16 zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    static i32x16 set(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
    static i32x16 load(const int32_t* p) {
        const __m256i* q = reinterpret_cast<const __m256i*>(p);
        return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
    }
    void store(int32_t* p) const {
        __m256i* q = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(q, v[0]), _mm256_storeu_si256(q + 1, v[1]);
    }
};
struct u8x64 {
    __m256i v[2];
    static u8x64 load(const void* p) {
        const __m256i* q = static_cast<const __m256i*>(p);
        return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
    }
    u8x64 low_nibbles() const {
        const __m256i mask = _mm256_set1_epi8(15);
        return {{_mm256_and_si256(v[0], mask), _mm256_and_si256(v[1], mask)}};
    }
    u8x64 high_nibbles() const {
        const __m256i mask = _mm256_set1_epi8(15);
        return {{_mm256_and_si256(_mm256_srli_epi16(v[0], 4), mask), _mm256_and_si256(_mm256_srli_epi16(v[1], 4), mask)}};
    }
};
#define PENSTOCK_BOTH(type, a, expression) \
    type result;                           \
    for (int i = 0; i < 2; ++i) result.v[i] = expression; \
    return result
inline f32x16 operator+(f32x16 a, f32x16 b) { PENSTOCK_BOTH(f32x16, a, _mm256_add_ps(a.v[i], b.v[i])); }
inline f32x16 operator-(f32x16 a, f32x16 b) { PENSTOCK_BOTH(f32x16, a, _mm256_sub_ps(a.v[i], b.v[i])); }
inline f32x16 operator*(f32x16 a, f32x16 b) { PENSTOCK_BOTH(f32x16, a, _mm256_mul_ps(a.v[i], b.v[i])); }
inline f32x16 operator/(f32x16 a, f32x16 b) { PENSTOCK_BOTH(f32x16, a, _mm256_div_ps(a.v[i], b.v[i])); }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { PENSTOCK_BOTH(f32x16, a, _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i])); }
inline f32x16 max(f32x16 a, f32x16 b) { PENSTOCK_BOTH(f32x16, a, _mm256_max_ps(a.v[i], b.v[i])); }
inline f32x16 min(f32x16 a, f32x16 b) { PENSTOCK_BOTH(f32x16, a, _mm256_min_ps(a.v[i], b.v[i])); }
inline f32x16 abs(f32x16 a) { PENSTOCK_BOTH(f32x16, a, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v[i])); }
inline f32x16 round(f32x16 a) { PENSTOCK_BOTH(f32x16, a, _mm256_round_ps(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
inline i32x16 to_int(f32x16 a) { PENSTOCK_BOTH(i32x16, a, _mm256_cvtps_epi32(a.v[i])); }
inline f32x16 to_float(i32x16 a) { PENSTOCK_BOTH(f32x16, a, _mm256_cvtepi32_ps(a.v[i])); }
inline i32x16 operator+(i32x16 a, i32x16 b) { PENSTOCK_BOTH(i32x16, a, _mm256_add_epi32(a.v[i], b.v[i])); }
inline i32x16 operator*(i32x16 a, i32x16 b) { PENSTOCK_BOTH(i32x16, a, _mm256_mullo_epi32(a.v[i], b.v[i])); }
template <int N> inline i32x16 shift_left(i32x16 a) { PENSTOCK_BOTH(i32x16, a, _mm256_slli_epi32(a.v[i], N)); }
inline f32x16 as_float(i32x16 a) { PENSTOCK_BOTH(f32x16, a, _mm256_castsi256_ps(a.v[i])); }
inline i32x16 as_int(f32x16 a) { PENSTOCK_BOTH(i32x16, a, _mm256_castps_si256(a.v[i])); }
inline f32x16 load_f16(const void* p) {
    const __m128i* q = static_cast<const __m128i*>(p);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))}};
}
inline f32x16 load_bf16(const void* p) {
    const __m128i* q = static_cast<const __m128i*>(p);
    PENSTOCK_BOTH(f32x16, q, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + i)), 16)));
}
inline f32x16 load_i8(const int8_t* p) {
    PENSTOCK_BOTH(f32x16, p, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)))));
}
inline void store_u16(i32x16 a, uint16_t* p) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v[0], a.v[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
inline void store_i8(i32x16 a, int8_t* p) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.v[0], a.v[1]), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline f32x16 bf16_first(u8x64 a) { PENSTOCK_BOTH(f32x16, a, _mm256_castsi256_ps(_mm256_slli_epi32(a.v[i], 16))); }
inline f32x16 bf16_second(u8x64 a) {
    PENSTOCK_BOTH(f32x16, a, _mm256_castsi256_ps(_mm256_and_si256(a.v[i], _mm256_set1_epi32(int(0xffff0000)))));
}
inline float reduce_add(f32x16 a) {
    const __m256 s = _mm256_add_ps(a.v[0], a.v[1]);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float reduce_max(f32x16 a) {
    const __m256 s = _mm256_max_ps(a.v[0], a.v[1]);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline int32_t reduce_add(i32x16 a) {
    const __m256i s = _mm256_add_epi32(a.v[0], a.v[1]);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_unpackhi_epi64(t, t));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 1)));
}
#if defined(__AVXVNNI__)
inline i32x16 dot4(i32x16 acc, u8x64 weight, int32_t x) {
    const __m256i b = _mm256_set1_epi32(x);
    for (int i = 0; i < 2; ++i) acc.v[i] = _mm256_dpbusd_avx_epi32(acc.v[i], weight.v[i], b);
    return acc;
}
inline i32x16 dot4_nibbles(i32x16 acc, u8x64 weight, int32_t x) { return dot4(acc, weight, x); }
#else
inline i32x16 dot4(i32x16 acc, u8x64 weight, int32_t x) {
    const __m256i b = _mm256_set1_epi32(x);
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd_x = _mm256_srai_epi16(b, 8);
    for (int i = 0; i < 2; ++i) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weight.v[i], low), even_x);
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weight.v[i], 8), odd_x);
        acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_add_epi32(even, odd));
    }
    return acc;
}
inline i32x16 dot4_nibbles(i32x16 acc, u8x64 weight, int32_t x) {
    const __m256i b = _mm256_set1_epi32(x);
    for (int i = 0; i < 2; ++i) {
        const __m256i pairs = _mm256_maddubs_epi16(weight.v[i], b);
        acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return acc;
}
#endif
inline i32x16 max(i32x16 a, i32x16 b) { return {{_mm256_max_epi32(a.v[0], b.v[0]), _mm256_max_epi32(a.v[1], b.v[1])}}; }
inline int32_t reduce_max(i32x16 a) {
    const __m256i s = _mm256_max_epi32(a.v[0], a.v[1]);
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_max_epi32(t, _mm_unpackhi_epi64(t, t));
    return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 1)));
}
inline void store(u8x64 a, void* p) {
    __m256i* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, a.v[0]), _mm256_storeu_si256(q + 1, a.v[1]);
}
inline void store_bf16(f32x16 a, void* p) {
    i32x16 words;
    for (int i = 0; i < 2; ++i) {
        const __m256i bits = _mm256_castps_si256(a.v[i]);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v[i], a.v[i], _CMP_UNORD_Q));
        words.v[i] = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    }
    store_u16(words, static_cast<uint16_t*>(p));
}
inline uint32_t lane_bits(__m256 low, __m256 high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(low)) | static_cast<uint32_t>(_mm256_movemask_ps(high)) << 8;
}
inline uint32_t greater(f32x16 a, f32x16 b) {
    return lane_bits(_mm256_cmp_ps(a.v[0], b.v[0], _CMP_GT_OQ), _mm256_cmp_ps(a.v[1], b.v[1], _CMP_GT_OQ));
}
inline uint32_t at_least(f32x16 a, f32x16 b) {
    return lane_bits(_mm256_cmp_ps(a.v[0], b.v[0], _CMP_GE_OQ), _mm256_cmp_ps(a.v[1], b.v[1], _CMP_GE_OQ));
}
inline uint32_t is_nan(f32x16 a) {
    return lane_bits(_mm256_cmp_ps(a.v[0], a.v[0], _CMP_UNORD_Q), _mm256_cmp_ps(a.v[1], a.v[1], _CMP_UNORD_Q));
}
inline f32x16 where_greater(f32x16 b, f32x16 bound, f32x16 a) {
    PENSTOCK_BOTH(f32x16, a, _mm256_and_ps(_mm256_cmp_ps(b.v[i], bound.v[i], _CMP_GT_OQ), a.v[i]));
}
inline f32x16 where_at_least(f32x16 b, f32x16 bound, f32x16 a) {
    PENSTOCK_BOTH(f32x16, a, _mm256_and_ps(_mm256_cmp_ps(b.v[i], bound.v[i], _CMP_GE_OQ), a.v[i]));
}
inline int store_selected(f32x16 a, uint32_t lanes, float* p) {
    alignas(32) float all[16];
    a.store(all);
    int count = 0;
    for (; lanes; lanes &= lanes - 1) p[count++] = all[__builtin_ctz(lanes)];
    return count;
}
inline f32x16 first_lanes(int count, f32x16 a, f32x16 b) {
    const __m256i last = _mm256_set1_epi32(count), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(last, lanes);
    const __m256i high = _mm256_cmpgt_epi32(last, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)));
    return {{_mm256_blendv_ps(b.v[0], a.v[0], _mm256_castsi256_ps(low)), _mm256_blendv_ps(b.v[1], a.v[1], _mm256_castsi256_ps(high))}};
}
#undef PENSTOCK_BOTH

#else
#include "simd_portable.h"
#endif

// 2^x for |x| <= 126 in whole numbers given as floats.
inline f32x16 power_of_two(f32x16 whole) { return as_float(shift_left<23>(to_int(whole) + i32x16::set(127))); }

// e^x, relative error below 2e-7. Below -87 the result is 0 as near as makes no difference (1e-38); NaN stays NaN only by max/min order.
// Cody-Waite reduction and the polynomial of Cephes expf (Moshier, 1992).
inline f32x16 exp(f32x16 x) {
    x = min(max(x, f32x16::set(-87.0f)), f32x16::set(88.0f));
    const f32x16 whole = round(x * f32x16::set(1.44269504088896341f));
    f32x16 r = fma(whole, f32x16::set(-0.693359375f), x);
    r = fma(whole, f32x16::set(2.12194440e-4f), r);
    f32x16 p = f32x16::set(1.9875691500e-4f);
    p = fma(p, r, f32x16::set(1.3981999507e-3f));
    p = fma(p, r, f32x16::set(8.3334519073e-3f));
    p = fma(p, r, f32x16::set(4.1665795894e-2f));
    p = fma(p, r, f32x16::set(1.6666665459e-1f));
    p = fma(p, r, f32x16::set(5.0000001201e-1f));
    p = fma(p, r * r, r + f32x16::set(1.0f));
    return p * power_of_two(whole);
}
