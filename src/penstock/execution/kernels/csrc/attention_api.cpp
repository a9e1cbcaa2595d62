// Attention as a C function, for the attention backend. Mirrored in kernels/attention.py.
#include "kernels.h"
#include "team.h"

// See AttentionCall; its partials are provided here.
PENSTOCK_EXPORT void penstock_attention(const penstock::AttentionCall* given) {
    const penstock::KernelTable& kernels = penstock::kernels();
    penstock::AttentionCall call = *given;
    const int64_t partial_bytes = kernels.attention_partial_floats(call) * static_cast<int64_t>(sizeof(float));
    // Slot 7 of the calling thread: the kernels do not use it, so it stays as it is throughout the region.
    call.partials = static_cast<float*>(penstock::scratch(7, partial_bytes));
    const int64_t tiles = kernels.attention_tiles(call), merge_tiles = kernels.attention_merge_tiles(call);
    if (tiles == 1) {
        kernels.attention_tile(call, 0);
        return;
    }
    penstock::run_team([&](penstock::Team& team) {
        team.for_tiles(tiles, [&](int64_t tile) { kernels.attention_tile(call, tile); });
        if (merge_tiles > 0) team.for_tiles(merge_tiles, [&](int64_t tile) { kernels.attention_merge_tile(call, tile); });
    });
}
