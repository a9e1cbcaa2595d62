// Causal attention straight over the blocks of the paged KV cache, for any mixture of decodes and prefill chunks.
//
// A context is cut into spans of 512 tokens at absolute positions. For each span a row (one query head of one token) has a partial result
// (largest score, sum of weights, weighted sum of values), and a row's result is its partials merged in order. So it does not matter
// whether one tile goes through all spans (many rows) or each span is a tile and the partials meet in memory (a long decode on many
// cores), nor which rows share a tile: what is computed for a row is always the same. Tokens that a row may not see have weight 0,
// and the products with them leave its sums as they are.
//
// A tile takes up to 64 rows that share a KV head: its group of query heads times successive tokens. Within a span the rows are computed in
// blocks of a few, for which keys and values are loaded once, over pieces of four cache tiles that stay in the first cache level.
// Cache slots beyond a request's context may hold anything; their scores are replaced and their values never read.
// Uses scratch slots 4 and 5.

#include "attention_block.h"

// The partial results of all rows for one span, in memory.values, maximum and sum.
template <class T> inline void attend_span(const SpanWork& work) {
    const int64_t dim = padded_dim(*work.call);
    const int64_t piece = CHUNK_TILES * 16;
    for (int64_t i = 0; i < work.rows; ++i) f32x16::set(LOWEST_SCORE).store(work.memory.largest + i * 16);
    std::memset(work.memory.values, 0, static_cast<size_t>(work.rows * dim) * sizeof(float));
    for (int64_t start = work.start / piece * piece; start < work.end; start += piece)
        for (int64_t b = 0; b < work.num_blocks; ++b) {
            const RowBlock& block = work.blocks[b];
            const int64_t first = block.first / 16 * 16, end = (block.end + 15) / 16 * 16;
            const int64_t from = first > start ? first : start, to = end < start + piece ? end : start + piece;
            if (from < to) score_function<T>(block.rows)(work, block, from, to);
        }
    for (int64_t b = 0; b < work.num_blocks; ++b)
        for (int32_t row = 0; row < work.blocks[b].rows; ++row) soften_row<T>(work, work.blocks[b], work.blocks[b].first_row + row);
    for (int64_t start = work.start / piece * piece; start < work.end; start += piece)
        for (int64_t b = 0; b < work.num_blocks; ++b) {
            const RowBlock& block = work.blocks[b];
            const int64_t from = block.first > start ? block.first : start, to = block.end < start + piece ? block.end : start + piece;
            if (from < to) weigh_function<T>(block.rows)(work, block, from, to);
        }
}

// Add a span's partial of one row to what the spans before it gave. total: `dim` values, then maximum and sum.
inline void merge_row(float* total, const float* values, float maximum, float sum, int64_t dim) {
    const float before = total[dim], now = before > maximum ? before : maximum;
    float scales[16] = {before - now, maximum - now};
    exp2(f32x16::load(scales)).store(scales);
    const f32x16 old_scale = f32x16::set(scales[0]), scale = f32x16::set(scales[1]);
    for (int64_t d = 0; d < dim; d += 16)
        fma(f32x16::load(values + d), scale, f32x16::load(total + d) * old_scale).store(total + d);
    total[dim] = now;
    total[dim + 1] = total[dim + 1] * scales[0] + sum * scales[1];
}

inline void clear_total(float* total, int64_t dim) {
    std::memset(total, 0, static_cast<size_t>(dim + 16) * sizeof(float));
    total[dim] = LOWEST_SCORE;
}

inline void finish_row(const AttentionCall& call, const TileWork& tile, int64_t row, float* total) {
    const int64_t dim = padded_dim(call), group = call.num_heads / call.num_kv_heads;
    const int64_t token = tile.request.first_token + tile.first_row_token + row / group, head = tile.head * group + row % group;
    const f32x16 factor = f32x16::set(1.0f / total[dim + 1]);
    for (int64_t d = 0; d < dim; d += 16) (f32x16::load(total + d) * factor).store(total + d);
    std::memcpy(call.output + token * call.output_stride + head * call.head_dim, total, static_cast<size_t>(call.head_dim) * sizeof(float));
}

// Query rows one after the other, in the order of tokens, times what turns exp into exp2.
inline void gather_query(const AttentionCall& call, const TileWork& tile, float* query) {
    const int64_t group = call.num_heads / call.num_kv_heads, dim = call.head_dim;
    const float factor = call.scale * 1.44269504088896341f;
    for (int64_t i = 0; i < tile.num_tokens; ++i) {
        const float* source = call.query + (tile.request.first_token + tile.first_row_token + i) * call.query_stride + tile.head * group * dim;
        for (int64_t d = 0; d < group * dim; ++d) query[i * group * dim + d] = source[d] * factor;
    }
}

