// Products of int8 rows with int8 weights in AMX tiles: 16 rows times 64 input features times 16 output features in one instruction.
//
// A panel of a weight is already the second operand: 16 lines of 64 bytes are 64 input features of 16 output features. Sums are the same
// exact integers as everywhere, and lie in memory where the register tiles expect them (linear_tile.h), which finish the rows.
#if defined(__AMX_INT8__)
#define PENSTOCK_AMX
#endif
#if defined(PENSTOCK_AMX)

// Layout of the operand of LDTILECFG (Intel SDM, volume 1, 18.3.1).
struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The tile registers of this thread, for as long as this lives. Others (oneDNN) configure them as they like in between.
class TileRegisters {
  public:
    TileRegisters() {
        TileShapes shapes;
        for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = 16;
        // GCC's intrinsic says that it reads eight bytes of the 64, so that stores to the others look dead.
        asm volatile("" : : "r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// Adds the first `steps` steps of 8 input features (a multiple of 8) of a piece with 16 rows and 4 panels to its sums.
inline void add_with_tiles(const Piece& piece, int64_t steps) {
    constexpr int64_t row_bytes = 4 * 64;  // of the sums of four panels
    char* sums = static_cast<char*>(piece.sums);
    if (piece.first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, row_bytes);
        _tile_loadd(1, sums + 64, row_bytes);
        _tile_loadd(2, sums + 128, row_bytes);
        _tile_loadd(3, sums + 192, row_bytes);
    }
    const char* weight = piece.weight;
    const char* input = piece.input;
    for (int64_t step = 0; step < steps; step += 8) {
        _tile_loadd(4, input, piece.input_bytes);
        _tile_loadd(5, weight, 64);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, weight + piece.panel_bytes, 64);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(5, weight + 2 * piece.panel_bytes, 64);
        _tile_dpbsud(2, 4, 5);
        _tile_loadd(6, weight + 3 * piece.panel_bytes, 64);
        _tile_dpbsud(3, 4, 6);
        input += 64;
        weight += 1024;
    }
    _tile_stored(0, sums, row_bytes);
    _tile_stored(1, sums + 64, row_bytes);
    _tile_stored(2, sums + 128, row_bytes);
    _tile_stored(3, sums + 192, row_bytes);
}

// All whole blocks of 16 rows: 64 input features at a time in tiles, the rest and what follows the sums in register tiles.
template <class Blocks> void run_amx_blocks(Blocks& rows) {
    const TileRegisters registers;
    while (rows.left() >= 16) {
        const Piece piece = rows.rest();
        const int64_t steps = piece.steps / 8 * 8;
        if (steps > 0) add_with_tiles(piece, steps);
        if (steps == piece.steps && !piece.last) {
            rows.skip(16);
        } else {
            rows.run(6, steps);
            rows.run(5, steps);
            rows.run(5, steps);
        }
    }
}
#endif
