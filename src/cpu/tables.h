#pragma once
// The tables of the instruction sets; kernels<T>(isa) picks one.

#include "cpu/kernels.h"

namespace twell::cpu {

extern const Kernels<bf16> portable_bf16;
extern const Kernels<float> portable_float;
extern const Kernels<double> portable_double;

extern const Kernels<bf16> avx2_bf16;
extern const Kernels<float> avx2_float;
extern const Kernels<double> avx2_double;

extern const Kernels<bf16> avx512_bf16;
extern const Kernels<float> avx512_float;
extern const Kernels<double> avx512_double;

extern const Kernels<bf16> amx_bf16;
void amx_multiply(Rows<bf16> a, std::int64_t rows, std::int64_t inner, const bf16* panel,
                  std::int64_t columns, float* c, std::int64_t ldc, bool accumulate,
                  const bf16* next);

}  // namespace twell::cpu
