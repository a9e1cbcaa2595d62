// Sums and gathers over processes of one machine, through a file in memory that all of them have mapped.
//
//     control (one per rank): rounds done, left, sleepers          slots: [2][size][slot_bytes]
//
// A round: everybody copies a piece into its slot, says so, waits for the others, and reads all slots in the order of ranks, which gives
// the same bits everywhere. Rounds take turns with two sets of slots: who has come to round n + 1 has read everything of round n, so that in
// round n + 2 its slots can be written again, and one wait per round is enough.
//
// Who dies keeps nobody waiting: every process holds a lock on its own byte of the file for as long as it lives, however it ends, and who
// waits looks after the others' locks now and then.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>

#include "abi.h"

#if defined(__linux__)
#include <climits>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__linux__) && defined(F_OFD_SETLK)

namespace penstock {
namespace {

constexpr int64_t LOOK_MILLISECONDS = 50;

enum Outcome : int32_t { DONE = 0, RANK_GONE = 1, TIMED_OUT = 2, HAS_LEFT = 3 };

struct alignas(64) Control {
    std::atomic<uint32_t> rounds;
    std::atomic<uint32_t> left;
    std::atomic<uint32_t> sleepers;
};

int64_t milliseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// sum[i] = a[i] + b[i]; four at a time, which compilers do not do by themselves at -O2.
void add(const float* a, const float* b, float* sum, int64_t count) {
    typedef float Four __attribute__((vector_size(16)));
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        Four x, y;
        std::memcpy(&x, a + i, 16);
        std::memcpy(&y, b + i, 16);
        x += y;
        std::memcpy(sum + i, &x, 16);
    }
    for (; i < count; ++i) sum[i] = a[i] + b[i];
}

class Group {
  public:
    Group(int file, char* memory, int64_t bytes, int32_t rank, int32_t size, int64_t slot_bytes, int32_t spins, int64_t patience)
        : file_(file), memory_(memory), bytes_(bytes), rank_(rank), size_(size), slot_bytes_(slot_bytes), spins_(spins),
          patience_(patience) {}

    ~Group() {
        leave();
        munmap(memory_, static_cast<size_t>(bytes_));
        close(file_);
    }

    static int64_t file_bytes(int32_t size, int64_t slot_bytes) { return size * int64_t(sizeof(Control)) + 2 * size * slot_bytes; }

    void leave() {
        control(rank_).left.store(1, std::memory_order_seq_cst);
        wake(rank_);
    }

    Outcome all_reduce(float* data, int64_t count) {
        const int64_t piece = slot_bytes_ / 4;
        for (int64_t start = 0; start < count; start += piece) {
            const int64_t length = std::min(piece, count - start);
            float* part = data + start;
            if (const Outcome outcome = exchange(part, length * 4)) return outcome;
            add(floats(0), floats(1), part, length);
            for (int32_t rank = 2; rank < size_; ++rank) add(part, floats(rank), part, length);
        }
        return DONE;
    }

    // out: [size][bytes]
    Outcome all_gather(const char* data, int64_t bytes, char* out) {
        for (int64_t start = 0; start < bytes; start += slot_bytes_) {
            const int64_t length = std::min(slot_bytes_, bytes - start);
            if (const Outcome outcome = exchange(data + start, length)) return outcome;
            for (int32_t rank = 0; rank < size_; ++rank)
                std::memcpy(out + rank * bytes + start, slot(rank), static_cast<size_t>(length));
        }
        return DONE;
    }

  private:
    Control& control(int32_t rank) { return reinterpret_cast<Control*>(memory_)[rank]; }

    // Of the round at hand.
    char* slot(int32_t rank) {
        return memory_ + size_ * int64_t(sizeof(Control)) + ((round_ & 1) * size_ + rank) * slot_bytes_;
    }

    const float* floats(int32_t rank) { return reinterpret_cast<const float*>(slot(rank)); }

    // One round: afterwards all slots hold what their ranks brought.
    Outcome exchange(const void* data, int64_t bytes) {
        if (control(rank_).left.load(std::memory_order_relaxed) != 0) return HAS_LEFT;
        ++round_;
        std::memcpy(slot(rank_), data, static_cast<size_t>(bytes));
        control(rank_).rounds.store(round_, std::memory_order_seq_cst);
        wake(rank_);
        for (int32_t rank = 0; rank < size_; ++rank)
            if (const Outcome outcome = wait_for(rank)) return outcome;
        return DONE;
    }

    // Whether a rank has come to this round. Numbers of rounds may wrap around.
    bool has_come(int32_t rank) {
        return static_cast<int32_t>(control(rank).rounds.load(std::memory_order_seq_cst) - round_) >= 0;
    }

