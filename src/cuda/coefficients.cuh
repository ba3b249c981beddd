#pragma once
// What the gradients are made of, for one neuron and two tokens, as columns hold them.

#include <cstdint>

#include "cuda/ptx/convert.cuh"

namespace twell::cuda {

struct Coefficients {
  std::uint32_t dg, du, h;

  // From g and u in bf16, pairs too (a plain block has no u), and the sums dy Dᵀ of both tokens.
  // Where g is 0, so is dg, even if dh or u is no number.
  template <bool kGated>
  __device__ __forceinline__ static Coefficients make(std::uint32_t g, std::uint32_t u,
                                                      float sum_low, float sum_high,
                                                      float grad_l1) {
    const float g_low = ptx::low_half(g), g_high = ptx::high_half(g);
    const float u_low = kGated ? ptx::low_half(u) : 1;
    const float u_high = kGated ? ptx::high_half(u) : 1;
    Coefficients out;
    out.h = kGated ? ptx::pack(g_low * u_low, g_high * u_high) : g;
    const float dh_low = sum_low + grad_l1 * sign(ptx::low_half(out.h));
    const float dh_high = sum_high + grad_l1 * sign(ptx::high_half(out.h));
    out.dg = ptx::pack(g_low <= 0 ? 0 : dh_low * u_low, g_high <= 0 ? 0 : dh_high * u_high);
    out.du = ptx::pack(dh_low * g_low, dh_high * g_high);
    return out;
  }

 private:
  __device__ static __forceinline__ float sign(float value) { return (value > 0) - (value < 0); }
};

}  // namespace twell::cuda
