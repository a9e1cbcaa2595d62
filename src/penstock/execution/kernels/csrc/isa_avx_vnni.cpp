#if defined(__x86_64__)
#define PENSTOCK_ISA avx_vnni
#include "isa_kernels.h"
#endif
