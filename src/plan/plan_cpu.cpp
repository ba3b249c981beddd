#include "plan/plan_cpu.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/ffn.h"
#include "cpu/kernels.h"
#include "plan/choice.h"

namespace twell::plan {
namespace {

// Speeds of one thread, in GFLOP/s. Measured: see docs/kernels/cpu_ffn.md.
struct Rates {
  double product;    // our dense product
  double heavy;      // the same over the gathered rows of a union
  double dense;      // PyTorch's, which the dense path would use
  double light;      // row by row: dots and weighted sums
  int heavy_tokens;  // of 128: where the dense product overtakes row by row
};

Rates rates(DType dtype, CpuIsa isa) {
  if (dtype == DType::kBf16) {
    switch (isa) {
      case CpuIsa::kAmxBf16:
        return {1000, 650, 800, 30, 12};
      case CpuIsa::kAvx512Bf16:
        return {480, 380, 310, 38, 32};
      case CpuIsa::kAvx2:
        return {80, 60, 28, 30, 48};
      case CpuIsa::kPortable:
        return {37, 30, 10, 15, 64};
    }
  }
  const double scale = dtype == DType::kFloat32 ? 1 : 0.5;
  switch (isa) {
    case CpuIsa::kAmxBf16:
    case CpuIsa::kAvx512Bf16:
      return {100 * scale, 90 * scale, 100 * scale, 20 * scale, 32};
    case CpuIsa::kAvx2:
      return {50 * scale, 45 * scale, 60 * scale, 15 * scale, 48};
    case CpuIsa::kPortable:
      break;
  }
  return {12 * scale, 12 * scale, 60 * scale, 6 * scale, 64};
}

constexpr double kReadGbPerSecond = 20;       // of one thread, from memory
constexpr double kDenseReadGbPerSecond = 11;  // likewise, PyTorch's matrix-vector product
constexpr double kMostReaders = 8;            // threads beyond which reading gets no faster

constexpr std::int64_t kTileTokens = 128;
constexpr std::int64_t kChunkTokens = 512;
constexpr int kBlockNeurons = 128;
constexpr int kDotBlockNeurons = 64;
constexpr double kUnknownActive = 0.02;  // share of the neurons assumed active without an estimate

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

Prediction predict(const FfnProblem& problem, const Device& device, const PlanOptions& options) {
  const Rates rate = rates(problem.dtype, device.isa);
  const double tokens = static_cast<double>(problem.tokens);
  const double hidden = static_cast<double>(problem.hidden);
  const double neurons = static_cast<double>(problem.neurons);
  const double active = std::min(
      options.expected_active >= 0 ? options.expected_active : kUnknownActive * neurons, neurons);
  const double tile = std::min(tokens, static_cast<double>(kTileTokens));
  const double independent = neurons * (1 - std::pow(1 - active / neurons, tile));
  const double in_union =
      std::min(options.expected_union >= 0 ? options.expected_union : independent, neurons);

  const double threads = device.threads;
  const double matrix_bytes = neurons * hidden * static_cast<double>(size_of(problem.dtype));
  const double readers = std::min(threads, kMostReaders);
  const double read_ms = tokens > 0 ? 1e-6 * matrix_bytes / (kReadGbPerSecond * readers) : 0;
  const double dense_read_ms =
      tokens > 0 ? 1e-6 * matrix_bytes / (kDenseReadGbPerSecond * readers) : 0;
  const double flop_ms = 1e-6 / threads;
  const double gate_flop = 2 * tokens * hidden * neurons;
  const double products = problem.kind == FfnKind::kGated ? 2 : 1;  // besides the gate's

  Prediction out;
  out.dense_ms = (1 + products) * std::max(gate_flop * flop_ms / rate.dense, dense_read_ms);
  const double gate_ms = std::max(gate_flop * flop_ms / rate.product, read_ms);
  const double light_ms = 2 * tokens * active * hidden * flop_ms / rate.light;
  const double heavy_ms = 2 * tokens * in_union * hidden * flop_ms / rate.heavy;
  const double rows_ms = in_union / neurons * read_ms;
  out.sparse_ms = gate_ms + products * std::max(std::min(light_ms, heavy_ms), rows_ms);
  return out;
}

}  // namespace

Result<FfnPlan> plan_cpu(const FfnProblem& problem, const Device& device,
                         const PlanOptions& options) {
  if (device.threads < 1) {
    return Status(
        StatusCode::kInvalidArgument,
        "plan_ffn: device.threads is " + std::to_string(device.threads) + "; permitted: 1 or more");
  }
  const Prediction prediction = predict(problem, device, options);
  const bool known = options.expected_active >= 0;
  FfnPlan plan = choose_path(problem, device, options, prediction,
                             known && prediction.dense_ms < prediction.sparse_ms);
  if (plan.path == FfnPath::kDense) return plan;

  // None of this may depend on the number of threads: the order of every sum follows from it.
  if (problem.tokens <= cpu::kMaxDotTokens) {
    plan.tile_tokens = cpu::kMaxDotTokens;
    plan.chunk_tokens = cpu::kMaxDotTokens;
    plan.block_neurons = kDotBlockNeurons;
    plan.heavy_tokens = plan.tile_tokens + 1;  // never
  } else {
    const std::int64_t chunks = (problem.tokens + kChunkTokens - 1) / kChunkTokens;
    const std::int64_t even_chunk = (problem.tokens + chunks - 1) / chunks;
    plan.tile_tokens =
        static_cast<int>(std::min(kTileTokens, round_up(even_chunk, cpu::kPanelColumns)));
    plan.chunk_tokens = round_up(even_chunk, plan.tile_tokens);
    plan.block_neurons = kBlockNeurons;
    plan.heavy_tokens = std::max<int>(
        2, rates(problem.dtype, device.isa).heavy_tokens * plan.tile_tokens / kTileTokens);
  }
  plan.workspace_bytes = cpu::forward_workspace_bytes(plan);
  if (plan.training) {
    plan.saved_bytes = cpu::saved_bytes(plan);
    plan.backward_workspace_bytes = cpu::backward_workspace_bytes(plan);
  }
  return plan;
}

}  // namespace twell::plan
