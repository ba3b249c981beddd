#include "cpu/kernels.h"

#include "cpu/tables.h"

namespace twell::cpu {

#ifdef TWELL_X86

template <>
const Kernels<bf16>& kernels(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAmxBf16:
      return amx_bf16;
    case CpuIsa::kAvx512Bf16:
      return avx512_bf16;
    case CpuIsa::kAvx2:
      return avx2_bf16;
    case CpuIsa::kPortable:
      break;
  }
  return portable_bf16;
}

template <>
const Kernels<float>& kernels(CpuIsa isa) {
  if (isa >= CpuIsa::kAvx512Bf16) return avx512_float;
  return isa == CpuIsa::kAvx2 ? avx2_float : portable_float;
}

template <>
const Kernels<double>& kernels(CpuIsa isa) {
  if (isa >= CpuIsa::kAvx512Bf16) return avx512_double;
  return isa == CpuIsa::kAvx2 ? avx2_double : portable_double;
}

#else

template <>
const Kernels<bf16>& kernels(CpuIsa) {
  return portable_bf16;
}
template <>
const Kernels<float>& kernels(CpuIsa) {
  return portable_float;
}
template <>
const Kernels<double>& kernels(CpuIsa) {
  return portable_double;
}

#endif

}  // namespace twell::cpu
