#define TWELL_VECTOR_BYTES 16
#include "cpu/generic.h"
#include "cpu/tables.h"

namespace twell::cpu {

constinit const Kernels<bf16> portable_bf16 = generic_kernels<bf16>();
constinit const Kernels<float> portable_float = generic_kernels<float>();
constinit const Kernels<double> portable_double = generic_kernels<double>();

}  // namespace twell::cpu
