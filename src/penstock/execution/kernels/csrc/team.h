// The threads of one parallel region, and the work that they share.
//
// There is one pool of threads in a process: the OpenMP runtime that torch has loaded. Its entry point is handed over by Python
// (penstock_set_runtime), so that this library links no OpenMP of its own. Without one, a small pool of plain threads is used.
//
//     run_team([&](Team& team) {
//         team.for_tiles(tiles_of_step_1, [&](int64_t tile) { ... });   // ends with a barrier
//         team.for_tiles(tiles_of_step_2, [&](int64_t tile) { ... });
//     });
//
// Tiles are claimed from an atomic counter: a core that is taken by another process costs one tile, not the whole step.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace penstock {

class Team {
  public:
    explicit Team(int size) : size_(size) {}

    int size() const { return size_; }

    // Every thread of the team calls this with the same number of tiles. Returns when all tiles are done.
    template <class F> void for_tiles(int64_t tiles, F&& body) {
        if (size_ == 1) {
            for (int64_t tile = 0; tile < tiles; ++tile) body(tile);
            return;
        }
        for (int64_t tile; (tile = next_.fetch_add(1, std::memory_order_relaxed)) < tiles;) body(tile);
        barrier();
    }

  private:
    void barrier();

    int size_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    std::atomic<int> sleeping_{0};
};

namespace detail {
using Body = void (*)(void* data, Team& team);
void run(Body body, void* data);
}  // namespace detail

// Run `body(Team&)` once on every thread. Not reentrant: a body never calls run_team.
template <class F> void run_team(F&& body) {
    using Closure = std::remove_reference_t<F>;
    detail::run([](void* data, Team& team) { (*static_cast<Closure*>(data))(team); }, &body);
}

// Threads that run_team uses, at least 1.
int team_size();

// At least `bytes` of memory aligned to 64 bytes, private to the calling thread and to `slot` (0 … 7); contents are undefined and last until
// the next call with the same slot. Never shrinks.
void* scratch(int slot, int64_t bytes);

}  // namespace penstock
