#include "plan/plan_cpu.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/ffn.h"
#include "cpu/kernels.h"
#include "plan/choice.h"

namespace twell::plan {
namespace {

// The cost model. Every product costs its FLOPs, the bytes it brings in from memory and, where they
// count, its elements; costs add up, since they overlap little. What differs between instruction
// sets is in Rates, the rest in constants; docs/kernels/cpu_ffn.md says how they were measured.

// Speeds of one thread, in GFLOP/s; `read` in GB/s.
struct Rates {
  double product;    // our dense product
  double heavy;      // the same over the gathered rows of a union
  double dense;      // PyTorch's product
  double light;      // row by row: dots and weighted sums
  double read;       // weights from memory to our dense product (AMX's copies them first)
  int heavy_tokens;  // of 128: where the dense product overtakes row by row
};

Rates rates(DType dtype, CpuIsa isa) {
  if (dtype == DType::kBf16) {
    switch (isa) {
      case CpuIsa::kAmxBf16:
        return {1000, 650, 900, 100, 12, 12};
      case CpuIsa::kAvx512Bf16:
        return {205, 190, 217, 62, 16, 32};
      case CpuIsa::kAvx2:
        return {62, 52, 23, 45, 16, 48};
      case CpuIsa::kPortable:
        return {24, 30, 8, 24, 16, 64};
    }
  }
  const double scale = dtype == DType::kFloat32 ? 1 : 0.5;
  switch (isa) {
    case CpuIsa::kAmxBf16:
    case CpuIsa::kAvx512Bf16:
      return {90 * scale, 52 * scale, 100 * scale, 50 * scale, 16, 32};
    case CpuIsa::kAvx2:
      return {50 * scale, 45 * scale, 60 * scale, 15 * scale, 16, 48};
    case CpuIsa::kPortable:
      break;
  }
  return {12 * scale, 12 * scale, 60 * scale, 6 * scale, 16, 64};
}

// Of one thread. Weights come from memory; rows of weights that a tile gathers, mostly from cache.
constexpr double kDotsReadGbPerSecond = 20;     // our dots of few tokens
constexpr double kDenseReadGbPerSecond = 10.5;  // PyTorch's products
constexpr double kRowGbPerSecond = 9;
constexpr double kMostReaders = 8;  // threads beyond which memory gets no faster

// Gradients of weights: new memory in every step, which the system clears page by page.
constexpr double kWriteGbPerSecond = 2.2;

constexpr double kProductCallMs = 0.042;  // to start one of PyTorch's products
constexpr double kBlockCallMs = 0.1;      // to start twell's operator
constexpr double kElementwiseNs = 0.5;    // PyTorch's passes over an element of [tokens, neurons]
constexpr double kPackNs = 0.9;           // to compare and pack such an element
constexpr double kPairNs = 3.7;           // to find an active (token, neuron) pair
constexpr double kCoefficientNs = 1.8;    // per heavy element of the backward

constexpr std::int64_t kTileTokens = 128;
constexpr std::int64_t kChunkTokens = 512;
constexpr int kBlockNeurons = 128;
constexpr int kDotBlockNeurons = 64;
constexpr double kUnknownActive = 0.02;  // share of the neurons assumed active without an estimate

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Predicts the milliseconds of a block, of the forward or of forward and backward.
class Predictor {
 public:
  Predictor(const FfnProblem& problem, const Device& device, const PlanOptions& options)
      : rate_(rates(problem.dtype, device.isa)),
        by_dots_(problem.tokens <= cpu::kMaxDotTokens),
        tokens_(static_cast<double>(problem.tokens)),
        padded_tokens_(static_cast<double>(
            by_dots_ ? problem.tokens : round_up(problem.tokens, cpu::kPanelColumns))),
        hidden_(static_cast<double>(problem.hidden)),
        neurons_(static_cast<double>(problem.neurons)),
        row_bytes_(hidden_ * static_cast<double>(size_of(problem.dtype))),
        later_products_(problem.kind == FfnKind::kGated ? 2 : 1),
        threads_(device.threads),
        readers_(std::min(threads_, kMostReaders)) {
    active_ =
        std::min(options.expected_active >= 0 ? options.expected_active : kUnknownActive * neurons_,
                 neurons_);
    const double tile = std::min(tokens_, static_cast<double>(kTileTokens));
    const double independent = neurons_ * (1 - std::pow(1 - active_ / neurons_, tile));
    in_union_ =
        std::min(options.expected_union >= 0 ? options.expected_union : independent, neurons_);
  }

