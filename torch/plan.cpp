#include <charconv>
#include <sstream>

#include "check.h"
#include "device.h"
#include "operators.h"
#include "twell/ffn.h"

namespace twell::ops {
namespace {

FfnKind require_kind(const std::string& kind) {
  if (kind == "gated") return FfnKind::kGated;
  if (kind == "plain") return FfnKind::kPlain;
  refuse("kind", "is '" + kind + "'; it must be gated or plain");
}

FfnPath require_path(const std::string& path) {
  if (path == "auto") return FfnPath::kAuto;
  if (path == "dense") return FfnPath::kDense;
  if (path == "twell") return FfnPath::kSparse;
  refuse("path", "is '" + path + "'; it must be auto, dense or twell");
}

torch::stable::Device require_device(const std::string& device) {
  using torch::headeronly::DeviceType;
  if (device == "cpu") return torch::stable::Device(DeviceType::CPU);
  if (device == "cuda") return torch::stable::Device(DeviceType::CUDA);
  const std::string prefix = "cuda:";
  int ordinal = -1;
  if (device.starts_with(prefix)) {
    const char* end = device.data() + device.size();
    const auto [rest, error] = std::from_chars(device.data() + prefix.size(), end, ordinal);
    if (error == std::errc() && rest == end && ordinal >= 0) {
      return torch::stable::Device(DeviceType::CUDA, ordinal);
    }
  }
  refuse("device", "is '" + device + "'; it must be cpu, cuda or cuda:N");
}

std::string to_json(const FfnPlan& plan) {
  const FfnProblem& problem = plan.problem;
  std::ostringstream json;
  json << "{\"kind\": \"" << name_of(problem.kind) << "\", \"dtype\": \"" << name_of(problem.dtype)
       << "\", \"tokens\": " << problem.tokens << ", \"hidden\": " << problem.hidden
       << ", \"neurons\": " << problem.neurons << ", \"device\": \"" << plan.device.to_string()
       << "\", \"path\": \"" << (plan.path == FfnPath::kDense ? "dense" : "twell")
       << "\", \"training\": " << (plan.training ? "true" : "false")
       << ", \"tile_tokens\": " << plan.tile_tokens << ", \"chunk_tokens\": " << plan.chunk_tokens
       << ", \"block_neurons\": " << plan.block_neurons
       << ", \"heavy_tokens\": " << plan.heavy_tokens
       << ", \"workspace_bytes\": " << plan.workspace_bytes
       << ", \"backward_workspace_bytes\": " << plan.backward_workspace_bytes
       << ", \"saved_bytes\": " << plan.saved_bytes
       << ", \"predicted_dense_ms\": " << plan.predicted_dense_ms
       << ", \"predicted_sparse_ms\": " << plan.predicted_sparse_ms << "}";
  return json.str();
}

}  // namespace

std::string ffn_plan(const std::string& kind, ScalarType dtype, std::int64_t tokens,
                     std::int64_t hidden, std::int64_t neurons, const std::string& path,
                     bool training, double expected_active, double expected_union,
                     const std::string& device) {
  const FfnProblem problem{require_kind(kind), require_core_dtype("the block", dtype), tokens,
                           hidden, neurons};
  const PlanOptions options{require_path(path), training, expected_active, expected_union};
  return to_json(require(plan_ffn(problem, describe(require_device(device)), options)));
}

}  // namespace twell::ops
