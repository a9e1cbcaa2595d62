#include "team.h"

#include <climits>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "abi.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace penstock {
namespace {

// GOMP_parallel(body, data, threads, flags) and omp_get_num_threads() of the runtime that torch uses.
using ParallelFunction = void (*)(void (*)(void*), void*, unsigned, unsigned);
using CountFunction = int (*)();

ParallelFunction parallel_function = nullptr;
CountFunction count_function = nullptr;
int threads = 1;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}


// Plain threads for a torch without an OpenMP runtime that we can enter. They sleep between regions.
class Pool {
  public:
    explicit Pool(int workers) {
        for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }
    int workers() const { return static_cast<int>(workers_.size()); }
    void run(detail::Body body, void* data) {
        Team team(workers() + 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = body, data_ = data, team_ = &team, running_ = workers();
            ++generation_;
        }
        wake_.notify_all();
        body(data, team);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

  private:
    void work() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
            if (stopping_) return;
            seen = generation_;
            detail::Body body = body_;
            void* data = data_;
            Team* team = team_;
            lock.unlock();
            body(data, *team);
            lock.lock();
            if (--running_ == 0) done_.notify_all();
        }
    }

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    detail::Body body_ = nullptr;
    void* data_ = nullptr;
    Team* team_ = nullptr;
    int running_ = 0;
    uint64_t generation_ = 0;
    bool stopping_ = false;
};

std::unique_ptr<Pool> pool;

// Some tens of microseconds.
constexpr int SPINS = 2000;

// Sleep unless `word` differs from `value`; may wake for no reason.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    (void)word, (void)value;
    std::this_thread::yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

struct Buffer {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(memory); }
};

}  // namespace

// Threads that compute at the same pace meet within microseconds, so they spin. When one has lost its core to another process, spinning would
// only keep the other cores busy: a thread that sleeps instead leaves its core idle, and the system moves the missing one there.
void Team::barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) != 0) wake_all(phase_);
        return;
    }
    for (int spins = 0; spins < SPINS; ++spins) {
        if (phase_.load(std::memory_order_acquire) != phase) return;
        pause();
    }
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    while (phase_.load(std::memory_order_acquire) == phase) sleep_while(phase_, phase);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
}

namespace detail {

void run(Body body, void* data) {
    if (threads == 1) {
        Team team(1);
        body(data, team);
        return;
    }
    if (parallel_function == nullptr) {
        if (!pool || pool->workers() != threads - 1) pool = std::make_unique<Pool>(threads - 1);
        pool->run(body, data);
        return;
    }
    // The runtime may give fewer threads than asked for, which is known only inside the region.
    struct Call {
        Body body;
        void* data;
        std::unique_ptr<Team> memory{};
        std::atomic<int> joined{0};
        std::atomic<Team*> team{nullptr};
    } call{body, data};
    parallel_function(
        [](void* argument) {
            Call& shared = *static_cast<Call*>(argument);
            if (shared.joined.fetch_add(1) == 0) {
                shared.memory = std::make_unique<Team>(count_function());
                shared.team.store(shared.memory.get(), std::memory_order_release);
            }
            Team* team;
            while ((team = shared.team.load(std::memory_order_acquire)) == nullptr) pause();
            shared.body(shared.data, *team);
        },
        &call, static_cast<unsigned>(threads), 0);
}

}  // namespace detail

int team_size() { return threads; }

void* scratch(int slot, int64_t bytes) {
    thread_local Buffer buffers[8];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.memory);
        buffer.bytes = (bytes + 4095) / 4096 * 4096;
        buffer.memory = std::aligned_alloc(64, static_cast<size_t>(buffer.bytes));
        if (buffer.memory == nullptr) std::abort();
    }
    return buffer.memory;
}

}  // namespace penstock

// parallel: GOMP_parallel of torch's OpenMP runtime; count: its omp_get_num_threads. Null for both: plain threads.
PENSTOCK_EXPORT void penstock_set_runtime(void* parallel, void* count) {
    penstock::parallel_function = reinterpret_cast<penstock::ParallelFunction>(parallel);
    penstock::count_function = reinterpret_cast<penstock::CountFunction>(count);
}

PENSTOCK_EXPORT void penstock_set_threads(int32_t count) { penstock::threads = count < 1 ? 1 : count; }

PENSTOCK_EXPORT int32_t penstock_threads() { return penstock::threads; }
