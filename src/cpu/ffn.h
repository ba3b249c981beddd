#pragma once
// The CPU side of twell/ffn.h. Arguments have been validated.

#include <cstddef>
#include <cstdint>

#include "twell/ffn.h"

namespace twell::cpu {

// Up to this many tokens the products are bound by reading the weights: rows are multiplied by
// the tokens directly, and no panel is packed.
inline constexpr std::int64_t kMaxDotTokens = 8;

// Calls visit.template operator()<T>() with the C++ type of `dtype`.
template <class Visit>
decltype(auto) with_type(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit.template operator()<float>();
    case DType::kFloat64:
      return visit.template operator()<double>();
    case DType::kBf16:
      break;
  }
  return visit.template operator()<bf16>();
}

std::size_t forward_workspace_bytes(const FfnPlan& plan);
std::size_t backward_workspace_bytes(const FfnPlan& plan);  // plan.training only
std::size_t saved_bytes(const FfnPlan& plan);               // plan.training only

Status forward(const FfnPlan& plan, const FfnForwardArgs& args);
Status backward(const FfnPlan& plan, const FfnBackwardArgs& args);

}  // namespace twell::cpu
