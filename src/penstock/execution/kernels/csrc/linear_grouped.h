// Products of int8 rows with int8 and int4 weights whose scales belong to groups of input features; rows have scales for the same groups.
//
// Within a group sums are int32 and exact. Across groups they are float32, in the order of K:
//
//     sum = fma(sum of (code - zero) * x, row's scale * weight's scale, sum)                symmetric
//     sum = fma(sum of x * row's scale, -offset, fma(sum of code * x, scales, sum))         with offsets

template <class Codes> struct GroupedKernel {
#if defined(__AVX512F__)
    static constexpr int rows = 6, panels = 2;
#elif defined(__AVXVNNI__)
    static constexpr int rows = 4, panels = 1;
#elif defined(__AVX2__)
    static constexpr int rows = 2, panels = 1;
#else
    static constexpr int rows = 2, panels = 1;
#endif
    static constexpr int64_t step = 8, step_bytes = Codes::bytes, input_size = 1;
    static constexpr int amx_panels = 0;

    // Whole groups, about 512 input features.
    static int64_t piece_steps(const PackedWeight& weight) {
        const int64_t groups = weight.group >= 512 ? 1 : 512 / weight.group;
        return groups * weight.group / step;
    }
    static int64_t group_of(const PackedWeight& weight, int64_t first_step) { return first_step * step / weight.group; }
    static double nanoseconds(const LinearCall& call, int64_t count) { return ChannelKernel<Codes>::nanoseconds(call, count); }

    template <int R, int P> static void multiply(const Piece& piece) {
        f32x16 sums[R][P];
        begin_sums<f32x16, float, R, P>(piece, sums);
        const bool with_offsets = piece.call->weight->offsets != nullptr;
        if (piece.streaming && with_offsets) add_groups<R, P, true, true>(piece, sums);
        else if (piece.streaming) add_groups<R, P, false, true>(piece, sums);
        else if (with_offsets) add_groups<R, P, true, false>(piece, sums);
        else add_groups<R, P, false, false>(piece, sums);
        end_float_sums<R, P>(piece, sums);
    }

    template <int R, int P, bool with_offsets, bool streaming> static void add_groups(const Piece& piece, f32x16 (&sums)[R][P]) {
        const PackedWeight& weight = *piece.call->weight;
        const Rows& rows = *piece.call->rows;
        const int64_t groups = weight.in_features / weight.group, steps = weight.group / step;
        const int64_t last = piece.group + piece.steps / steps;
        const float* row_scales = rows.scales + piece.row * groups;
        const int32_t* row_sums = rows.sums + piece.row * groups;
        // float16 [panels][groups][16]
        const uint16_t* scales = static_cast<const uint16_t*>(weight.scales) + 16 * groups * piece.panel;
        const uint16_t* offsets = static_cast<const uint16_t*>(weight.offsets) + 16 * groups * piece.panel;
        const char* codes = piece.weight;
        const char* input = piece.input;
        int64_t done = 0;
        for (int64_t group = piece.group; group < last; ++group) {
            i32x16 whole[R][P];
PENSTOCK_UNROLL
            for (int r = 0; r < R; ++r) {
                const i32x16 start = with_offsets ? i32x16::zero() : i32x16::set(-Codes::zero * row_sums[r * groups + group]);
PENSTOCK_UNROLL
                for (int p = 0; p < P; ++p) whole[r][p] = start;
            }
            if constexpr (streaming) {
                const int64_t ahead = done < piece.near_steps ? piece.near_ahead : piece.far_ahead;
                multiply_codes<Codes, R, P>(whole, codes, piece.panel_bytes, input, piece.input_bytes, steps, FetchAhead{ahead});
            } else {
                multiply_codes<Codes, R, P>(whole, codes, piece.panel_bytes, input, piece.input_bytes, steps,
                                            FetchPiece{piece.fetch + done * step_bytes, piece.fetch_second});
            }
PENSTOCK_UNROLL
            for (int p = 0; p < P; ++p) {
                const f32x16 scale = load_f16(scales + 16 * (groups * p + group));
                f32x16 offset = f32x16::zero();
                if constexpr (with_offsets) offset = f32x16::zero() - load_f16(offsets + 16 * (groups * p + group));
PENSTOCK_UNROLL
                for (int r = 0; r < R; ++r) {
                    const float row_scale = row_scales[r * groups + group];
                    sums[r][p] = fma(to_float(whole[r][p]), f32x16::set(row_scale) * scale, sums[r][p]);
                    if constexpr (with_offsets) {
                        const float row_sum = row_scale * static_cast<float>(row_sums[r * groups + group]);
                        sums[r][p] = fma(f32x16::set(row_sum), offset, sums[r][p]);
                    }
                }
            }
            codes += steps * step_bytes;
            input += weight.group;
            done += steps;
        }
    }
};
