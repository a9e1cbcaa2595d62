#define PENSTOCK_ISA portable
#include "isa_kernels.h"
