#define TWELL_VECTOR_BYTES 64
#include "cpu/generic.h"
#include "cpu/tables.h"

namespace twell::cpu {

constinit const Kernels<bf16> avx512_bf16 = generic_kernels<bf16>();
constinit const Kernels<float> avx512_float = generic_kernels<float>();
constinit const Kernels<double> avx512_double = generic_kernels<double>();

}  // namespace twell::cpu
