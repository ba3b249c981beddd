#pragma once
// Single elements: to and from the type that products are accumulated in.

#include <bit>
#include <cstdint>

#include "cpu/kernels.h"

namespace twell::cpu {

template <class T>
Acc<T> widen(T value) {
  return value;
}
template <>
inline float widen(bf16 value) {
  return to_float(value);
}

template <class T>
T narrow(Acc<T> value) {
  return value;
}
template <>
inline bf16 narrow(float value) {
  return to_bf16(value);
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<bf16> {
  using type = std::uint16_t;
  static constexpr type kExponent = 0x7f80;
};
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
  static constexpr type kExponent = 0x7f800000;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
  static constexpr type kExponent = 0x7ff0000000000000;
};

// By the exponent's bits: the compiler vectorises this, and no float sum has to be reordered.
template <class T>
bool all_finite(const T* row, std::int64_t count) {
  using Bits = typename BitsOf<T>::type;
  constexpr Bits exponent = BitsOf<T>::kExponent;
  Bits bad = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    bad |= static_cast<Bits>((std::bit_cast<Bits>(row[k]) & exponent) == exponent);
  }
  return bad == 0;
}

}  // namespace twell::cpu
