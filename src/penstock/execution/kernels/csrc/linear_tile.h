// What all matrix products share: how a product is cut into tiles, a tile into register tiles, and where results go.
//
// A tile is some panels of 16 output features times some rows. Inside it, `Kernel::panels` panels and up to `Kernel::rows` rows at a time
// are multiplied in registers. With more rows than that, K is cut into pieces that fit into the first cache beside the rows: every piece
// of the weight comes from memory once and meets all rows of the tile. Sums wait in memory in between; that changes no bit of them. Each
// row sees the same operations in the same order in all of these. Codes and 16-bit floats are unpacked in registers, again for every block
// of rows: unpacking them into memory once was measured to be slower for every number of rows.

// Loops over the rows and panels of a register tile: unrolled, so that its sums are registers.
#define PENSTOCK_UNROLL _Pragma("GCC unroll 8")

// Kernels whose blocks of 16 rows may be multiplied in AMX tiles say with how many panels (amx_panels, otherwise 0); see linear_amx.h.
template <class Blocks> void run_amx_blocks(Blocks& rows);

// What a register tile multiplies: rows and panels from the first input feature of a piece on.
struct Piece {
    const LinearCall* call;
    const char* weight;
    int64_t panel_bytes;  // from a panel to the next
    const char* input;
    int64_t input_bytes;  // from a row to the next
    int64_t steps;        // of Kernel::step input features
    bool streaming;       // all rows of the tile in one piece: FetchAhead, otherwise FetchPiece
    int64_t near_steps, near_ahead, far_ahead;
    const char* fetch;
    int64_t fetch_second;
    int64_t row, panel, group;  // the first ones
    bool first, last;           // of the pieces of K
    void* sums;                 // of the register tile between pieces: [rows][panels][16]
};

// What is fetched from memory while a line of each panel is multiplied. Streaming through a weight: the line `ahead` bytes further on in
// each panel; that is near_ahead during the first near_steps, and then far_ahead, which is in the panels that follow.
struct FetchAhead {
    int64_t ahead;
    template <int P> void line(const char* weight, int64_t panel_bytes, int64_t) const {
PENSTOCK_UNROLL
        for (int p = 0; p < P; ++p) __builtin_prefetch(weight + p * panel_bytes + ahead);
    }
    void advance(int64_t) {}
};
// With several blocks of rows: lines of a panel of the next piece of K, and of the one `second` bytes further on (0: no other one).
struct FetchPiece {
    const char* next;
    int64_t second;
    template <int P> void line(const char*, int64_t, int64_t offset) const {
        __builtin_prefetch(next + offset);
        if constexpr (P > 1) __builtin_prefetch(next + offset + second);
    }
    void advance(int64_t bytes) { next += bytes; }
};

// output (+)= value + bias for the 16 features of one panel, or those of them that exist.
inline void write_output(const LinearCall& call, int64_t row, int64_t panel, f32x16 value) {
    const int64_t feature = 16 * panel, left = call.weight->out_features - feature;
    float* output = call.output + row * call.output_stride + feature;
    if (call.weight->bias != nullptr) value = value + f32x16::load(call.weight->bias + feature);
    if (left >= 16) {
        if (call.accumulate) value = f32x16::load(output) + value;
        value.store(output);
        return;
    }
    float lanes[16];
    value.store(lanes);
    for (int64_t n = 0; n < left; ++n) output[n] = call.accumulate ? output[n] + lanes[n] : lanes[n];
}

// The sums with which a piece of K begins: zeros, or what waits in memory.
template <class Lanes, class Number, int R, int P> inline void begin_sums(const Piece& piece, Lanes (&sums)[R][P]) {
    const Number* waiting = static_cast<const Number*>(piece.sums);
PENSTOCK_UNROLL
    for (int r = 0; r < R; ++r)
PENSTOCK_UNROLL
        for (int p = 0; p < P; ++p) sums[r][p] = piece.first ? Lanes::zero() : Lanes::load(waiting + 16 * (P * r + p));
}

template <class Lanes, class Number, int R, int P> inline void keep_sums(const Piece& piece, const Lanes (&sums)[R][P]) {
    Number* waiting = static_cast<Number*>(piece.sums);
PENSTOCK_UNROLL
    for (int r = 0; r < R; ++r)
PENSTOCK_UNROLL
        for (int p = 0; p < P; ++p) sums[r][p].store(waiting + 16 * (P * r + p));
}

