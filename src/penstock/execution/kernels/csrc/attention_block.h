// Attention of a few rows over pieces of a span: scores, weights, and sums of values, with the sums held in registers.
#include "attention_work.h"

// Cache tiles of a piece.
constexpr int32_t CHUNK_TILES = 4;
constexpr int32_t SCORE_STRIDE = SPAN + 16;
// Less than any score, yet finite, so that differences of two are not NaN.
constexpr float LOWEST_SCORE = -3.0e38f;

// Rows of a block, and vectors of 16 that are computed at once: what fits into the registers.
#if defined(__AVX512F__)
constexpr int MAX_BLOCK_ROWS = 6;
template <int R> constexpr int vectors_at_once() { return 4; }
#else
constexpr int MAX_BLOCK_ROWS = 4;
template <int R> constexpr int vectors_at_once() { return R == 1 ? 4 : R == 2 ? 2 : 1; }
#endif

// 2^x, relative error below 2e-7; exactly 0 below -126.5; NaN stays NaN. The polynomial of Cephes exp2f (Moshier, 1992).
inline f32x16 exp2(f32x16 x) {
    x = min(f32x16::set(126.0f), max(f32x16::set(-127.0f), x));
    const f32x16 whole = round(x);
    const f32x16 r = x - whole;
    f32x16 p = f32x16::set(1.535336188319500e-4f);
    p = fma(p, r, f32x16::set(1.339887440266574e-3f));
    p = fma(p, r, f32x16::set(9.618437357674640e-3f));
    p = fma(p, r, f32x16::set(5.550332471162809e-2f));
    p = fma(p, r, f32x16::set(2.402264791363012e-1f));
    p = fma(p, r, f32x16::set(6.931472028550421e-1f));
    p = fma(p, r, f32x16::set(1.0f));
    return p * power_of_two(whole);
}

// Memory of one tile while it is computed; all rows of `dim` floats are padded.
struct TileMemory {
    float* query;    // [rows][head_dim], times scale / ln 2
    float* scores;   // [rows][SCORE_STRIDE]
    float* largest;  // [rows][16], lane by lane
    float* values;   // [rows][dim], of one span
    float* maximum;  // [rows], of one span
    float* sum;      // [rows], of one span
    float* total;    // [rows][dim + 16], merged: values, maximum, sum
};

inline TileMemory tile_memory(const AttentionCall& call, int64_t rows) {
    const int64_t dim = padded_dim(call), padded_rows = (rows + 15) / 16 * 16;
    float* at = static_cast<float*>(scratch(4, padded_rows * (3 * dim + SCORE_STRIDE + 34) * static_cast<int64_t>(sizeof(float))));
    TileMemory memory;
    memory.query = at, at += padded_rows * dim;
    memory.scores = at, at += padded_rows * SCORE_STRIDE;
    memory.largest = at, at += padded_rows * 16;
    memory.values = at, at += padded_rows * dim;
    memory.maximum = at, at += padded_rows;
    memory.sum = at, at += padded_rows;
    memory.total = at;
    return memory;
}

// A few rows, and the tokens of the span that any of them sees.
struct RowBlock {
    int32_t first_row, rows;
    int64_t first_position, last_position;  // of the rows
    int64_t first, end;                     // tokens; first >= end: none
};

struct SpanWork {
    const AttentionCall* call;
    const int32_t* block_table;
    int64_t head, position, rows, group;  // position of the first row's token
    int64_t start, end;                   // tokens of the span that any row sees
    TileMemory memory;
    const RowBlock* blocks;
    int64_t num_blocks;
    int64_t slots[SPAN / 16];  // where the cache tiles of the span are, in tokens from the cache's beginning
};

inline int64_t slot_of(const SpanWork& work, int64_t token) { return work.slots[token % SPAN / 16]; }

inline void find_slots(SpanWork& work) {
    const AttentionCall& call = *work.call;
    for (int64_t token = work.start / 16 * 16; token < work.end; token += 16) {
        const int64_t place = static_cast<int64_t>(work.block_table[token / call.block_size]) * call.num_kv_heads + work.head;
        work.slots[token % SPAN / 16] = place * call.block_size + token % call.block_size;
    }
}

