// Products of int8 rows with int8 and int4 weights that have one scale per output feature.
//
//     output = (sum of code * x - zero * sum of x) * (row's scale * feature's scale) + bias
//
// All sums are int32 and exact, in whatever order (255 * 127 * K < 2^31 for K <= 66,000).

// Steps of eight input features: two vectors of codes, four features each.
struct Int8Codes {
    static constexpr int64_t bytes = 128;
    static constexpr int32_t zero = 128;
    static u8x64 load(const char* step, int half) { return u8x64::load(step + 64 * half); }
    static i32x16 dot(i32x16 sum, u8x64 codes, int32_t x) { return dot4(sum, codes, x); }
};
struct Int4Codes {
    static constexpr int64_t bytes = 64;
    static constexpr int32_t zero = 8;
    static u8x64 load(const char* step, int half) {
        const u8x64 both = u8x64::load(step);
        return half == 0 ? both.low_nibbles() : both.high_nibbles();
    }
    static i32x16 dot(i32x16 sum, u8x64 codes, int32_t x) { return dot4_nibbles(sum, codes, x); }
};

// sums[r][p] += codes of panel p times row r, for `steps` steps. Fetches memory as Fetch says, see linear_tile.h.
template <class Codes, int R, int P, class Fetch>
inline void multiply_codes(i32x16 (&sums)[R][P], const char* weight, int64_t panel_bytes, const char* input, int64_t input_bytes,
                           int64_t steps, Fetch fetch) {
    for (int64_t s = 0; s < steps; ++s) {
PENSTOCK_UNROLL
        for (int half = 0; half < 2; ++half) {
            u8x64 codes[P];
PENSTOCK_UNROLL
            for (int p = 0; p < P; ++p) codes[p] = Codes::load(weight + p * panel_bytes, half);
            if (Codes::bytes == 128 || half == 0) fetch.template line<P>(weight + 64 * half, panel_bytes, 64 * half);
PENSTOCK_UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t x;
                std::memcpy(&x, input + r * input_bytes + 4 * half, 4);
PENSTOCK_UNROLL
                for (int p = 0; p < P; ++p) sums[r][p] = Codes::dot(sums[r][p], codes[p], x);
            }
        }
        weight += Codes::bytes;
        input += 8;
        fetch.advance(Codes::bytes);
    }
}

inline double integer_nanoseconds(double bytes, double products) {
    const double reading = bytes / 16.0, multiplying = products / 400.0;
    return reading > multiplying ? reading : multiplying;
}

template <class Codes> struct ChannelKernel {
#if defined(__AVX512F__)
    static constexpr int rows = 6, panels = 4;
#elif defined(__AVXVNNI__)
    static constexpr int rows = 6, panels = 1;
#elif defined(__AVX2__)
    static constexpr int rows = 4, panels = 1;
#else
    static constexpr int rows = 2, panels = 1;
#endif
    static constexpr int64_t step = 8, step_bytes = Codes::bytes, input_size = 1;
#if defined(PENSTOCK_AMX)
    static constexpr int amx_panels = Codes::bytes == 128 ? 4 : 0;
#else
    static constexpr int amx_panels = 0;
#endif

    static int64_t piece_steps(const PackedWeight&) { return 64; }
    static int64_t group_of(const PackedWeight&, int64_t) { return 0; }
    static double nanoseconds(const LinearCall& call, int64_t count) {
        const double features = static_cast<double>(call.weight->in_features);
        return integer_nanoseconds(features * 2.0 * static_cast<double>(Codes::bytes) / 16.0, features * 16.0 * static_cast<double>(count));
    }

    template <int R, int P> static void multiply(const Piece& piece) {
        i32x16 sums[R][P];
        begin_sums<i32x16, int32_t, R, P>(piece, sums);
        const char* weight = piece.weight;
        const char* input = piece.input;
        if (piece.streaming) {
            const int64_t begin = piece.near_steps;
            multiply_codes<Codes, R, P>(sums, weight, piece.panel_bytes, input, piece.input_bytes, begin, FetchAhead{piece.near_ahead});
            multiply_codes<Codes, R, P>(sums, weight + begin * step_bytes, piece.panel_bytes, input + begin * step, piece.input_bytes,
                                        piece.steps - begin, FetchAhead{piece.far_ahead});
        } else {
            multiply_codes<Codes, R, P>(sums, weight, piece.panel_bytes, input, piece.input_bytes, piece.steps,
                                        FetchPiece{piece.fetch, piece.fetch_second});
        }
        if (piece.streaming || piece.last) finish<R, P>(piece, sums);
        else keep_sums<i32x16, int32_t, R, P>(piece, sums);
    }

    template <int R, int P> static void finish(const Piece& piece, i32x16 (&sums)[R][P]) {
        const Rows& rows = *piece.call->rows;
        const float* scales = static_cast<const float*>(piece.call->weight->scales) + 16 * piece.panel;
PENSTOCK_UNROLL
        for (int r = 0; r < R; ++r) {
            const i32x16 zero = i32x16::set(-Codes::zero * rows.sums[piece.row + r]);
            const f32x16 scale = f32x16::set(rows.scales[piece.row + r]);
PENSTOCK_UNROLL
            for (int p = 0; p < P; ++p) {
                const f32x16 value = to_float(sums[r][p] + zero) * (scale * f32x16::load(scales + 16 * p));
                write_output(*piece.call, piece.row + r, piece.panel + p, value);
            }
        }
    }
};
