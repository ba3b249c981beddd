#include <cstdio>
#include <limits>
#include <string>

#include "plan/plan_cpu.h"
#include "plan/plan_cuda.h"
#include "twell/ffn.h"

namespace twell {
namespace {

Status check_problem(const FfnProblem& problem) {
  const auto refuse = [](const char* name, std::int64_t value, const char* permitted) {
    return Status(StatusCode::kUnsupported, "plan_ffn: " + std::string(name) + " is " +
                                                std::to_string(value) +
                                                "; permitted: " + permitted);
  };
  constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  constexpr std::int64_t kMaxHidden = 1 << 20;
  if (problem.tokens < 0 || problem.tokens > kMaxTokens) {
    return refuse("tokens", problem.tokens, "0 to 2147483647");
  }
  if (problem.hidden <= 0 || problem.hidden % 8 != 0 || problem.hidden > kMaxHidden) {
    return refuse("hidden", problem.hidden, "a positive multiple of 8, at most 1048576");
  }
  if (problem.neurons <= 0 || problem.neurons % 8 != 0 || problem.neurons > 65536) {
    return refuse("neurons", problem.neurons, "a positive multiple of 8, at most 65536");
  }
  return {};
}

std::string megabytes(std::size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
}

std::string milliseconds(double ms) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f ms", ms);
  return text;
}

}  // namespace

Result<FfnPlan> plan_ffn(const FfnProblem& problem, const Device& device,
                         const PlanOptions& options) {
  if (Status status = check_problem(problem); !status.ok()) return status;
  if (device.type == DeviceType::kCpu) return plan::plan_cpu(problem, device, options);
  return plan::plan_cuda(problem, device, options);
}

std::string FfnPlan::to_string() const {
  std::string text =
      std::string(name_of(problem.kind)) + " FFN, " + name_of(problem.dtype) + ", tokens " +
      std::to_string(problem.tokens) + ", hidden " + std::to_string(problem.hidden) + ", neurons " +
      std::to_string(problem.neurons) + (training ? ", training" : "") + "\n" +
      "device: " + device.to_string() + "\n" + "path: " + name_of(path) + " (predicted: dense " +
      milliseconds(predicted_dense_ms) + ", sparse " + milliseconds(predicted_sparse_ms) + ")\n";
  if (path == FfnPath::kDense) return text;
  text += "tiles of " + std::to_string(tile_tokens) + " tokens in chunks of " +
          std::to_string(chunk_tokens) + ", blocks of " + std::to_string(block_neurons) +
          " neurons, dense product from " + std::to_string(heavy_tokens) + " active tokens\n" +
          "memory: workspace " + megabytes(workspace_bytes);
  if (training) {
    text += ", backward workspace " + megabytes(backward_workspace_bytes) + ", saved at most " +
            megabytes(saved_bytes);
  }
  return text + "\n";
}

}  // namespace twell
