#pragma once
// The operators of the library `twell`; library.cpp registers them. Each checks its arguments,
// plans, allocates and calls the core. CPU and CUDA tensors take the same code.

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace twell::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The sparse block of twell/ffn.h for x [M, K], gate (none: a plain block), up and down [N, K],
// of one dtype: BFloat16, Float or Double. Returns y [M, K], l0 int64 [], l1 Float (Double for
// Double inputs) [], activity int32 [N], each empty unless `count`, and saved uint8 for
// ffn_backward (empty unless `save`).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ffn_forward(const Tensor& x,
                                                               const std::optional<Tensor>& gate,
                                                               const Tensor& up, const Tensor& down,
                                                               bool save, bool count);

// Gradients with respect to x, gate (empty for a plain block), up and down, given those of y and,
// optionally, of l1.
std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_l1, const Tensor& x,
    const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down, const Tensor& saved);

// The same, but the gradients of the weights are added to grad_gate, grad_up and grad_down
// [N, K], of x's dtype, with one rounding; none: not wanted. Returns that of x. Autograd does not
// note the change: the three are part of no graph.
Tensor ffn_backward_accumulate(const Tensor& grad_y, const std::optional<Tensor>& grad_l1,
                               const Tensor& x, const std::optional<Tensor>& gate, const Tensor& up,
                               const Tensor& down, const Tensor& saved,
                               const std::optional<Tensor>& grad_gate,
                               const std::optional<Tensor>& grad_up,
                               const std::optional<Tensor>& grad_down);

// The plan of twell/ffn.h as a JSON object. kind: gated or plain; path: auto, dense or twell (as
// the plan's own); expected_active and expected_union: negative if unknown; device: cpu, cuda,
// cuda:N, or sm_90x132 for a GPU that is not there: 132 multiprocessors of compute capability 9.0.
std::string ffn_plan(const std::string& kind, ScalarType dtype, std::int64_t tokens,
                     std::int64_t hidden, std::int64_t neurons, const std::string& path,
                     bool training, double expected_active, double expected_union,
                     const std::string& device);

// words int32 [M, ceil(N / 256), slots] = TwELL(relu(x gateᵀ)) for bf16 x [M, K] and gate [N, K],
// in the format of twell/format.h, and the number of tile rows that overflowed, int64 [].
std::tuple<Tensor, Tensor> gate_pack(const Tensor& x, const Tensor& gate, std::int64_t slots);

// values [M, N] bf16 → words and overflow, as of gate_pack; and back. On the CPU only.
std::tuple<Tensor, Tensor> twell_encode(const Tensor& values, std::int64_t slots);
Tensor twell_decode(const Tensor& words, std::int64_t columns);

}  // namespace twell::ops
