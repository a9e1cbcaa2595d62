// What this machine can do at most: bytes read from memory, and products of numbers that are already in registers.
//
// Every figure of a kernel is compared with these, so they belong to the processor and not to the instruction set that PENSTOCK_CPU_ISA
// chooses: each loop is compiled for what it needs and runs where cpuid says that it can.
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "team.h"

#if defined(__x86_64__)
#include <cpuid.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define PENSTOCK_TARGET(flags) __attribute__((target(flags)))
#endif

namespace penstock {
namespace {

enum Arithmetic : int32_t { FLOAT32 = 0, INT8 = 1, BFLOAT16 = 2 };

// Twelve independent sums hide the latency of two multiply-add units and leave registers for the operands.
constexpr int SUMS = 12;
// Operations of one call of a loop are counted as multiplications plus additions.
struct Loop {
    const char* name;
    int64_t operations;  // in one iteration
    void (*run)(int64_t iterations);
};

constexpr int64_t READ_TILE = 1 << 22;

#if defined(__x86_64__)

// A loop over twelve named sums: the compiler keeps an array of them in memory. STEP is an expression of `sum`, `a` and `b`; the empty
// assembly makes every one of them happen, in registers.
#define PENSTOCK_STEP(constraint, sum, STEP) \
    sum = STEP(sum);                         \
    asm volatile("" : "+" constraint(sum));
#define PENSTOCK_LOOP(name, flags, Vector, constraint, zero, first, second, STEP)                                  \
    PENSTOCK_TARGET(flags) void name(int64_t iterations) {                                                         \
        Vector s0 = zero, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0; \
        Vector s11 = s0;                                                                                           \
        auto a = first;                                                                                            \
        auto b = second;                                                                                           \
        asm volatile("" : "+" constraint(a), "+" constraint(b));                                                   \
        for (int64_t n = 0; n < iterations; ++n) {                                                                 \
            PENSTOCK_STEP(constraint, s0, STEP) PENSTOCK_STEP(constraint, s1, STEP) PENSTOCK_STEP(constraint, s2, STEP)  \
            PENSTOCK_STEP(constraint, s3, STEP) PENSTOCK_STEP(constraint, s4, STEP) PENSTOCK_STEP(constraint, s5, STEP)  \
            PENSTOCK_STEP(constraint, s6, STEP) PENSTOCK_STEP(constraint, s7, STEP) PENSTOCK_STEP(constraint, s8, STEP)  \
            PENSTOCK_STEP(constraint, s9, STEP) PENSTOCK_STEP(constraint, s10, STEP) PENSTOCK_STEP(constraint, s11, STEP) \
        }                                                                                                          \
    }

#define PENSTOCK_FMA512(sum) _mm512_fmadd_ps(sum, a, b)
PENSTOCK_LOOP(float32_avx512, "avx512f", __m512, "v", _mm512_setzero_ps(), _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f),
              PENSTOCK_FMA512)

#define PENSTOCK_FMA256(sum) _mm256_fmadd_ps(sum, a, b)
PENSTOCK_LOOP(float32_avx2, "avx2,fma", __m256, "x", _mm256_setzero_ps(), _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f),
              PENSTOCK_FMA256)

#define PENSTOCK_DPBUSD(sum) _mm512_dpbusd_epi32(sum, a, b)
PENSTOCK_LOOP(int8_vnni, "avx512f,avx512vnni", __m512i, "v", _mm512_setzero_si512(), _mm512_set1_epi8(3), _mm512_set1_epi8(-5),
              PENSTOCK_DPBUSD)

// Without VNNI four products take three instructions: pairs of bytes, pairs of words, the sum. The products pass through a register of
// their own each time, so that they are not computed once for all.
PENSTOCK_TARGET("avx2") inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
    asm volatile("" : "+x"(a));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#define PENSTOCK_MADDUBS(sum) add_products(sum, a, b)
PENSTOCK_LOOP(int8_avx2, "avx2", __m256i, "x", _mm256_setzero_si256(), _mm256_set1_epi8(3), _mm256_set1_epi8(-5),
              PENSTOCK_MADDUBS)

// 0x3e80: 0.25 in bfloat16.
#define PENSTOCK_DPBF16(sum) _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b)
PENSTOCK_LOOP(bfloat16_avx512, "avx512f,avx512bf16", __m512, "v", _mm512_setzero_ps(), _mm512_set1_epi32(0x3e803e80),
              _mm512_set1_epi32(0x3e803e80), PENSTOCK_DPBF16)

// Four 16 x 16 sums from two tiles of each operand, the shape of AMX's fastest loop.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
};

PENSTOCK_TARGET("amx-tile") void amx_begin() {
    TileConfig config;
    std::memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
    // GCC's intrinsic says that it reads eight bytes of the 64, so that stores to the others look dead.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

PENSTOCK_TARGET("amx-tile,amx-int8") void int8_amx(int64_t iterations) {
    amx_begin();
    for (int64_t n = 0; n < iterations; ++n) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
}

PENSTOCK_TARGET("amx-tile,amx-bf16") void bfloat16_amx(int64_t iterations) {
    amx_begin();
    for (int64_t n = 0; n < iterations; ++n) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
}

PENSTOCK_TARGET("avx512f") void read_avx512(const char* data, int64_t bytes) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        a = _mm512_add_epi64(a, _mm512_loadu_si512(data + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(data + i + 64));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(data + i + 128));
        d = _mm512_add_epi64(d, _mm512_loadu_si512(data + i + 192));
    }
    asm volatile("" : : "v"(a), "v"(b), "v"(c), "v"(d));
}