// Float sums at the end of a piece: the output after the last one, otherwise kept.
template <int R, int P> inline void end_float_sums(const Piece& piece, const f32x16 (&sums)[R][P]) {
    if (!piece.streaming && !piece.last) return keep_sums<f32x16, float, R, P>(piece, sums);
PENSTOCK_UNROLL
    for (int r = 0; r < R; ++r)
PENSTOCK_UNROLL
        for (int p = 0; p < P; ++p) write_output(*piece.call, piece.row + r, piece.panel + p, sums[r][p]);
}

inline int64_t padded_features(const PackedWeight& weight) { return (weight.in_features + 7) / 8 * 8; }

// How a call is cut into tiles: `panels` x `rows` each, those of one strip of panels after each other.
struct Split {
    int64_t panels, rows, row_blocks, tiles;
};

// `nanoseconds`: about how long one panel takes for one tile's rows.
inline Split split_call(int64_t panels, int64_t count, int64_t wide, int64_t tall, double (*nanoseconds)(const LinearCall&, int64_t),
                        const LinearCall& call) {
    constexpr int64_t most_rows = 240;
    Split split;
    split.row_blocks = (count + most_rows - 1) / most_rows;
    split.rows = ((count + split.row_blocks - 1) / split.row_blocks + tall - 1) / tall * tall;
    const double panel = nanoseconds(call, count < split.rows ? count : split.rows);
    const double total = panel * static_cast<double>(panels * split.row_blocks);
    // Long enough that claiming a tile costs nothing, short enough that threads finish together.
    double tile = total / (8.0 * team_size());
    tile = tile < 1500.0 ? 1500.0 : tile > 60000.0 ? 60000.0 : tile;
    split.panels = static_cast<int64_t>(tile / panel);
    split.panels = split.panels / wide * wide;
    if (split.panels < wide) split.panels = wide;
    split.tiles = (panels + split.panels - 1) / split.panels * split.row_blocks;
    return split;
}

// `rows` is at most Kernel::rows.
template <class Kernel, int P> void run_piece(const Piece& piece, int64_t rows) {
    switch (rows) {
        case 1: return Kernel::template multiply<1, P>(piece);
        case 2: return Kernel::template multiply<2, P>(piece);
        case 3:
            if constexpr (Kernel::rows >= 3) return Kernel::template multiply<3, P>(piece);
            break;
        case 4:
            if constexpr (Kernel::rows >= 4) return Kernel::template multiply<4, P>(piece);
            break;
        case 5:
            if constexpr (Kernel::rows >= 5) return Kernel::template multiply<5, P>(piece);
            break;
        default:
            if constexpr (Kernel::rows >= 6) return Kernel::template multiply<6, P>(piece);
    }
}

// A strip of panels from `panel` on, times the rows [row, row_end).
struct Strip {
    const LinearCall* call;
    int64_t panel, row, row_end;
};

// All of K at once, for rows that fit into one register tile.
template <class Kernel, int P> void stream_strip(const Strip& strip) {
    constexpr int64_t ahead = 2048;
    const PackedWeight& weight = *strip.call->weight;
    Piece piece{};
    piece.call = strip.call;
    piece.steps = padded_features(weight) / Kernel::step;
    piece.panel_bytes = piece.steps * Kernel::step_bytes;
    piece.weight = static_cast<const char*>(weight.data) + strip.panel * piece.panel_bytes;
    piece.input_bytes = strip.call->rows->stride * Kernel::input_size;
    piece.input = static_cast<const char*>(strip.call->rows->data) + strip.row * piece.input_bytes;
    piece.streaming = true;
    piece.near_ahead = ahead;
    piece.near_steps = piece.panel_bytes > ahead ? (piece.panel_bytes - ahead) / Kernel::step_bytes : 0;
    piece.far_ahead = (P - 1) * piece.panel_bytes + (piece.near_steps == 0 ? piece.panel_bytes : ahead);
    piece.row = strip.row;
    piece.panel = strip.panel;
    piece.first = piece.last = true;
    run_piece<Kernel, P>(piece, strip.row_end - strip.row);
}

