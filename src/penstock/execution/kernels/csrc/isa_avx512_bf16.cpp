#if defined(__x86_64__)
#define PENSTOCK_ISA avx512_bf16
#include "isa_kernels.h"
#endif
