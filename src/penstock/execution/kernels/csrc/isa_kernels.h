// All kernels of one instruction set. An isa_*.cpp defines PENSTOCK_ISA (a namespace and the table's name) and includes this.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
// gcc 12 takes the undefined registers of its own intrinsics for mistakes (gcc bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "team.h"

#define PENSTOCK_STRING_OF(x) #x
#define PENSTOCK_STRING(x) PENSTOCK_STRING_OF(x)
#define PENSTOCK_JOIN_OF(a, b) a##b
#define PENSTOCK_JOIN(a, b) PENSTOCK_JOIN_OF(a, b)

namespace penstock {
// An unnamed namespace inside the named one: no function may be shared between instruction sets by the linker.
namespace PENSTOCK_ISA {
namespace {
#include "simd.h"
#include "activations.h"
#include "linear.h"
#include "rows.h"
#include "attention.h"
#include "sampling.h"
}  // namespace
}  // namespace PENSTOCK_ISA

extern const KernelTable PENSTOCK_JOIN(kernels_, PENSTOCK_ISA);
const KernelTable PENSTOCK_JOIN(kernels_, PENSTOCK_ISA) = {
    PENSTOCK_STRING(PENSTOCK_ISA),
    PENSTOCK_ISA::emit_row,
    PENSTOCK_ISA::linear_tiles,
    PENSTOCK_ISA::linear_tile,
    PENSTOCK_ISA::dequantize_row,
    PENSTOCK_ISA::norm_row,
    PENSTOCK_ISA::silu_row,
    PENSTOCK_ISA::mix_row,
    PENSTOCK_ISA::rotary_row,
    PENSTOCK_ISA::attention_partial_floats,
    PENSTOCK_ISA::attention_tiles,
    PENSTOCK_ISA::attention_tile,
    PENSTOCK_ISA::attention_merge_tiles,
    PENSTOCK_ISA::attention_merge_tile,
    PENSTOCK_ISA::sample_row,
    PENSTOCK_ISA::logprob_row,
};
}  // namespace penstock
