#if defined(__x86_64__)
#define PENSTOCK_ISA avx2
#include "isa_kernels.h"
#endif
