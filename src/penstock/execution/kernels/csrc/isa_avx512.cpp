#if defined(__x86_64__)
#define PENSTOCK_ISA avx512
#include "isa_kernels.h"
#endif
