#pragma once
// What the GPU tests share: device memory with guards, random blocks, a float64 oracle.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "twell/ffn.h"

namespace twell {

inline void require_cuda(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

// Skips, with the reason, where there is no GPU that the kernels run on.
class GpuTest : public ::testing::Test {
 protected:
  static constexpr int kEnoughForOneTurn = 16;  // multiprocessors, for the work of a small test

  void SetUp() override {
    Result<Device> found = cuda_device(0);
    if (!found.ok()) GTEST_SKIP() << found.status().message();
    if (found->compute_capability < 80) GTEST_SKIP() << "no kernel runs on " << found->to_string();
    devices = {found.value()};
    if (found.value().compute_capability / 10 == 9) {
      devices.push_back(found.value());
      devices.back().compute_capability = 80;
      if (found.value().multiprocessors > kEnoughForOneTurn) {
        devices.push_back(found.value());
        devices.back().multiprocessors = 2;
      }
    }
    require_cuda(cudaSetDevice(0));
  }

  // A Hopper GPU as one with fewer multiprocessors, of which it takes larger pieces of work.
  void make_hopper_with(int multiprocessors) {
    devices.resize(1);
    if (devices[0].compute_capability / 10 != 9) GTEST_SKIP() << "pieces vary on Hopper only";
    devices[0].multiprocessors = multiprocessors;
  }

  // The GPU; a Hopper GPU also as one of sm_80, whose kernels it runs too, from their PTX, and as a
  // pair of multiprocessors, whose CTAs have many pieces of work each.
  std::vector<Device> devices;
};

// Device memory, poisoned (0xFF: NaN in bf16 and float32), with a guard behind it.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
    require_cuda(cudaMalloc(&data_, bytes + kGuard));
    poison();
  }
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size() * sizeof(T)) {
    upload(values);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  void poison(cudaStream_t stream = nullptr) {
    require_cuda(cudaMemsetAsync(data_, 0xFF, bytes_ + kGuard, stream));
  }
  template <class T>
  void upload(const std::vector<T>& values) {
    require_cuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyDefault));
  }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <class T>
  std::vector<T> download() const {
    std::vector<T> values(bytes_ / sizeof(T));
    require_cuda(cudaMemcpy(values.data(), data_, bytes_, cudaMemcpyDefault));
    return values;
  }
  bool guard_intact() const {
    std::vector<unsigned char> guard(kGuard);
    require_cuda(cudaMemcpy(guard.data(), as<unsigned char>() + bytes_, kGuard, cudaMemcpyDefault));
    for (unsigned char byte : guard) {
      if (byte != 0xFF) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 4096;
  std::size_t bytes_;
  void* data_ = nullptr;
};

inline std::vector<double> transposed(const std::vector<double>& a, std::int64_t rows,
                                      std::int64_t columns) {
  std::vector<double> out(a.size());
#pragma omp parallel for
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = 0; r < rows; ++r) out[c * rows + r] = a[r * columns + c];
  }
  return out;
}

// out[rows, columns] = a[rows, inner] b[inner, columns] in float64. Zeros of `a`, which are most
// elements of a sparse one, are skipped where they cannot make a NaN.
inline std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b,
                                   std::int64_t rows, std::int64_t columns, std::int64_t inner) {
  std::vector<double> out(rows * columns);
  const bool finite = std::all_of(b.begin(), b.end(), [](double v) { return std::isfinite(v); });
  constexpr std::int64_t kRows = 8;  // that share the reads of b
#pragma omp parallel for
  for (std::int64_t first = 0; first < rows; first += kRows) {
    for (std::int64_t i = 0; i < inner; ++i) {
      const double* terms = b.data() + i * columns;
      for (std::int64_t r = first; r < std::min(first + kRows, rows); ++r) {
        const double factor = a[r * inner + i];
        if (factor == 0 && finite) continue;
        double* sums = out.data() + r * columns;
        for (std::int64_t c = 0; c < columns; ++c) sums[c] += factor * terms[c];
      }
    }
  }
  return out;
}

inline std::vector<double> widen(const std::vector<bf16>& values) {
  std::vector<double> out(values.size());
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = to_float(values[i]);
  return out;
}

