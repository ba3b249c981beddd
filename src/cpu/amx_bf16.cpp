#define TWELL_VECTOR_BYTES 64
#include "cpu/generic.h"
#include "cpu/tables.h"

namespace twell::cpu {

constinit const Kernels<bf16> amx_bf16 = generic_kernels<bf16>();

}  // namespace twell::cpu
