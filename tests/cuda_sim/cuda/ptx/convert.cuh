#pragma once
// src/cuda/ptx/convert.cuh for the simulator.

#include <cmath>
#include <cstdint>
#include <limits>

#include "twell/types.h"

namespace twell::cuda::ptx {

inline std::uint32_t pack(float low, float high) {
  constexpr std::uint32_t kNan = 0x7fff;  // the only one that the instruction makes
  const auto convert = [](float v) { return std::isnan(v) ? kNan : to_bf16(v).bits; };
  return convert(low) | convert(high) << 16;
}

inline std::uint32_t pack_relu(float low, float high) {
  const auto relu = [](float v) { return v <= 0 ? 0.0f : v; };
  return pack(relu(low), relu(high));
}

inline float max_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<float>::quiet_NaN();
  return a > b ? a : b;
}

inline std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) {
  return (a & 0xffffu) | b << 16;
}

inline std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) {
  return a >> 16 | (b & 0xffff0000u);
}

inline float low_half(std::uint32_t packed) { return __uint_as_float(packed << 16); }

inline float high_half(std::uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

}  // namespace twell::cuda::ptx