  double dense_forward() const {
    const double read_ms = matrix_bytes() / kDenseReadGbPerSecond * 1e-6 / readers_;
    return (1 + later_products_) * (kProductCallMs + dense_product() + read_ms) + elementwise();
  }

  // Of each of the forward's products two, and the gradient of its weights.
  double dense_backward() const {
    return (1 + later_products_) * (2 * kProductCallMs + 2 * dense_product() + write_gradient()) +
           2 * elementwise();
  }

  double sparse_forward() const {
    const double read_rate = by_dots_ ? kDotsReadGbPerSecond : rate_.read;
    const double read_ms = matrix_bytes() / read_rate * 1e-6 / readers_;
    const double gate_ms =
        spread(padded_tokens_ * neurons_ * element(by_dots_ ? rate_.light : rate_.product)) +
        spread(by_dots_ ? 0 : tokens_ * neurons_ * kPackNs);
    return kBlockCallMs + gate_ms + read_ms +
           later_products_ * active_product(1, gather_rows(), kPackNs);
  }

  // For each of the forward's products, dh or a share of dx, which gather rows as up and down do,
  // and the gradient of its weights, which does not.
  double sparse_backward() const {
    return kBlockCallMs + (1 + later_products_) *
                              (active_product(2, gather_rows(), kCoefficientNs) + write_gradient());
  }

 private:
  // Nanoseconds for one element of a product over `hidden`, at GFLOP/s.
  double element(double rate) const { return 2 * hidden_ / rate; }
  // Milliseconds for one thread's nanoseconds, spread over all.
  double spread(double ns) const { return ns * 1e-6 / threads_; }

  double matrix_bytes() const { return neurons_ * row_bytes_; }
  double dense_product() const { return spread(tokens_ * neurons_ * element(rate_.dense)); }
  double elementwise() const {
    return later_products_ * spread(tokens_ * neurons_ * kElementwiseNs);
  }
  double write_gradient() const { return matrix_bytes() / kWriteGbPerSecond * 1e-6 / readers_; }
  double gather_rows() const {
    const double tiles = std::ceil(tokens_ / static_cast<double>(kTileTokens));
    return spread(tiles * in_union_ * row_bytes_ / kRowGbPerSecond);
  }
  // `count` products over the active places: row by row, or dense over each tile's union, whose
  // rate includes the gathering.
  double active_product(int count, double rows_ms, double heavy_ns) const {
    const double light_ms = spread(tokens_ * active_ * (element(rate_.light) + kPairNs));
    const double heavy_ms =
        spread(in_union_ * (padded_tokens_ * element(rate_.heavy) + tokens_ * heavy_ns));
    return by_dots_ ? count * light_ms + rows_ms
                    : std::min(count * light_ms + rows_ms, count * heavy_ms);
  }

  Rates rate_;
  bool by_dots_;  // few tokens: rows of G stream past them
  double tokens_, padded_tokens_, hidden_, neurons_, row_bytes_, later_products_, threads_,
      readers_, active_, in_union_;
};

Prediction predict(const FfnProblem& problem, const Device& device, const PlanOptions& options) {
  if (problem.tokens == 0) return {0, 0};
  const Predictor predictor(problem, device, options);
  Prediction out{predictor.dense_forward(), predictor.sparse_forward()};
  if (options.training) {
    out.dense_ms += predictor.dense_backward();
    out.sparse_ms += predictor.sparse_backward();
  }
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
