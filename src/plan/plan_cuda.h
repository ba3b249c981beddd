#pragma once

#include "twell/ffn.h"

namespace twell::plan {

// plan_ffn for a CUDA device; the problem has been checked.
Result<FfnPlan> plan_cuda(const FfnProblem& problem, const Device& device,
                          const PlanOptions& options);

}  // namespace twell::plan
