#pragma once
// What the tests of the CPU kernels share.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "twell/device.h"
#include "twell/ffn.h"
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
// What a sum loses at most of the sum of its terms' sizes, accumulated as T's products are.
template <class T>
constexpr double kSummingError = 64 * (sizeof(T) == 8 ? 0x1p-53 : 0x1p-24);

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

// Where the normal distribution's upper tail is `share`, negated: by bisection.
inline double normal_quantile(double share) {
  double low = -6, high = 6;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < share ? low : high) = middle;
  }
  return low;
}

// The tensors of a block. The last column of x is 1, so that the last column of first_weights() is
// a bias, which sets how often each neuron is active.
template <class T>
struct FfnTensors {
  FfnProblem problem;
  std::vector<T> x, gate, up, down;

  FfnTensors(FfnKind kind, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons)
      : problem{kind, kDType<T>, tokens, hidden, neurons},
        random(static_cast<std::uint64_t>(tokens * 1000003 + hidden * 1009 + neurons)) {}

  FfnWeights weights() const {
    return {problem.kind == FfnKind::kGated ? gate.data() : nullptr, up.data(), down.data()};
  }
  std::vector<T>& first_weights() { return problem.kind == FfnKind::kGated ? gate : up; }
  void set_token_bias(std::int64_t t, double bias) {
    assign(x[(t + 1) * problem.hidden - 1], bias);
  }
  void set_neuron_bias(std::int64_t n, double bias) {
    assign(first_weights()[(n + 1) * problem.hidden - 1], bias);
  }

 protected:
  // `rows` rows of what `draw` returns.
  template <class Draw>
  void fill(std::vector<T>& v, std::int64_t rows, Draw&& draw) {
    v.resize(static_cast<std::size_t>(rows * problem.hidden));
    for (T& e : v) assign(e, draw());
  }

  std::mt19937_64 random;
};

// The plan of the sparse path, forced.
inline FfnPlan sparse_plan(const FfnProblem& problem, Device device, bool training) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  options.training = training;
  const auto plan = plan_ffn(problem, device, options);
  EXPECT_TRUE(plan.ok()) << plan.status().message();
  return plan.value();
}

}  // namespace twell
