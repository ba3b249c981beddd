#include "plan/plan_cuda.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/layout.h"

namespace twell::plan {
namespace {

// Tokens whose intermediates are alive at once: enough that the last wave of each kernel costs
// little, small enough that the address space stays bounded.
constexpr std::int64_t kMaxChunkTiles = 256;

constexpr double kUnknownActive = 0.02;  // share of the neurons assumed active without an estimate

// Speeds of one Hopper multiprocessor, measured on an H200 (132 of them).
struct Rates {
  double dense_tflops = 5.2;  // PyTorch's products
  double gate_tflops = 5.2;   // the gate projection with its epilogue
  double union_tflops = 4.5;  // up and down over unions
};

double milliseconds(double flops, double tflops) { return flops / tflops * 1e-9; }

struct Prediction {
  double dense_ms;
  double sparse_ms;
};

Prediction predict(const FfnProblem& problem, const Device& device, const PlanOptions& options) {
  const Rates rates;
  const double neurons = static_cast<double>(problem.neurons);
  const double product = 2.0 * static_cast<double>(problem.tokens) *
                         static_cast<double>(problem.hidden) * neurons;  // FLOPs
  const double sms = device.multiprocessors;
  const double products = problem.kind == FfnKind::kGated ? 2 : 1;  // besides the gate's
  const double active = std::min(
      options.expected_active >= 0 ? options.expected_active : kUnknownActive * neurons, neurons);
  const double independent = neurons * (1 - std::pow(1 - active / neurons, cuda::kTileTokens));
  const double in_union =
      std::min(options.expected_union >= 0 ? options.expected_union : independent, neurons);
  return {milliseconds((1 + products) * product, rates.dense_tflops * sms),
          milliseconds(product, rates.gate_tflops * sms) +
              milliseconds(products * product * in_union / neurons, rates.union_tflops * sms)};
}

}  // namespace

Result<FfnPlan> plan_cuda(const FfnProblem& problem, const Device& device,
                          const PlanOptions& options) {
  const auto refuse = [](const std::string& what, const std::string& permitted) {
    return Status(StatusCode::kUnsupported, "plan_ffn: " + what + "; permitted: " + permitted);
  };
  FfnPlan plan;
  plan.problem = problem;
  plan.device = device;
  plan.training = options.training;
  const Prediction prediction = predict(problem, device, options);
  plan.predicted_dense_ms = prediction.dense_ms;
  plan.predicted_sparse_ms = prediction.sparse_ms;
  plan.path = options.path;
  if (plan.path == FfnPath::kAuto) {
    const bool known = options.expected_active >= 0 || options.expected_union >= 0;
    plan.path =
        known && prediction.dense_ms < prediction.sparse_ms ? FfnPath::kDense : FfnPath::kSparse;
  }
  if (plan.path == FfnPath::kDense) return plan;

  if (device.compute_capability / 10 != 9) {
    return refuse("device.compute_capability is " + std::to_string(device.compute_capability),
                  "90 (Hopper) for the sparse path; the dense path runs everywhere");
  }
  if (problem.dtype != DType::kBf16) {
    return refuse("dtype is " + std::string(name_of(problem.dtype)), "bfloat16 on a CUDA device");
  }
  if (options.training) {
    return refuse("training is true", "false on a CUDA device, which has no sparse backward");
  }

  const std::int64_t tiles = cuda::ceil_div<std::int64_t>(problem.tokens, cuda::kTileTokens);
  const std::int64_t chunks = std::max<std::int64_t>(1, cuda::ceil_div(tiles, kMaxChunkTiles));
  plan.tile_tokens = cuda::kTileTokens;
  plan.chunk_tokens = std::max<std::int64_t>(1, cuda::ceil_div(tiles, chunks)) * cuda::kTileTokens;
  plan.block_neurons = cuda::kBlockNeurons;
  plan.heavy_tokens = 1;  // every neuron of a union takes part in the dense product
  plan.workspace_bytes = cuda::ForwardLayout(plan).bytes;
  return plan;
}

}  // namespace twell::plan
