#include "plan/plan_cuda.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "cuda/layout.h"
#include "plan/choice.h"

namespace twell::plan {
namespace {

// Tiles of a training forward's chunk, where memory counts: at most these, and no more memory than
// the backward.
constexpr std::int64_t kMaxTrainingTiles = 128;

// Shares assumed without an estimate, those of layer 5 of the traces: of the neurons in a tile's
// union, and of the (token, block of 64 neurons) pairs in which some neuron is active, the neurons
// in their own order or by activity.
constexpr double kUnknownUnion = 0.2;
constexpr double kUnknownBlocks = 0.36;
constexpr double kUnknownSortedBlocks = 0.19;

// TFLOP/s per multiprocessor.
struct Rates {
  double dense;       // PyTorch's products
  double gate;        // ours
  double over_union;  // up and down
};

// An H200, from bench/results/h200/ffn_forward.json.
constexpr Rates kHopper = {5.2, 5.2, 4.5};
// Not measured. The others' dense bf16 peaks by their data sheets (A100: 2.9 per multiprocessor,
// B200: 15) times the share of its peak (7.5) that the H200 reaches; ours as on the A100, since
// Blackwell's large chips reach their peak by instructions of their own only. The ratio between
// the two is what the choice of a path needs; smaller chips are slower in both alike.
constexpr Rates kAmpere = {2.0, 2.0, 1.7};
constexpr Rates kBlackwell = {10.4, 2.0, 1.7};

Rates rates_of(const Device& device) {
  const int generation = device.compute_capability / 10;
  return generation == 9 ? kHopper : generation == 10 || generation == 11 ? kBlackwell : kAmpere;
}

// Whether the kernels for few tokens run it: they save nothing for a backward.
bool takes_few_tokens(const FfnProblem& problem, const PlanOptions& options) {
  return problem.tokens <= cuda::kMaxDecodeTokens && !options.training;
}

// Other speeds of the same H200.
constexpr double kReadTbPerSecond = 2.2;
constexpr double kDenseLaunchMs = 0.015;
constexpr double kTileLaunchMs = 0.06;  // four kernels, each at least one tile long
constexpr double kDecodeLaunchMs = 0.0025;
constexpr double kDecodeTokenMs = 0.0003;  // per token, at the traces' 2048 x 5632

// The neurons in a tile's union, and the shares of (token, block of 64 neurons) pairs in use.
struct Sparsity {
  double active = 0;  // neurons of a token; 0 if unknown
  double in_union;
  double blocks;
  double sorted_blocks;

