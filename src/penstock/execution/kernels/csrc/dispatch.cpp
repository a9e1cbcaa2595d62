// Which instruction set runs: the best that processor and operating system support, or the one named by PENSTOCK_CPU_ISA.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "self_test.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace penstock {

#define PENSTOCK_DECLARE(isa) extern const KernelTable kernels_##isa __attribute__((weak))
PENSTOCK_DECLARE(portable);
PENSTOCK_DECLARE(avx2);
PENSTOCK_DECLARE(avx_vnni);
PENSTOCK_DECLARE(avx512);
PENSTOCK_DECLARE(avx512_vnni);
PENSTOCK_DECLARE(avx512_bf16);
PENSTOCK_DECLARE(amx);

namespace {

struct Candidate {
    const KernelTable* table;
    bool (*supported)();
};

#if defined(__x86_64__)
bool leaf7(unsigned sub, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
    return __get_cpuid_count(7, sub, a, b, c, d) != 0;
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx_vnni() {
    unsigned a, b, c, d;
    return has_avx2() && leaf7(1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() {
    unsigned a, b, c, d;
    return has_avx512_vnni() && leaf7(1, &a, &b, &c, &d) && (a >> 5 & 1);
}
bool has_amx() {
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !leaf7(0, &a, &b, &c, &d)) return false;
    if ((d >> 22 & 7) != 7) return false;  // AMX-BF16, AMX-TILE, AMX-INT8
#if defined(__linux__)
    // The kernel hands out the tile registers only on request (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif
bool always() { return true; }

// Best first.
const Candidate candidates[] = {
#if defined(__x86_64__)
    {&kernels_amx, has_amx},
    {&kernels_avx512_bf16, has_avx512_bf16},
    {&kernels_avx512_vnni, has_avx512_vnni},
    {&kernels_avx512, has_avx512},
    {&kernels_avx_vnni, has_avx_vnni},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_portable, always},
};

const KernelTable* choose(const char* name) {
    for (const Candidate& candidate : candidates) {
        if (candidate.table == nullptr) continue;  // this compiler could not build it
        if (name != nullptr && std::strcmp(name, candidate.table->name) != 0) continue;
        if (!candidate.supported()) continue;
        if (candidate.table == &kernels_portable || self_test(*candidate.table, kernels_portable)) return candidate.table;
    }
    return nullptr;
}

const KernelTable* chosen = nullptr;

}  // namespace

const KernelTable& kernels() { return *chosen; }

}  // namespace penstock

// Choose the kernels called `name`, or the best for null. 0 when this machine or this build has none of that name.
PENSTOCK_EXPORT int32_t penstock_choose_isa(const char* name) {
    const penstock::KernelTable* table = penstock::choose(name);
    if (table == nullptr) return 0;
    penstock::chosen = table;
    return 1;
}

PENSTOCK_EXPORT const char* penstock_isa() { return penstock::kernels().name; }

PENSTOCK_EXPORT int32_t penstock_abi_version() { return PENSTOCK_ABI_VERSION; }
