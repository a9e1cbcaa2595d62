// How the attention of a step is cut into tiles: by request, KV head, group of query tokens, and, for long contexts with few query tokens, span.
//
// Nothing is kept between tiles: each finds its own work from its number, by a scan over the requests.

// Tokens of a span, and query rows of a tile.
constexpr int32_t SPAN = 512;
constexpr int32_t TILE_ROWS = 64;

// What is done for one request.
struct RequestWork {
    int64_t first_token, num_tokens, context;
    int64_t token_groups;         // of tile_tokens query tokens each
    int64_t first_span, end_span;
    bool split;                   // every span is a tile
};

// The work of one tile, or of one merging tile.
struct TileWork {
    RequestWork request;
    int64_t index, head, first_row_token, num_tokens;
    int64_t span;     // when split
    int64_t partial;  // ordinal of the first span's partial of these rows, when split
};

inline int64_t tile_tokens(const AttentionCall& call) {
    const int64_t tokens = TILE_ROWS / (call.num_heads / call.num_kv_heads);
    return tokens < 1 ? 1 : tokens;
}

inline int64_t padded_dim(const AttentionCall& call) { return (call.head_dim + 15) / 16 * 16; }

// Floats of one tile's partial for one span: for each row the sum, then the largest score and the sum of weights.
inline int64_t partial_stride(const AttentionCall& call) {
    return tile_tokens(call) * (call.num_heads / call.num_kv_heads) * (padded_dim(call) + 16);
}

inline int64_t first_visible(const AttentionCall& call, int64_t position) {
    const int64_t first = position - call.sliding_window + 1;
    return call.sliding_window == 0 || first < 0 ? 0 : first;
}

inline RequestWork request_work(const AttentionCall& call, int64_t request, int64_t tokens_per_tile) {
    RequestWork work;
    work.first_token = call.query_start[request];
    work.num_tokens = call.query_start[request + 1] - work.first_token;
    work.context = call.seq_lens[request];
    work.token_groups = work.num_tokens == 1 ? 1 : (work.num_tokens + tokens_per_tile - 1) / tokens_per_tile;
    work.first_span = first_visible(call, work.context - work.num_tokens) / SPAN;
    work.end_span = (work.context + SPAN - 1) / SPAN;
    // With many groups of rows there is work for all cores without cutting the context.
    work.split = work.end_span - work.first_span > 1 && work.token_groups < 4;
    return work;
}

// Tiles, merging tiles and partials of all requests.
struct WorkCounts {
    int64_t tiles, merge_tiles, partials;
};

inline WorkCounts count_work(const AttentionCall& call) {
    const int64_t tokens_per_tile = tile_tokens(call);
    WorkCounts counts{0, 0, 0};
    for (int64_t r = 0; r < call.num_requests; ++r) {
        const RequestWork work = request_work(call, r, tokens_per_tile);
        const int64_t groups = work.token_groups * call.num_kv_heads, spans = work.end_span - work.first_span;
        counts.tiles += work.split ? groups * spans : groups;
        counts.merge_tiles += work.split ? groups : 0;
        counts.partials += work.split ? groups * spans : 0;
    }
    return counts;
}

inline int64_t attention_partial_floats(const AttentionCall& call) { return count_work(call).partials * partial_stride(call); }

inline int64_t attention_tiles(const AttentionCall& call) { return count_work(call).tiles; }

inline int64_t attention_merge_tiles(const AttentionCall& call) { return count_work(call).merge_tiles; }

// The tile with this number. Requests are numbered from the last to the first and their token groups likewise: chunks, and the rows with the
// longest contexts, come first, and small tiles fill the end. When merging, only split requests count, without their spans.
inline TileWork find_tile(const AttentionCall& call, int64_t tile, bool merging) {
    const int64_t tokens_per_tile = tile_tokens(call);
    TileWork found;
    found.partial = 0;
    for (found.index = call.num_requests - 1;; --found.index) {
        found.request = request_work(call, found.index, tokens_per_tile);
        const int64_t spans = found.request.end_span - found.request.first_span;
        const int64_t groups = found.request.token_groups * call.num_kv_heads;
        const int64_t per_group = found.request.split && !merging ? spans : 1;
        const int64_t tiles = merging && !found.request.split ? 0 : groups * per_group;
        if (tile >= tiles) {
            tile -= tiles;
            found.partial += found.request.split ? groups * spans : 0;
            continue;
        }
        const int64_t group = tile / per_group;
        found.span = found.request.first_span + tile % per_group;
        found.partial += group * spans;
        found.head = group % call.num_kv_heads;
        found.first_row_token = (found.request.token_groups - 1 - group / call.num_kv_heads) * tokens_per_tile;
        found.num_tokens = found.request.num_tokens - found.first_row_token;
        if (found.num_tokens > tokens_per_tile) found.num_tokens = tokens_per_tile;
        return found;
    }
}
