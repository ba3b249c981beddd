#pragma once
// What the tests of the CPU kernels share.

#include <cstdint>
#include <cstring>
#include <vector>

#include "twell/device.h"
#include "twell/types.h"

namespace twell {

inline std::vector<CpuIsa> machine_isas() {
  std::vector<CpuIsa> isas;
  for (int isa = 0; isa <= static_cast<int>(detect_cpu_isa()); ++isa) {
    isas.push_back(static_cast<CpuIsa>(isa));
  }
  return isas;
}

template <class T>
constexpr DType kDType = sizeof(T) == 2   ? DType::kBf16
                         : sizeof(T) == 4 ? DType::kFloat32
                                          : DType::kFloat64;
template <class T>
constexpr double kEpsilon = sizeof(T) == 2   ? 1.0 / 256
                            : sizeof(T) == 4 ? 0x1p-24
                                             : 0x1p-53;

inline double value_of(bf16 v) { return to_float(v); }
inline double value_of(float v) { return v; }
inline double value_of(double v) { return v; }
inline void assign(bf16& to, double v) { to = to_bf16(static_cast<float>(v)); }
inline void assign(float& to, double v) { to = static_cast<float>(v); }
inline void assign(double& to, double v) { to = v; }

// Memory with 64-byte alignment, poisoned, and with a guard behind it.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes), memory_(bytes + 192, 0xFF) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    offset_ = (64 - address % 64) % 64;
  }
  void* data() { return memory_.data() + offset_; }
  template <class T>
  T* as() {
    return static_cast<T*>(data());
  }
  bool guard_intact() const {
    for (std::size_t i = offset_ + bytes_; i < memory_.size(); ++i) {
      if (memory_[i] != 0xFF) return false;
    }
    return true;
  }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ &&
           std::memcmp(memory_.data() + offset_, other.memory_.data() + other.offset_, bytes_) == 0;
  }

 private:
  std::size_t bytes_;
  std::vector<unsigned char> memory_;
  std::size_t offset_;
};

inline Device device_of(CpuIsa isa, int threads) {
  Device device = cpu_device(threads);
  device.isa = isa;
  return device;
}

}  // namespace twell
