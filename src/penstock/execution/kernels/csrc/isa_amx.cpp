#if defined(__x86_64__)
#define PENSTOCK_ISA amx
#include "isa_kernels.h"
#endif