// A block and its input, about `density` of whose gate values are positive: the first column of x
// and of the gate is a bias. Densities 0 and 1 are exact.
struct Block {
  FfnProblem problem;
  std::vector<bf16> x, gate, up, down;
  bool has_exact_sums = false;  // x Gᵀ and x Uᵀ in float32: see make_sums_exact

  Block(FfnKind kind, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
        double density, std::uint64_t seed = 1) {
    problem = {kind, DType::kBf16, tokens, hidden, neurons};
    std::mt19937_64 random(seed + static_cast<std::uint64_t>(tokens * 1009 + neurons));
    const auto fill = [&](std::vector<bf16>& out, std::int64_t rows, double scale) {
      std::normal_distribution<float> normal(0, static_cast<float>(scale));
      out.resize(rows * hidden);
      for (bf16& v : out) v = to_bf16(normal(random));
    };
    fill(x, tokens, 1);
    const double scale = 1 / std::sqrt(static_cast<double>(hidden));
    if (kind == FfnKind::kGated) fill(gate, neurons, scale);
    fill(up, neurons, scale);
    fill(down, neurons, 1 / std::sqrt(static_cast<double>(neurons)));
    constexpr float kBias = 8;
    for (std::int64_t t = 0; t < tokens; ++t) x[t * hidden] = to_bf16(kBias);
    double low = -20, high = 20;  // the standard normal quantile of `density`, by bisection
    for (int i = 0; i < 60; ++i) {
      const double middle = (low + high) / 2;
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < density ? low : high) = middle;
    }
    for (std::int64_t n = 0; n < neurons; ++n) set_bias(n, static_cast<float>(low / kBias));
  }

  bool gated() const { return problem.kind == FfnKind::kGated; }

  // Of all weights the ones that decide which neurons are active.
  std::vector<bf16>& deciding() { return gated() ? gate : up; }

  // The neuron is active for every token, or for none, as a `value` of some size is positive or
  // negative.
  void set_bias(std::int64_t neuron, float value) {
    deciding()[neuron * problem.hidden] = to_bf16(value);
  }

  // Elements become multiples of 1/16 (x) and of 1/64 (weights), so that float32 sums of their
  // products are exact, and the same neurons are active for every order of summation.
  void make_sums_exact() {
    snap(x, 16);
    for (std::vector<bf16>* weights : {&gate, &up, &down}) snap(*weights, 64);
    has_exact_sums = true;
  }

  // The gate's values: relu(x Gᵀ) rounded to bf16 (of U for a plain block).
  std::vector<double> gate_values() const {
    std::vector<double> g = of_neurons(gated() ? gate : up);
#pragma omp parallel for
    for (double& v : g) {
      v = to_float(to_bf16(static_cast<float>(std::isnan(v) || v > 0 ? v : 0)));
    }
    return g;
  }

  // (token, neuron) pairs.
  std::int64_t active_pairs() const {
    const std::vector<double> g = gate_values();
    return std::count_if(g.begin(), g.end(), [](double v) { return v > 0; });
  }

  // From the gate's values.
  std::vector<double> hidden_values(const std::vector<double>& g) const {
    std::vector<double> h = g;
    if (gated()) {
      const std::vector<double> u = of_neurons(up);
      for (std::size_t i = 0; i < h.size(); ++i) h[i] *= u[i];
    }
    return h;
  }

  // From the hidden values.
  std::vector<double> output(const std::vector<double>& h) const {
    return product(h, widen(down), problem.tokens, problem.hidden, problem.neurons);
  }

  std::vector<double> output() const { return output(hidden_values(gate_values())); }

 protected:
  static void snap(std::vector<bf16>& values, float steps) {
    const float most = 255 / steps;  // eight bits
    for (bf16& v : values) {
      v = to_bf16(std::clamp(std::round(to_float(v) * steps) / steps, -most, most));
    }
  }

 private:
  // x Wᵀ
  std::vector<double> of_neurons(const std::vector<bf16>& weights) const {
    const auto [kind, dtype, tokens, hidden, neurons] = problem;
    return product(widen(x), transposed(widen(weights), neurons, hidden), tokens, neurons, hidden);
  }
};

}  // namespace twell
