#include <charconv>
#include <optional>
#include <sstream>
#include <string_view>

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

// The whole of `text` as a number that is not negative.
std::optional<int> number(std::string_view text) {
  int value = -1;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || rest != end || value < 0) return std::nullopt;
  return value;
}

// sm_90x132 is a GPU of compute capability 9.0 with 132 multiprocessors.
std::optional<Device> described_gpu(std::string_view text) {
  const std::string_view prefix = "sm_";
  const std::size_t cross = text.find('x');
  if (!text.starts_with(prefix) || cross == text.npos) return std::nullopt;
  const auto capability = number(text.substr(prefix.size(), cross - prefix.size()));
  const auto multiprocessors = number(text.substr(cross + 1));
  if (!capability || !multiprocessors || *multiprocessors == 0) return std::nullopt;
  Device device;
  device.type = twell::DeviceType::kCuda;
  device.compute_capability = *capability;
  device.multiprocessors = *multiprocessors;
  return device;
}

Device require_device(const std::string& device) {
  using torch::headeronly::DeviceType;
  if (device == "cpu") return describe(torch::stable::Device(DeviceType::CPU));
  if (device == "cuda") return describe(torch::stable::Device(DeviceType::CUDA));
  const std::string_view prefix = "cuda:", text = device;
  if (text.starts_with(prefix)) {
    if (const auto ordinal = number(text.substr(prefix.size()))) {
      return describe(torch::stable::Device(DeviceType::CUDA, *ordinal));
    }
  }
  if (const auto gpu = described_gpu(text)) return *gpu;
  refuse("device", "is '" + device + "'; it must be cpu, cuda, cuda:N or like sm_90x132");
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
  return to_json(require(plan_ffn(problem, require_device(device), options)));
}

}  // namespace twell::ops
