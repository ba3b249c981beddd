#pragma once
// What the planners of all devices share: how a path is chosen from predicted times.

#include "twell/ffn.h"

namespace twell::plan {

struct Prediction {
  double dense_ms;
  double sparse_ms;
};

// A plan with its path and predictions, but without the sizes of the sparse path. FfnPath::kAuto
// becomes dense if `dense_is_better`.
inline FfnPlan choose_path(const FfnProblem& problem, const Device& device,
                           const PlanOptions& options, const Prediction& prediction,
                           bool dense_is_better) {
  FfnPlan plan;
  plan.problem = problem;
  plan.device = device;
  plan.training = options.training;
  plan.predicted_dense_ms = prediction.dense_ms;
  plan.predicted_sparse_ms = prediction.sparse_ms;
  plan.path = options.path;
  if (plan.path == FfnPath::kAuto) {
    plan.path = dense_is_better ? FfnPath::kDense : FfnPath::kSparse;
  }
  return plan;
}

}  // namespace twell::plan
