#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace {

STABLE_TORCH_LIBRARY(twell, library) {
  library.def(
      "ffn_forward(Tensor x, Tensor? gate, Tensor up, Tensor down, bool save, bool count=True) -> "
      "(Tensor y, Tensor l0, Tensor l1, Tensor activity, Tensor saved)");
  library.def(
      "ffn_backward(Tensor grad_y, Tensor? grad_l1, Tensor x, Tensor? gate, Tensor up, "
      "Tensor down, Tensor saved) -> "
      "(Tensor grad_x, Tensor grad_gate, Tensor grad_up, Tensor grad_down)");
  library.def(
      "ffn_backward_accumulate(Tensor grad_y, Tensor? grad_l1, Tensor x, Tensor? gate, Tensor up, "
      "Tensor down, Tensor saved, Tensor(a!)? grad_gate, Tensor(b!)? grad_up, "
      "Tensor(c!)? grad_down) -> Tensor grad_x");
  library.def(
      "ffn_plan(str kind, ScalarType dtype, int tokens, int hidden, int neurons, str path, "
      "bool training, float expected_active, float expected_union, str device) -> str");
  library.def("gate_pack(Tensor x, Tensor gate, int slots) -> (Tensor words, Tensor overflow)");
  library.def("twell_encode(Tensor values, int slots) -> (Tensor words, Tensor overflow)");
  library.def("twell_decode(Tensor words, int columns) -> Tensor");
}

void implement_on_any_device(torch::stable::detail::StableLibrary& library) {
  library.impl("ffn_forward", TORCH_BOX(&twell::ops::ffn_forward));
  library.impl("ffn_backward", TORCH_BOX(&twell::ops::ffn_backward));
  library.impl("ffn_backward_accumulate", TORCH_BOX(&twell::ops::ffn_backward_accumulate));
  library.impl("gate_pack", TORCH_BOX(&twell::ops::gate_pack));
}

STABLE_TORCH_LIBRARY_IMPL(twell, CPU, library) {
  implement_on_any_device(library);
  library.impl("twell_encode", TORCH_BOX(&twell::ops::twell_encode));
  library.impl("twell_decode", TORCH_BOX(&twell::ops::twell_decode));
}

STABLE_TORCH_LIBRARY_IMPL(twell, CUDA, library) { implement_on_any_device(library); }

STABLE_TORCH_LIBRARY_IMPL(twell, CompositeExplicitAutograd, library) {
  library.impl("ffn_plan", TORCH_BOX(&twell::ops::ffn_plan));
}

}  // namespace