// Rows in blocks of nearly equal size, and the tokens of span [start, end) that each sees. Returns the number of blocks.
inline int64_t divide_rows(SpanWork& work, RowBlock* blocks, int64_t start, int64_t end) {
    const int64_t count = (work.rows + MAX_BLOCK_ROWS - 1) / MAX_BLOCK_ROWS;
    int64_t row = 0;
    work.start = end, work.end = start;
    for (int64_t b = 0; b < count; ++b) {
        RowBlock& block = blocks[b];
        block.first_row = static_cast<int32_t>(row);
        block.rows = static_cast<int32_t>(work.rows / count + (b < work.rows % count));
        row += block.rows;
        block.first_position = work.position + block.first_row / work.group;
        block.last_position = work.position + (row - 1) / work.group;
        block.first = first_visible(*work.call, block.first_position);
        if (block.first < start) block.first = start;
        block.end = block.last_position + 1 < end ? block.last_position + 1 : end;
        if (block.first >= block.end) block.first = block.end = start;
        else {
            if (block.first < work.start) work.start = block.first;
            if (block.end > work.end) work.end = block.end;
        }
    }
    return count;
}

template <class T> inline void attend_tile(const AttentionCall& call, const TileWork& tile) {
    const int64_t dim = padded_dim(call);
    SpanWork work;
    work.call = &call;
    work.block_table = call.block_tables + tile.index * call.block_table_stride;
    work.head = tile.head;
    work.group = call.num_heads / call.num_kv_heads;
    work.position = tile.request.context - tile.request.num_tokens + tile.first_row_token;
    work.rows = tile.num_tokens * work.group;
    work.memory = tile_memory(call, work.rows);
    RowBlock* blocks = static_cast<RowBlock*>(scratch(5, work.rows * static_cast<int64_t>(sizeof(RowBlock))));
    work.blocks = blocks;
    gather_query(call, tile, work.memory.query);
    const bool split = tile.request.split;
    const int64_t last_position = work.position + tile.num_tokens - 1;
    const int64_t first_span = split ? tile.span : first_visible(call, work.position) / SPAN;
    const int64_t end_span = split ? tile.span + 1 : last_position / SPAN + 1;
    float* total = split ? call.partials + (tile.partial + tile.span - tile.request.first_span) * partial_stride(call) : work.memory.total;
    for (int64_t row = 0; row < work.rows; ++row) clear_total(total + row * (dim + 16), dim);
    for (int64_t span = first_span; span < end_span; ++span) {
        work.num_blocks = divide_rows(work, blocks, span * SPAN, (span + 1) * SPAN);
        find_slots(work);
        attend_span<T>(work);
        for (int64_t row = 0; row < work.rows; ++row)
            merge_row(total + row * (dim + 16), work.memory.values + row * dim, work.memory.maximum[row], work.memory.sum[row], dim);
    }
    if (split) return;
    for (int64_t row = 0; row < work.rows; ++row) finish_row(call, tile, row, total + row * (dim + 16));
}

inline void attention_tile(const AttentionCall& call, int64_t tile) {
    const TileWork work = find_tile(call, tile, false);
    if (call.kv_kind == KV_FLOAT32) attend_tile<float>(call, work);
    else if (call.kv_kind == KV_BFLOAT16) attend_tile<uint16_t>(call, work);
    else attend_tile<int8_t>(call, work);
}

inline void attention_merge_tile(const AttentionCall& call, int64_t tile) {
    const TileWork work = find_tile(call, tile, true);
    const int64_t dim = padded_dim(call), rows = work.num_tokens * (call.num_heads / call.num_kv_heads);
    float* total = static_cast<float*>(scratch(4, (dim + 16) * static_cast<int64_t>(sizeof(float))));
    for (int64_t row = 0; row < rows; ++row) {
        clear_total(total, dim);
        for (int64_t span = work.request.first_span; span < work.request.end_span; ++span) {
            const float* values = call.partials + (work.partial + span - work.request.first_span) * partial_stride(call) + row * (dim + 16);
            merge_row(total, values, values[dim], values[dim + 1], dim);
        }
        finish_row(call, work, row, total);
    }
}
