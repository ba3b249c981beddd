#define TWELL_VECTOR_BYTES 32
#include "cpu/generic.h"
#include "cpu/tables.h"

namespace twell::cpu {

constinit const Kernels<bf16> avx2_bf16 = generic_kernels<bf16>();
constinit const Kernels<float> avx2_float = generic_kernels<float>();
constinit const Kernels<double> avx2_double = generic_kernels<double>();

}  // namespace twell::cpu
