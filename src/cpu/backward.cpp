#include "cpu/ffn.h"

namespace twell::cpu {

std::size_t backward_workspace_bytes(const FfnPlan&) { return 0; }

Status backward(const FfnPlan&, const FfnBackwardArgs&) {
  return {StatusCode::kUnsupported, "ffn_backward: not offered on the CPU"};
}

}  // namespace twell::cpu
