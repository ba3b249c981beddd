#pragma once
// Single elements: to and from the type that products are accumulated in.

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

}  // namespace twell::cpu