// The tile that is read 64 tokens after the one at `token`: the span's keys, then its values from the beginning. Null: none.
template <class T> inline const T* tile_ahead(const SpanWork& work, int64_t token, bool keys) {
    const AttentionCall& call = *work.call;
    int64_t ahead = token + CHUNK_TILES * 16;
    if (ahead >= work.end) {
        ahead = work.start / (CHUNK_TILES * 16) * (CHUNK_TILES * 16) + token % (CHUNK_TILES * 16);
        if (!keys || ahead < work.start / 16 * 16 || ahead >= work.end) return nullptr;
        keys = false;
    }
    return static_cast<const T*>(keys ? call.cache.key : call.cache.value) + slot_of(work, ahead) * call.head_dim;
}

// sums[r][v] += x[r][k] * vector v of row k, for `count` successive k. What lies at the same places in `ahead` is fetched meanwhile.
template <int R, int V, class T>
inline __attribute__((always_inline)) void multiply(f32x16 (&sums)[R][V], const float* x, int64_t x_stride, const T* const (&rows)[V],
                                                    const T* const (&ahead)[V], int64_t row_stride, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        f32x16 loaded[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            loaded[v] = load_cached(rows[v] + k * row_stride);
            __builtin_prefetch(ahead[v] + k * row_stride);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const f32x16 factor = f32x16::set(x[r * x_stride + k]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] = fma(factor, loaded[v], sums[r][v]);
        }
    }
}

// A score vector with what the row may not see replaced.
inline f32x16 hide(const SpanWork& work, int32_t row, int64_t token, f32x16 score) {
    const int64_t position = work.position + row / work.group;
    const int64_t first = first_visible(*work.call, position) - token, end = position + 1 - token;
    const f32x16 hidden = f32x16::set(-INFINITY);
    score = first_lanes(static_cast<int>(end < 0 ? 0 : end > 16 ? 16 : end), score, hidden);
    return first_lanes(static_cast<int>(first < 0 ? 0 : first > 16 ? 16 : first), hidden, score);
}

template <int R, int V, class T> inline void score_tiles(const SpanWork& work, const RowBlock& block, int64_t token) {
    const AttentionCall& call = *work.call;
    f32x16 sums[R][V];
    const T *tiles[V], *ahead[V];
    for (int v = 0; v < V; ++v) {
        tiles[v] = static_cast<const T*>(call.cache.key) + slot_of(work, token + 16 * v) * call.head_dim;
        ahead[v] = tile_ahead<T>(work, token + 16 * v, true);
        if (ahead[v] == nullptr) ahead[v] = tiles[v];
        for (int r = 0; r < R; ++r) sums[r][v] = f32x16::zero();
    }
    multiply<R, V, T>(sums, work.memory.query + block.first_row * call.head_dim, call.head_dim, tiles, ahead, 16, call.head_dim);
    if (sizeof(T) == 1)
        for (int v = 0; v < V; ++v) {
            const f32x16 factor = f32x16::load(call.cache.key_scales + slot_of(work, token + 16 * v));
            for (int r = 0; r < R; ++r) sums[r][v] = sums[r][v] * factor;
        }
    const bool whole = token + 16 * V - 1 <= block.first_position && token >= first_visible(call, block.last_position);
    for (int r = 0; r < R; ++r) {
        const int32_t row = block.first_row + r;
        float* largest = work.memory.largest + row * 16;
        f32x16 most = f32x16::load(largest);
        for (int v = 0; v < V; ++v) {
            const f32x16 score = whole ? sums[r][v] : hide(work, row, token + 16 * v, sums[r][v]);
            score.store(work.memory.scores + row * SCORE_STRIDE + token % SPAN + 16 * v);
            most = max(most, score);
        }
        most.store(largest);
    }
}

// Scores of a block's rows for the tiles within [start, end), whole tiles.
template <int R, class T> inline void score_block(const SpanWork& work, const RowBlock& block, int64_t start, int64_t end) {
    constexpr int V = vectors_at_once<R>();
    int64_t token = start;
    for (; token + 16 * V <= end; token += 16 * V) score_tiles<R, V, T>(work, block, token);
    for (; token < end; token += 16) score_tiles<R, 1, T>(work, block, token);
}

