#pragma once
// The CUDA side of twell/ffn.h. Arguments have been validated.

#include "twell/ffn.h"

namespace twell::cuda {

Status forward(const FfnPlan& plan, const FfnForwardArgs& args);
Status backward(const FfnPlan& plan, const FfnBackwardArgs& args);

}  // namespace twell::cuda
