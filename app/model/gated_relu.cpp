#include "app/model/gated_relu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "twell/types.h"

namespace twell::app {
namespace {

using torch::Tensor;

// The loops below are plain so that the compiler vectorises them, once for each of these.
#if defined(__x86_64__)
#define TWELL_VECTOR_CLONES [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define TWELL_VECTOR_CLONES
#endif

constexpr int kLanes = 32;  // partial sums of a row: the order of addition is part of the result

float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Round to nearest even; a NaN stays a NaN.
uint16_t narrow(float value) {
  const auto u = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// One row: h = relu(g) u, activity += (g > 0). Returns Σ |h|.
TWELL_VECTOR_CLONES
float forward_row(int64_t n, const uint16_t* g, const uint16_t* u, uint16_t* h, int32_t* activity) {
  float lanes[kLanes] = {};
  const auto one = [&](int64_t i, int lane) {
    const float gate = widen(g[i]);
    const bool active = !(gate <= 0);
    const uint16_t value = narrow((active ? gate : 0.0f) * widen(u[i]));  // 0 · inf is NaN
    h[i] = value;
    activity[i] += active;
    lanes[lane] += std::fabs(widen(value));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) one(i + lane, lane);
  }
  for (int lane = 0; i < n; ++i, ++lane) one(i, lane);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// One row of the gradients: s = dL/dh + grad_l1 sign(h), dg = s u, du = s g where g > 0, else 0.
TWELL_VECTOR_CLONES
void backward_row(int64_t n, float grad_l1, const uint16_t* grad_h, const uint16_t* g,
                  const uint16_t* u, uint16_t* grad_g, uint16_t* grad_u) {
  for (int64_t i = 0; i < n; ++i) {
    const float gate = widen(g[i]);
    const float up = widen(u[i]);
    const float sign = up > 0 ? grad_l1 : up < 0 ? -grad_l1 : 0.0f;
    const float s = widen(grad_h[i]) + sign;
    const bool active = !(gate <= 0);
    grad_g[i] = active ? narrow(s * up) : uint16_t{0};
    grad_u[i] = narrow(s * (active ? gate : 0.0f));
  }
}

bool has_fast_path(const Tensor& t) {
  return t.device().is_cpu() && t.scalar_type() == torch::kBFloat16;
}

const uint16_t* bits(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* mutable_bits(Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

}  // namespace

Tensor gate_product(const Tensor& x, const Tensor& gate) {
  if (has_fast_path(x)) return torch::mm(x, gate.t());
  // The product with a relu in its epilogue is that with a bias.
  return torch::_addmm_activation(torch::zeros({gate.size(0)}, x.options()), x, gate.t());
}

GatedRelu gated_relu(const Tensor& gate, const Tensor& up, FfnCounts counts, bool keep_gate) {
  const int64_t tokens = gate.size(0);
  const int64_t neurons = gate.size(1);
  if (!has_fast_path(gate)) {
    const auto wide = gate.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    GatedRelu out;
    if (counts == FfnCounts::kAll) {
      // How many are not 0, counted in one pass; exact up to 2^24 tokens.
      const Tensor active = torch::linalg_vector_norm(gate, 0, at::IntArrayRef{0}, false, wide);
      out.activity = active.to(torch::kInt32);
      out.l0 = out.activity.sum(torch::kInt64);
    }
    out.h = keep_gate ? gate * up : gate.mul_(up);
    if (counts != FfnCounts::kNone) {
      out.l1 = torch::linalg_vector_norm(out.h, 1, std::nullopt, false, wide);
    }
    return out;
  }
  GatedRelu out;  // here all counts are made on the way
  out.h = torch::empty_like(gate);
  uint16_t* const h = mutable_bits(out.h);
  const uint16_t* const g = bits(gate);
  const uint16_t* const u = bits(up);
  std::vector<float> row_l1(static_cast<size_t>(tokens));
  // Each part of the rows counts for itself; integers, so the split does not matter.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tokens));
  Tensor sums = torch::zeros({parts, neurons}, torch::kInt32);
  int32_t* const count = sums.mutable_data_ptr<int32_t>();
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      for (int64_t row = tokens * part / parts; row < tokens * (part + 1) / parts; ++row) {
        const int64_t at = row * neurons;
        row_l1[static_cast<size_t>(row)] =
            forward_row(neurons, g + at, u + at, h + at, count + part * neurons);
      }
    }
  });
  double l1 = 0;
  for (const float row : row_l1) l1 += row;
  out.l1 = torch::scalar_tensor(l1, torch::kFloat32);
  out.activity = parts == 1 ? sums.view({neurons}) : sums.sum(0, false, torch::kInt32);
  out.l0 = out.activity.sum(torch::kInt64);
  return out;
}

GatedReluGradients gated_relu_backward(const Tensor& grad_h, const Tensor& grad_l1,
                                       const Tensor& gate, const Tensor& up) {
  const int64_t neurons = gate.size(1);
  if (!has_fast_path(gate)) {
    Tensor s = grad_h;
    if (grad_l1.defined()) {
      const Tensor sign = up.sign();
      // By a scalar on the device, without the slow kernels of broadcasting.
      torch::_foreach_mul_({sign}, grad_l1.to(sign.scalar_type()));
      s = sign.add_(grad_h);
    }
    return {torch::threshold_backward(s * up, gate, 0), gate * s};
  }
  GatedReluGradients out{torch::empty_like(gate), torch::empty_like(up)};
  uint16_t* const grad_g = mutable_bits(out.gate);
  uint16_t* const grad_u = mutable_bits(out.up);
  const uint16_t* const s = bits(grad_h);
  const uint16_t* const g = bits(gate);
  const uint16_t* const u = bits(up);
  const float l1 = grad_l1.defined() ? *grad_l1.to(torch::kFloat32).const_data_ptr<float>() : 0.0f;
  at::parallel_for(0, gate.size(0), 16, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * neurons;
      backward_row(neurons, l1, s + at, g + at, u + at, grad_g + at, grad_u + at);
    }
  });
  return out;
}

}  // namespace twell::app