PENSTOCK_TARGET("avx2") void read_avx2(const char* data, int64_t bytes) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 128 <= bytes; i += 128) {
        const __m256i* words = reinterpret_cast<const __m256i*>(data + i);
        a = _mm256_add_epi64(a, _mm256_loadu_si256(words));
        b = _mm256_add_epi64(b, _mm256_loadu_si256(words + 1));
        c = _mm256_add_epi64(c, _mm256_loadu_si256(words + 2));
        d = _mm256_add_epi64(d, _mm256_loadu_si256(words + 3));
    }
    asm volatile("" : : "x"(a), "x"(b), "x"(c), "x"(d));
}

struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
    explicit Leaf(unsigned sub) { __get_cpuid_count(7, sub, &a, &b, &c, &d); }
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bfloat16() { return has_avx512() && (Leaf(1).a >> 5 & 1); }
bool has_amx(unsigned bit) {
#if defined(__linux__)
    // Bit 24: tiles. The operating system hands their registers out on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
    return (Leaf(0).d >> 24 & 1) && (Leaf(0).d >> bit & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

Loop fastest(int32_t arithmetic) {
    constexpr int64_t per_iteration = 2 * SUMS;
    switch (arithmetic) {
        case FLOAT32:
            if (has_avx512()) return {"avx512", per_iteration * 16, float32_avx512};
            if (has_avx2()) return {"avx2", per_iteration * 8, float32_avx2};
            break;
        case INT8:
            if (has_amx(25)) return {"amx", 2 * 4 * 16 * 16 * 64, int8_amx};
            if (has_vnni()) return {"avx512_vnni", per_iteration * 64, int8_vnni};
            if (has_avx2()) return {"avx2", per_iteration * 32, int8_avx2};
            break;
        case BFLOAT16:
            if (has_amx(22)) return {"amx", 2 * 4 * 16 * 16 * 32, bfloat16_amx};
            if (has_bfloat16()) return {"avx512_bf16", per_iteration * 32, bfloat16_avx512};
            break;
    }
    return {"", 0, nullptr};
}

void read_tile(const char* data, int64_t bytes) {
    static const auto run = has_avx512() ? read_avx512 : has_avx2() ? read_avx2 : nullptr;
    if (run != nullptr) {
        run(data, bytes);
        return;
    }
    int64_t sum = 0;
    for (int64_t i = 0; i + 8 <= bytes; i += 8) {
        int64_t word;
        std::memcpy(&word, data + i, 8);
        sum += word;
    }
    asm volatile("" : : "r"(sum));
}

#else

// Four lanes of the compiler's own vectors: NEON on ARM.
typedef float Lanes __attribute__((vector_size(16)));

void float32_lanes(int64_t iterations) {
    Lanes sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = Lanes{} + float(i);
    const Lanes a = Lanes{} + 0.5f, b = Lanes{} + 0.25f;
    for (int64_t n = 0; n < iterations; ++n) {
        for (int i = 0; i < SUMS; ++i) {
            for (int j = 0; j < 4; ++j) sums[i][j] = __builtin_fmaf(sums[i][j], a[j], b[j]);
        }
    }
    for (int i = 0; i < SUMS; ++i) asm volatile("" : : "w"(sums[i]));
}

Loop fastest(int32_t arithmetic) {
    if (arithmetic == FLOAT32) return {"neon", 2 * SUMS * 4, float32_lanes};
    return {"", 0, nullptr};
}

void read_tile(const char* data, int64_t bytes) {
    typedef int64_t Words __attribute__((vector_size(16)));
    Words a{}, b{};
    for (int64_t i = 0; i + 32 <= bytes; i += 32) {
        Words x, y;
        std::memcpy(&x, data + i, 16);
        std::memcpy(&y, data + i + 16, 16);
        a += x, b += y;
    }
    asm volatile("" : : "w"(a), "w"(b));
}

#endif

}  // namespace
}  // namespace penstock

// The instructions that penstock_ceiling_multiply uses for 0 float32, 1 int8 (u8 * s8), 2 bfloat16; "" when the processor has none.
PENSTOCK_EXPORT const char* penstock_ceiling_name(int32_t arithmetic) { return penstock::fastest(arithmetic).name; }

// Multiply and add in registers on all threads, `tiles` times `iterations`. Returns the operations done, 0 without such instructions.
PENSTOCK_EXPORT int64_t penstock_ceiling_multiply(int32_t arithmetic, int64_t tiles, int64_t iterations) {
    const penstock::Loop loop = penstock::fastest(arithmetic);
    if (loop.run == nullptr) return 0;
    penstock::run_team([&](penstock::Team& team) { team.for_tiles(tiles, [&](int64_t) { loop.run(iterations); }); });
    return loop.operations * tiles * iterations;
}

// Read `bytes` once, on all threads.
PENSTOCK_EXPORT void penstock_ceiling_read(const void* data, int64_t bytes) {
    const char* first = static_cast<const char*>(data);
    const int64_t tile_bytes = penstock::READ_TILE, tiles = (bytes + tile_bytes - 1) / tile_bytes;
    penstock::run_team([&](penstock::Team& team) {
        team.for_tiles(tiles, [&](int64_t tile) {
            const int64_t left = bytes - tile * tile_bytes;
            penstock::read_tile(first + tile * tile_bytes, left < tile_bytes ? left : tile_bytes);
        });
    });
}
