// Products of float32 and bfloat16 rows with float32, bfloat16 and float16 weights: float32 sums, one fused multiplication after the other
// in the order of K.

// Steps of two input features: the weights of the first and of the second.
struct Float32Weights {
    static constexpr int64_t bytes = 128;
    static f32x16 load(const char* step, int half) { return f32x16::load(reinterpret_cast<const float*>(step) + 16 * half); }
};
struct Bfloat16Weights {
    static constexpr int64_t bytes = 64;
    static f32x16 load(const char* step, int half) {
        const u8x64 pairs = u8x64::load(step);
        return half == 0 ? bf16_first(pairs) : bf16_second(pairs);
    }
};
struct Float16Weights {
    static constexpr int64_t bytes = 64;
    static f32x16 load(const char* step, int half) { return load_f16(step + 32 * half); }
};

struct Float32Inputs {
    static constexpr int64_t size = 4;
    static float load(const char* step, int half) {
        float x;
        std::memcpy(&x, step + 4 * half, 4);
        return x;
    }
};
struct Bfloat16Inputs {
    static constexpr int64_t size = 2;
    static float load(const char* step, int half) {
        uint16_t word;
        std::memcpy(&word, step + 2 * half, 2);
        const uint32_t bits = static_cast<uint32_t>(word) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

inline double float_nanoseconds(const LinearCall& call, int64_t count, int64_t step_bytes) {
    const double features = static_cast<double>(call.weight->in_features);
    const double reading = features * static_cast<double>(step_bytes) / 32.0;
    const double multiplying = features * static_cast<double>(count) * 16.0 / 100.0;
    return reading > multiplying ? reading : multiplying;
}

template <class Weights, class Inputs> struct FloatKernel {
#if defined(__AVX512F__)
    static constexpr int rows = 6, panels = 4;
#elif defined(__AVX2__)
    static constexpr int rows = 6, panels = 1;
#else
    static constexpr int rows = 2, panels = 1;
#endif
    static constexpr int64_t step = 2, step_bytes = Weights::bytes, input_size = Inputs::size;
    static constexpr int amx_panels = 0;

    static int64_t piece_steps(const PackedWeight&) { return 64; }
    static int64_t group_of(const PackedWeight&, int64_t) { return 0; }
    static double nanoseconds(const LinearCall& call, int64_t count) { return float_nanoseconds(call, count, Weights::bytes); }
    template <int R, int P> static void multiply(const Piece& piece) {
        f32x16 sums[R][P];
        begin_sums<f32x16, float, R, P>(piece, sums);
        if (piece.streaming) {
            add_steps<R, P>(sums, piece, 0, piece.near_steps, FetchAhead{piece.near_ahead});
            add_steps<R, P>(sums, piece, piece.near_steps, piece.steps, FetchAhead{piece.far_ahead});
        } else {
            add_steps<R, P>(sums, piece, 0, piece.steps, FetchPiece{piece.fetch, piece.fetch_second});
        }
        end_float_sums<R, P>(piece, sums);
    }

    template <int R, int P, class Fetch>
    static inline void add_steps(f32x16 (&sums)[R][P], const Piece& piece, int64_t begin, int64_t end, Fetch fetch) {
        const char* weight = piece.weight + begin * Weights::bytes;
        const char* input = piece.input + begin * step * Inputs::size;
        for (int64_t s = begin; s < end; ++s) {
PENSTOCK_UNROLL
            for (int half = 0; half < 2; ++half) {
                f32x16 values[P];
PENSTOCK_UNROLL
                for (int p = 0; p < P; ++p) values[p] = Weights::load(weight + p * piece.panel_bytes, half);
                if (Weights::bytes == 128 || half == 0) fetch.template line<P>(weight + 64 * half, piece.panel_bytes, 64 * half);
PENSTOCK_UNROLL
                for (int r = 0; r < R; ++r) {
                    const f32x16 x = f32x16::set(Inputs::load(input + r * piece.input_bytes, half));
PENSTOCK_UNROLL
                    for (int p = 0; p < P; ++p) sums[r][p] = fma(x, values[p], sums[r][p]);
                }
            }
            weight += Weights::bytes;
            input += step * Inputs::size;
            fetch.advance(Weights::bytes);
        }
    }
};

#if defined(__AVX512BF16__)
// bfloat16 rows and weights in the processor's bf16 units: pairs of products, float32 sums, as _mm512_dpbf16_ps adds them.
struct PairKernel {
    static constexpr int rows = 6, panels = 4;
    static constexpr int64_t step = 2, step_bytes = 64, input_size = 2;
    static constexpr int amx_panels = 0;

    static int64_t piece_steps(const PackedWeight&) { return 128; }
    static int64_t group_of(const PackedWeight&, int64_t) { return 0; }
    static double nanoseconds(const LinearCall& call, int64_t count) { return float_nanoseconds(call, (count + 1) / 2, 64); }
    template <int R, int P> static void multiply(const Piece& piece) {
        f32x16 sums[R][P];
        begin_sums<f32x16, float, R, P>(piece, sums);
        if (piece.streaming) {
            add_steps<R, P>(sums, piece, 0, piece.near_steps, FetchAhead{piece.near_ahead});
            add_steps<R, P>(sums, piece, piece.near_steps, piece.steps, FetchAhead{piece.far_ahead});
        } else {
            add_steps<R, P>(sums, piece, 0, piece.steps, FetchPiece{piece.fetch, piece.fetch_second});
        }
        end_float_sums<R, P>(piece, sums);
    }

    template <int R, int P, class Fetch>
    static inline void add_steps(f32x16 (&sums)[R][P], const Piece& piece, int64_t begin, int64_t end, Fetch fetch) {
        const char* weight = piece.weight + begin * step_bytes;
        const char* input = piece.input + begin * step * input_size;
        for (int64_t s = begin; s < end; ++s) {
            __m512bh pairs[P];
PENSTOCK_UNROLL
            for (int p = 0; p < P; ++p) pairs[p] = reinterpret_cast<__m512bh>(u8x64::load(weight + p * piece.panel_bytes).v);
            fetch.template line<P>(weight, piece.panel_bytes, 0);
PENSTOCK_UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t x;
                std::memcpy(&x, input + r * piece.input_bytes, 4);
                const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(x));
PENSTOCK_UNROLL
                for (int p = 0; p < P; ++p) sums[r][p].v = _mm512_dpbf16_ps(sums[r][p].v, pairs[p], both);
            }
            weight += step_bytes;
            input += step * input_size;
            fetch.advance(step_bytes);
        }
    }
};
#endif
