#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace twell {

// The upper half of an IEEE float32.
struct bf16 {
  std::uint16_t bits;
};

inline float to_float(bf16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN (quiet).
inline bf16 to_bf16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

enum class DType : std::uint8_t { kBf16, kFloat32, kFloat64 };

inline std::size_t size_of(DType dtype) {
  return dtype == DType::kBf16 ? 2 : dtype == DType::kFloat32 ? 4 : 8;
}

inline const char* name_of(DType dtype) {
  return dtype == DType::kBf16 ? "bfloat16" : dtype == DType::kFloat32 ? "float32" : "float64";
}

}  // namespace twell