  Sparsity(double neurons, const PlanOptions& options)
      : in_union(kUnknownUnion * neurons),
        blocks(kUnknownBlocks),
        sorted_blocks(kUnknownSortedBlocks) {
    if (options.expected_union >= 0) in_union = std::min(options.expected_union, neurons);
    if (options.expected_active < 0) return;
    active = options.expected_active;
    // If all neurons were equally active and independent. The less so, the smaller the union, and
    // the fewer blocks of neurons by activity are in use (the square root fits the traces).
    const double silent = 1 - std::min(options.expected_active / neurons, 1.0);
    const double most = neurons * (1 - std::pow(silent, cuda::kTileTokens));
    if (options.expected_union < 0) in_union = most;
    blocks = 1 - std::pow(silent, cuda::kRowNeurons);
    sorted_blocks = most > 0 ? blocks * std::sqrt(std::min(in_union / most, 1.0)) : 0;
  }
};

// Rates of Hopper's sparse backward, as kHopper, and its small kernels: for every chunk, every
// round with tiles, and once. From bench/results/h200/ffn_backward.json. And what a kernel costs
// that returns at once.
constexpr double kBackwardUnion = 3.9;
constexpr double kBackwardWeights = 2.6;
constexpr double kBackwardChunkMs = 0.04;
constexpr double kBackwardRoundMs = 0.06;
constexpr double kBackwardLaunchMs = 0.05;
constexpr double kEmptyLaunchMs = 0.00125;
constexpr double kRoundLaunches = 6;  // remake, coefficients, down, count, list, weights

// What determines the layouts of a training plan, the forward's chunks being of so many tiles.
FfnPlan with_chunks(const FfnProblem& problem, const Device& device, std::int64_t chunk_tiles) {
  FfnPlan plan;
  plan.problem = problem;
  plan.device = device;
  plan.chunk_tokens = chunk_tiles * cuda::kTileTokens;
  return plan;
}

// Of the sparse backward; `product` is a dense product's time at 1 TFLOP/s. For GPUs other than
// Hopper by its FLOPs, with the rate of the same instructions on an A100: not measured.
double predict_backward(const FfnProblem& problem, const Device& device, double product,
                        const Sparsity& sparsity) {
  const double neurons = static_cast<double>(problem.neurons);
  const bool gated = problem.kind == FfnKind::kGated;
  const double of_weights = gated ? 3 : 2;
  const double in_union = sparsity.in_union / neurons;
  const cuda::BackwardLayout layout(with_chunks(problem, device, kMaxTrainingTiles));
  const double chunks = static_cast<double>(layout.chunks);
  const double rounds =
      chunks * std::ceil(static_cast<double>(layout.tiles) * std::max(sparsity.in_union, 1.0) /
                         std::max(static_cast<double>(layout.positions), 1.0));
  if (cuda::is_hopper(device)) {
    const double over_union = gated ? 3 : 2;  // dh and dx
    const double launches = chunks * static_cast<double>(layout.rounds) * kRoundLaunches;
    const bool listed = sparsity.active * static_cast<double>(problem.tokens) <=
                        static_cast<double>(layout.entries);
    const double in_use = listed ? sparsity.sorted_blocks : 1;  // of (token, block) pairs
    return kBackwardLaunchMs + chunks * kBackwardChunkMs + rounds * kBackwardRoundMs +
           launches * kEmptyLaunchMs +
           product *
               (over_union * in_union / kBackwardUnion + of_weights * in_use / kBackwardWeights);
  }
  const double over_union = gated ? 5 : 3;  // g, u, dh and both of dx; plain: g, dh and dx
  const double kernels = chunks * 2 + rounds * (2 + 4 * static_cast<double>(layout.groups));
  const double share = over_union * in_union + of_weights * sparsity.blocks;
  return kernels * kTileLaunchMs / 4 + product * share / kAmpere.over_union;
}

Prediction predict(const FfnProblem& problem, const Device& device, const PlanOptions& options) {
  const double tokens = static_cast<double>(problem.tokens);
  const double neurons = static_cast<double>(problem.neurons);
  const double weights = static_cast<double>(problem.hidden) * neurons;  // of one matrix
  const double flops_per_ms = device.multiprocessors * 1e9;              // at 1 TFLOP/s each
  const double read_ms = weights * 2 / kReadTbPerSecond * 1e-9;
  const Rates rates = rates_of(device);
  const double product = 2 * tokens * weights / flops_per_ms;       // in ms, at 1 TFLOP/s each
  const double products = problem.kind == FfnKind::kGated ? 2 : 1;  // besides the gate's

  Prediction out;
  out.dense_ms = kDenseLaunchMs + (1 + products) * std::max(product / rates.dense, read_ms);
  if (takes_few_tokens(problem, options)) {
    out.sparse_ms = kDecodeLaunchMs + read_ms + tokens * kDecodeTokenMs * weights / (2048. * 5632);
    return out;
  }
  const Sparsity sparsity(neurons, options);
  const double union_ms = product / rates.over_union * sparsity.in_union / neurons;
  out.sparse_ms = kTileLaunchMs + product / rates.gate + products * union_ms;
  if (options.training) {
    out.dense_ms *= 3;  // each product has two gradients, which are products as large
    out.sparse_ms += predict_backward(problem, device, product, sparsity);
  }
  return out;
}

// Tiles of a forward's chunk: `most` or fewer, down to half of it, for the fewest waves of the gate
// in all, next the fewest chunks, next the fewest waves of down. The gate's pieces are pairs of
// tiles by blocks of neurons, one at a time on each pair of multiprocessors; down's are tiles by
// strips of outputs.
std::int64_t chunk_tiles(const FfnProblem& problem, const Device& device, std::int64_t most) {
  const std::int64_t tiles = cuda::ceil_div<std::int64_t>(problem.tokens, cuda::kTileTokens);
  const std::int64_t blocks = cuda::ceil_div<std::int64_t>(problem.neurons, cuda::kBlockNeurons);
  const std::int64_t strips = cuda::ceil_div<std::int64_t>(problem.hidden, cuda::kDownOutputs);
  const std::int64_t at_once = std::max(2, device.multiprocessors);
  const auto in_all = [&](std::int64_t chunk, auto&& waves) {
    return tiles / chunk * waves(chunk) + waves(tiles % chunk);
  };
  const auto gate_waves = [&](std::int64_t count) {
    return cuda::ceil_div(cuda::ceil_div<std::int64_t>(count, 2) * blocks, at_once / 2);
  };
  const auto down_waves = [&](std::int64_t count) {
    return cuda::ceil_div(count * strips, at_once);
  };
  const auto cost = [&](std::int64_t chunk) {
    return std::tuple(in_all(chunk, gate_waves), cuda::ceil_div(tiles, chunk),
                      in_all(chunk, down_waves));
  };
  if (tiles <= most) return std::max<std::int64_t>(1, tiles);
  std::int64_t best = most;
  for (std::int64_t chunk = best - 1; 2 * chunk >= most; --chunk) {
    if (cost(chunk) < cost(best)) best = chunk;
  }
  return best;
}

// The most tiles of a training forward's chunk, which takes no more memory than the backward.
std::int64_t most_training_tiles(const FfnProblem& problem, const Device& device) {
  const std::int64_t tiles = cuda::ceil_div<std::int64_t>(problem.tokens, cuda::kTileTokens);
  std::int64_t most = std::clamp<std::int64_t>(tiles, 1, kMaxTrainingTiles);
  const std::size_t bytes = cuda::BackwardLayout(with_chunks(problem, device, most)).bytes;
  while (most > 1 && cuda::ForwardLayout(with_chunks(problem, device, most)).bytes > bytes) --most;
  return most;
}

// Ok if the sparse path runs this; otherwise names what it does not.
Status check_offered(const FfnProblem& problem, const Device& device) {
  const auto refuse = [](const std::string& what, const std::string& permitted) {
    return Status(StatusCode::kUnsupported, "plan_ffn: " + what + "; permitted: " + permitted);
  };
  if (problem.dtype != DType::kBf16) {
    return refuse("dtype is " + std::string(name_of(problem.dtype)), "bfloat16 on a CUDA device");
  }
  if (device.compute_capability < 80) {
    return refuse("device.compute_capability is " + std::to_string(device.compute_capability),
                  "80 or newer");
  }
  return {};
}

}  // namespace

Result<FfnPlan> plan_cuda(const FfnProblem& problem, const Device& device,
                          const PlanOptions& options) {
  const Prediction prediction = predict(problem, device, options);
  const Status offered = check_offered(problem, device);
  FfnPlan plan = choose_path(problem, device, options, prediction,
                             !offered.ok() || prediction.dense_ms < prediction.sparse_ms);
  if (plan.path == FfnPath::kDense) return plan;
  if (!offered.ok()) return offered;

  if (takes_few_tokens(problem, options)) {
    plan.tile_tokens = cuda::decode_group(problem.tokens);
    plan.chunk_tokens = cuda::kMaxDecodeTokens;
    plan.block_neurons = cuda::decode_unit(problem.neurons, device.multiprocessors);
    plan.heavy_tokens = 1;  // every neuron of a union takes part in the dense product
    plan.workspace_bytes = cuda::DecodeLayout(plan).bytes;
    return plan;
  }
  const std::int64_t most =
      options.training ? most_training_tiles(problem, device) : cuda::kMaxForwardTiles;
  plan.tile_tokens = cuda::kTileTokens;
  plan.chunk_tokens = chunk_tiles(problem, device, most) * cuda::kTileTokens;
  plan.block_neurons = cuda::kBlockNeurons;
  plan.heavy_tokens = 1;  // every neuron of a union takes part in the dense product
  plan.workspace_bytes = cuda::ForwardLayout(plan).bytes;
  if (options.training) {
    plan.saved_bytes = cuda::SavedLayout::bytes(problem, cuda::kSavedShare);
    plan.backward_workspace_bytes = cuda::BackwardLayout(plan).bytes;
  }
  return plan;
}

}  // namespace twell::plan
