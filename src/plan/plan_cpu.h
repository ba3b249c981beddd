#pragma once

#include "twell/ffn.h"

namespace twell::plan {

// plan_ffn for a CPU; the problem has been checked.
Result<FfnPlan> plan_cpu(const FfnProblem& problem, const Device& device,
                         const PlanOptions& options);

}  // namespace twell::plan
