#pragma once

#include "kernels.h"

namespace penstock {

// Whether the int8 products of `table` are bitwise those of `reference`: some microseconds of work that notices a processor, an emulator or
// an operating system that does not do what its feature bits say. Kernels that fail must not be used.
bool self_test(const KernelTable& table, const KernelTable& reference);

}  // namespace penstock