// The rows of a strip's piece of K, one block after another.
template <class Kernel, int P> class PieceRows {
  public:
    // `piece`: of the strip's first row.
    PieceRows(const Piece& piece, int64_t count, const char* next) : piece_(piece), count_(count), next_(next) {}

    int64_t left() const { return count_ - done_; }

    // All rows that are left, in blocks of similar size.
    void run_rest() {
        const int64_t blocks = (left() + Kernel::rows - 1) / Kernel::rows;
        for (int64_t block = 0; block < blocks; ++block) run(left() / (blocks - block), 0);
    }

    // The next `rows` rows (at most Kernel::rows), without the first `skipped` steps, which their sums contain already.
    void run(int64_t rows, int64_t skipped) {
        Piece piece = rest();
        piece.weight += skipped * Kernel::step_bytes;
        piece.input += skipped * Kernel::step * Kernel::input_size;
        piece.steps -= skipped;
        piece.first = piece.first && skipped == 0;
        // A panel of the next piece with each of the first blocks, or two where blocks are few, then nothing new. Memory delivers at its
        // own pace: fetches that come faster than that only make the arithmetic wait.
        const int64_t panels = count_ >= P * Kernel::rows ? 1 : 2;
        piece.fetch = panels * block_ < P ? next_ + panels * block_ * piece.panel_bytes : piece.weight;
        piece.fetch_second = (panels - 1) * piece.panel_bytes;
        run_piece<Kernel, P>(piece, rows);
        done_ += rows;
        ++block_;
    }

    // The next `rows` rows are complete.
    void skip(int64_t rows) { done_ += rows; }

    // The piece from the first row that is left on.
    Piece rest() const {
        Piece piece = piece_;
        piece.input += done_ * piece.input_bytes;
        piece.row += done_;
        piece.sums = static_cast<char*>(piece.sums) + done_ * P * 16 * 4;
        return piece;
    }

  private:
    const Piece& piece_;
    int64_t count_;
    const char* next_;
    int64_t done_ = 0, block_ = 0;
};

// Piece by piece of K, each with all rows.
template <class Kernel, int P> void run_strip_in_pieces(const Strip& strip) {
    const PackedWeight& weight = *strip.call->weight;
    const int64_t count = strip.row_end - strip.row;
    const int64_t steps = padded_features(weight) / Kernel::step, piece_steps = Kernel::piece_steps(weight);
    Piece piece{};
    piece.call = strip.call;
    piece.row = strip.row;
    piece.panel = strip.panel;
    piece.panel_bytes = steps * Kernel::step_bytes;
    piece.input_bytes = strip.call->rows->stride * Kernel::input_size;
    piece.sums = scratch(1, count * P * 16 * 4);
    const char* panels = static_cast<const char*>(weight.data) + strip.panel * piece.panel_bytes;
    const char* input = static_cast<const char*>(strip.call->rows->data) + strip.row * piece.input_bytes;
    for (int64_t step = 0; step < steps; step += piece_steps) {
        piece.weight = panels + step * Kernel::step_bytes;
        piece.input = input + step * Kernel::step * Kernel::input_size;
        piece.steps = steps - step < piece_steps ? steps - step : piece_steps;
        piece.first = step == 0;
        piece.last = step + piece.steps == steps;
        piece.group = Kernel::group_of(weight, step);
        const char* next = piece.last ? panels + P * piece.panel_bytes : piece.weight + piece.steps * Kernel::step_bytes;
        PieceRows<Kernel, P> rows(piece, count, next);
        if constexpr (Kernel::amx_panels == P) run_amx_blocks(rows);
        rows.run_rest();
    }
}

template <class Kernel, int P> void run_strip(const Strip& strip) {
    const int64_t blocks = (strip.row_end - strip.row + Kernel::rows - 1) / Kernel::rows;
    if (blocks == 1) stream_strip<Kernel, P>(strip);
    else run_strip_in_pieces<Kernel, P>(strip);
}

template <class Kernel> Split split_for(const LinearCall& call) {
    const int64_t panels = (call.weight->out_features + 15) / 16;
    return split_call(panels, call.count, Kernel::panels, Kernel::rows, Kernel::nanoseconds, call);
}

template <class Kernel> int64_t kernel_tiles(const LinearCall& call) { return split_for<Kernel>(call).tiles; }

template <class Kernel> void kernel_tile(const LinearCall& call, int64_t tile) {
    const Split split = split_for<Kernel>(call);
    const int64_t all = (call.weight->out_features + 15) / 16;
    const int64_t row = tile % split.row_blocks * split.rows;
    const int64_t row_end = row + split.rows < call.count ? row + split.rows : call.count;
    int64_t panel = tile / split.row_blocks * split.panels;
    const int64_t end = panel + split.panels < all ? panel + split.panels : all;
    if (row >= row_end) return;
    for (; panel + Kernel::panels <= end; panel += Kernel::panels) run_strip<Kernel, Kernel::panels>({&call, panel, row, row_end});
    for (; panel < end; ++panel) run_strip<Kernel, 1>({&call, panel, row, row_end});
}