// values[r][16 v ...] += weights[r][token] * value[token] over the tokens [start, end), which lie within one chunk.
template <int R, int V, class T>
inline void weigh_columns(const SpanWork& work, const RowBlock& block, int64_t start, int64_t end, int64_t column) {
    const AttentionCall& call = *work.call;
    const int64_t dim = padded_dim(call);
    f32x16 sums[R][V];
    float* values = work.memory.values + block.first_row * dim + column;
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = f32x16::load(values + r * dim + 16 * v);
    for (int64_t token = start; token < end;) {
        const int64_t stop = token / 16 * 16 + 16 < end ? token / 16 * 16 + 16 : end;
        const T* tile = static_cast<const T*>(call.cache.value) + slot_of(work, token) * call.head_dim;
        const T* next = tile_ahead<T>(work, token, false);
        if (next == nullptr) next = tile;
        const T *rows[V], *ahead[V];
        for (int v = 0; v < V; ++v) {
            const int64_t offset = token % 16 * call.head_dim + column + 16 * v;
            rows[v] = tile + offset, ahead[v] = next + offset;
        }
        const float* weights = work.memory.scores + block.first_row * SCORE_STRIDE + token % SPAN;
        multiply<R, V, T>(sums, weights, SCORE_STRIDE, rows, ahead, call.head_dim, stop - token);
        token = stop;
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v].store(values + r * dim + 16 * v);
}

template <int R, class T> inline void weigh_block(const SpanWork& work, const RowBlock& block, int64_t start, int64_t end) {
    constexpr int V = vectors_at_once<R>();
    const int64_t dim = padded_dim(*work.call);
    int64_t column = 0;
    for (; column + 16 * V <= dim; column += 16 * V) weigh_columns<R, V, T>(work, block, start, end, column);
    for (; column < dim; column += 16) weigh_columns<R, 1, T>(work, block, start, end, column);
}

// Scores become weights: 2^(score - maximum). int8: the weights that meet the values carry the values' scales.
template <class T> inline void soften_row(const SpanWork& work, const RowBlock& block, int32_t row) {
    const AttentionCall& call = *work.call;
    const float maximum = reduce_max(f32x16::load(work.memory.largest + row * 16));
    const f32x16 shift = f32x16::set(maximum);
    float* scores = work.memory.scores + row * SCORE_STRIDE;
    f32x16 sum = f32x16::zero();
    for (int64_t token = block.first / 16 * 16; token < block.end; token += 16) {
        f32x16 weight = exp2(f32x16::load(scores + token % SPAN) - shift);
        sum = sum + weight;
        if (sizeof(T) == 1)
            weight = weight * f32x16::load(call.cache.value_scales + slot_of(work, token));
        weight.store(scores + token % SPAN);
    }
    work.memory.maximum[row] = maximum;
    work.memory.sum[row] = reduce_add(sum);
}

template <int R, class T> struct BlockKernels {
    static void score(const SpanWork& work, const RowBlock& block, int64_t start, int64_t end) { score_block<R, T>(work, block, start, end); }
    static void weigh(const SpanWork& work, const RowBlock& block, int64_t start, int64_t end) { weigh_block<R, T>(work, block, start, end); }
};

using BlockFunction = void (*)(const SpanWork&, const RowBlock&, int64_t, int64_t);

template <class T> inline BlockFunction score_function(int32_t rows) {
    static constexpr BlockFunction functions[] = {BlockKernels<1, T>::score, BlockKernels<2, T>::score, BlockKernels<3, T>::score,
                                                  BlockKernels<4, T>::score,
#if defined(__AVX512F__)
                                                  BlockKernels<5, T>::score, BlockKernels<6, T>::score
#endif
    };
    return functions[rows - 1];
}

template <class T> inline BlockFunction weigh_function(int32_t rows) {
    static constexpr BlockFunction functions[] = {BlockKernels<1, T>::weigh, BlockKernels<2, T>::weigh, BlockKernels<3, T>::weigh,
                                                  BlockKernels<4, T>::weigh,
#if defined(__AVX512F__)
                                                  BlockKernels<5, T>::weigh, BlockKernels<6, T>::weigh
#endif
    };
    return functions[rows - 1];
}
