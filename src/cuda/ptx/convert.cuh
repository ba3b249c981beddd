#pragma once
// Packed bf16 conversions and what else needs an instruction of its own.

#include <cstdint>

namespace twell::cuda::ptx {

// Two float32 to bf16, to nearest even: `low` in bits 0-15, `high` in bits 16-31.
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// As pack, negative values becoming 0; NaN stays NaN.
__device__ __forceinline__ std::uint32_t pack_relu(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The larger; NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The low or high halves of two pairs: a's in bits 0-15.
__device__ __forceinline__ std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}

__device__ __forceinline__ std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

__device__ __forceinline__ float low_half(std::uint32_t packed) {
  return __uint_as_float(packed << 16);
}

__device__ __forceinline__ float high_half(std::uint32_t packed) {
  return __uint_as_float(packed & 0xffff0000u);
}

}  // namespace twell::cuda::ptx