    void wake(int32_t rank) {
        Control& own = control(rank);
        if (own.sleepers.load(std::memory_order_seq_cst) != 0)
            syscall(SYS_futex, &own.rounds, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }

    Outcome wait_for(int32_t rank) {
        for (int32_t spin = 0; spin < spins_; ++spin) {
            if (has_come(rank)) return DONE;
            pause();
        }
        Control& other = control(rank);
        const int64_t begin = milliseconds();
        Outcome outcome = DONE;
        other.sleepers.fetch_add(1, std::memory_order_seq_cst);
        for (int64_t looked = begin; !has_come(rank);) {
            const uint32_t seen = other.rounds.load(std::memory_order_seq_cst);
            if (static_cast<int32_t>(seen - round_) >= 0) break;
            const timespec nap{0, LOOK_MILLISECONDS * 1000000};
            syscall(SYS_futex, &other.rounds, FUTEX_WAIT, seen, &nap, nullptr, 0);
            const int64_t now = milliseconds();
            if (now - looked < LOOK_MILLISECONDS) continue;
            looked = now;
            // It may have done its part and then left.
            if (is_gone(rank) && !has_come(rank)) outcome = RANK_GONE;
            else if (now - begin > patience_) outcome = TIMED_OUT;
            if (outcome != DONE) break;
        }
        other.sleepers.fetch_sub(1, std::memory_order_seq_cst);
        return outcome;
    }

    bool is_gone(int32_t rank) {
        if (control(rank).left.load(std::memory_order_seq_cst) != 0) return true;
        struct flock lock {};
        lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
        return rank != rank_ && fcntl(file_, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    }

    const int file_;
    char* const memory_;
    const int64_t bytes_;
    const int32_t rank_, size_;
    const int64_t slot_bytes_;
    const int32_t spins_;
    const int64_t patience_;
    uint32_t round_ = 0;
};

// A file of `bytes` bytes that are really there, mapped, with this rank's byte locked. Null and `errno` otherwise.
char* open_file(const char* path, int64_t bytes, int32_t rank, int* file) {
    *file = open(path, rank == 0 ? O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC : O_RDWR | O_CLOEXEC, 0600);
    if (*file < 0) return nullptr;
    struct flock lock {};
    lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
    int error = 0;
    // Memory that is missing must show here, not as a signal later.
    struct stat status {};
    if (rank == 0) error = posix_fallocate(*file, 0, bytes);
    else if (fstat(*file, &status) != 0 || status.st_size != bytes) error = EINVAL;
    if (error == 0 && fcntl(*file, F_OFD_SETLK, &lock) != 0) error = errno;
    void* memory = MAP_FAILED;
    if (error == 0) {
        memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, *file, 0);
        if (memory == MAP_FAILED) error = errno;
    }
    if (error == 0) return static_cast<char*>(memory);
    close(*file);
    errno = error;
    return nullptr;
}

}  // namespace
}  // namespace penstock

// Whether this system has what the functions below need.
PENSTOCK_EXPORT int32_t penstock_group_supported() { return 1; }

// Join as `rank` the group whose file is `path`; rank 0 makes it, the others come afterwards. spins: how often to look before sleeping;
// patience: milliseconds to wait for a rank that lives. Null and the system's error number in `error` when that is impossible.
PENSTOCK_EXPORT void* penstock_group_join(const char* path, int32_t rank, int32_t size, int64_t slot_bytes, int32_t spins, int64_t patience,
                                          int32_t* error) {
    using penstock::Group;
    const int64_t bytes = Group::file_bytes(size, slot_bytes);
    int file = -1;
    char* memory = penstock::open_file(path, bytes, rank, &file);
    *error = errno;
    if (memory == nullptr) return nullptr;
    return new (std::nothrow) Group(file, memory, bytes, rank, size, slot_bytes, spins, patience);
}

// The others then find this rank gone.
PENSTOCK_EXPORT void penstock_group_leave(void* group) { static_cast<penstock::Group*>(group)->leave(); }

PENSTOCK_EXPORT void penstock_group_destroy(void* group) { delete static_cast<penstock::Group*>(group); }

// data [count] becomes the sum over all ranks. 0: done. 1: a rank is gone. 2: a rank has not come in time. 3: this rank has left.
PENSTOCK_EXPORT int32_t penstock_group_all_reduce(void* group, float* data, int64_t count) {
    return static_cast<penstock::Group*>(group)->all_reduce(data, count);
}

// out [size][bytes] gets what all ranks bring. Answers as above.
PENSTOCK_EXPORT int32_t penstock_group_all_gather(void* group, const void* data, int64_t bytes, void* out) {
    return static_cast<penstock::Group*>(group)->all_gather(static_cast<const char*>(data), bytes, static_cast<char*>(out));
}

#else

PENSTOCK_EXPORT int32_t penstock_group_supported() { return 0; }

#endif
