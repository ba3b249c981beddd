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

// Shares of the neurons assumed without an estimate, those of layer 5 of the traces: active for a
// token, and in a tile's union.
constexpr double kUnknownActive = 0.0072;
constexpr double kUnknownUnion = 0.2;

// What sparse must be predicted to gain to be chosen: near the break-even predictions are not exact
// enough to tell which is faster, and dense is the safer choice.
constexpr double kMargin = 0.03;

// TFLOP/s per multiprocessor.
struct Rates {
  double dense;       // PyTorch's products
  double gate;        // ours
  double over_union;  // up and down
  double alone;       // of these, one CTA while few others run
};

// An H200, from bench/results/h200/ffn_forward.json.
constexpr Rates kHopper = {5.2, 5.45, 4.5, 6.6};
// Not measured. The others' dense bf16 peaks by their data sheets (A100: 2.9 per multiprocessor,
// B200: 15) times the share of its peak (7.5) that the H200 reaches; ours as on the A100, since
// Blackwell's large chips reach their peak by instructions of their own only. The ratio between
// the two is what the choice of a path needs; smaller chips are slower in both alike.
constexpr Rates kAmpere = {2.0, 2.0, 1.7, 2.5};
constexpr Rates kBlackwell = {10.4, 2.0, 1.7, 2.5};

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
constexpr double kForwardLaunchMs = 0.017;
// Of up and down's largest piece's time: what a piece of no neurons or outputs would take.
constexpr double kSmallPieceTime = 0.4;

// For few tokens, in a CUDA graph, where the dense block loses least by its launches.
constexpr double kFewTokensLaunchMs = 0.001;
constexpr double kRereadTbPerSecond = 5.2;  // of rows that another group of tokens reads too
constexpr double kGatheredRows = 1.55;      // a gathered row's time to that of the gate's
constexpr double kFewTokensWeights = 2048. * 5632;  // of a matrix, to which these two belong:
constexpr double kDenseTokenMs = 0.000053;          // per token
constexpr double kGroupTokenMs = 0.00013;           // per token of a group and matrix

// Of Hopper's sparse backward, TFLOP/s per multiprocessor by kernel, and its small kernels: for
// every round with tiles, and all others. From bench/results/h200/ffn_backward.json. Those over
// unions take as long as their rows take to gather, whichever half uses them.
constexpr double kRemakeRate = 4.9;
constexpr double kCoefficientsRate = 3.4;
constexpr double kInputRate = 5.8;
constexpr double kListedWeightsRate = 3.3;
constexpr double kDenseWeightsRate = 2.3;
constexpr double kBackwardRoundMs = 0.03;
constexpr double kBackwardLaunchMs = 0.2;
// Of the backward on other GPUs, for each kernel, at least one tile long: not measured.
constexpr double kBackwardKernelMs = 0.015;

// Elements of one matrix.
double weights_of(const FfnProblem& problem) {
  return static_cast<double>(problem.hidden * problem.neurons);
}

double ms_to_read(const FfnProblem& problem, double tb_per_second) {
  return weights_of(problem) * 2 / tb_per_second * 1e-9;
}

double products_after_gate(const FfnProblem& problem) {
  return problem.kind == FfnKind::kGated ? 2 : 1;
}

// How many neurons are in use, if each token has so many active ones.
struct Sparsity {
  double neurons;        // of the block
  double active;         // of a token
  double in_union;       // of a tile
  double in_steps;       // in the steps of a half tile
  double blocks;         // share of the (token, block of 64 neurons) pairs with an active neuron
  double sorted_blocks;  // the same, the neurons sorted by activity

  Sparsity(const FfnProblem& problem, const PlanOptions& options)
      : neurons(static_cast<double>(problem.neurons)),
        active(options.expected_active < 0 ? kUnknownActive * neurons
                                           : std::min(options.expected_active, neurons)) {
    const double most = neurons * any_of(cuda::kTileTokens);
    in_union = options.expected_union >= 0    ? std::min(options.expected_union, neurons)
               : options.expected_active >= 0 ? most
                                              : kUnknownUnion * neurons;
    // The less independent, the smaller the union, the fewer blocks of neurons by activity are in
    // use, and the more of its union a half uses (the square root fits the traces).
    const double independence = most > 0 ? std::sqrt(std::min(in_union / most, 1.0)) : 0;
    const double half = most > 0 ? neurons * any_of(cuda::kHalfTokens) / most : 1;
    in_steps = in_union * (1 - independence * (1 - half));
    blocks = any_of(cuda::kRowNeurons);
    sorted_blocks = independence * blocks;
  }

  // That some of so many pairs of a token and a neuron are active, if they are independent.
  double any_of(double pairs) const { return 1 - std::pow(1 - active / neurons, pairs); }
};

// The time of the gate of so many tiles, in waves of the largest pieces.
double gate_waves(const FfnProblem& problem, const Device& device, std::int64_t tiles) {
  const auto waves = [&](int region) {
    return static_cast<double>(
        cuda::gate_waves(tiles, problem.neurons, region, device.multiprocessors));
  };
  const double large = waves(cuda::kBlockNeurons);
  if (!cuda::is_hopper(device)) return large;
  return std::min(large, cuda::kSmallRegionTime * waves(cuda::kSmallRegion));
}

// Of the sparse forward, in ms; `product` is a dense one's at 1 TFLOP/s.
double predict_forward(const FfnProblem& problem, const Device& device, double product,
                       const Sparsity& sparsity) {
  const Rates rates = rates_of(device);
  const std::int64_t tiles = cuda::ceil_div<std::int64_t>(problem.tokens, cuda::kTileTokens);
  const double union_ms = product / rates.over_union * sparsity.in_union / sparsity.neurons;
  // A CTA's piece of gate, up and down is a tile by as many neurons or outputs: at 1 TFLOP/s, for
  // each summed element.
  static_assert(cuda::kUnionItem == cuda::kBlockNeurons &&
                cuda::kDownOutputs == cuda::kBlockNeurons);
  constexpr double kPieceMs = 2e-9 * cuda::kTileTokens * cuda::kBlockNeurons;
  const double hidden = static_cast<double>(problem.hidden);
  const double gate_ms = gate_waves(problem, device, tiles) * kPieceMs * hidden / rates.gate;
  // A smaller piece takes longer than its share.
  const auto share = [&](int piece, int largest) {
    if (!cuda::is_hopper(device)) return 1.0;
    return kSmallPieceTime + (1 - kSmallPieceTime) * piece / largest;
  };
  const double of_up = share(cuda::up_item(tiles, device.multiprocessors), cuda::kUnionItem);
  const double of_down =
      share(cuda::down_outputs(tiles, problem.hidden, device.multiprocessors), cuda::kDownOutputs);
  const double up_ms = std::max(union_ms, of_up * kPieceMs * hidden / rates.alone);
  const double down_ms = std::max(union_ms, of_down * kPieceMs * sparsity.in_union / rates.alone);
  return kForwardLaunchMs + gate_ms + down_ms + (problem.kind == FfnKind::kGated ? up_ms : 0);
}

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
  const double inputs = products_after_gate(problem);  // projections of x, too
  const double of_weights = 1 + inputs;
  const double in_union = sparsity.in_union / neurons;
  const cuda::BackwardLayout layout(with_chunks(problem, device, kMaxTrainingTiles));
  const double chunks = static_cast<double>(layout.chunks);
  const double columns = cuda::is_hopper(device) ? sparsity.in_steps : sparsity.in_union;
  const double rounds =
      chunks * std::ceil(static_cast<double>(layout.tiles) * std::max(columns, 1.0) /
                         std::max(static_cast<double>(layout.positions), 1.0));
  if (cuda::is_hopper(device)) {
    const double again = std::max(0.0, 1 - cuda::kSavedShare * neurons / std::max(columns, 1.0));
    const double per_union =
        inputs * (again / kRemakeRate + 1 / kInputRate) + 1 / kCoefficientsRate;
    const bool listed = sparsity.active * static_cast<double>(problem.tokens) <=
                        static_cast<double>(layout.entries);
    const double per_block =
        of_weights * (listed ? sparsity.sorted_blocks / kListedWeightsRate : 1 / kDenseWeightsRate);
    return kBackwardLaunchMs + rounds * kBackwardRoundMs +
           product * (in_union * per_union + per_block);
  }
  const double over_union = 1 + 2 * inputs;  // g, u, dh and both of dx; plain: g, dh and dx
  const double kernels = chunks * 2 + rounds * (2 + 4 * static_cast<double>(layout.groups));
  const double share = over_union * in_union + of_weights * sparsity.blocks;
  return kernels * kBackwardKernelMs + product * share / kAmpere.over_union;
}

// Every group of the few tokens reads the gate and the rows in use of the other matrices, the first
// from memory and the others from L2, and multiplies itself with them.
Prediction predict_few_tokens(const FfnProblem& problem, const Sparsity& sparsity) {
  const double tokens = static_cast<double>(problem.tokens);
  const double of_group = cuda::decode_group(problem.tokens);
  const double groups = std::max(1.0, std::ceil(tokens / of_group));
  const double in_use =
      std::min(sparsity.any_of(std::min(tokens, of_group)), sparsity.in_union / sparsity.neurons);
  const double matrices = 1 + products_after_gate(problem) * in_use * kGatheredRows;
  const double scale = weights_of(problem) / kFewTokensWeights;
  const double group_ms = ms_to_read(problem, kRereadTbPerSecond) * (groups - 1) +
                          groups * of_group * kGroupTokenMs * scale;
  Prediction out;
  out.dense_ms = kFewTokensLaunchMs + tokens * kDenseTokenMs * scale +
                 (1 + products_after_gate(problem)) * ms_to_read(problem, kReadTbPerSecond);
  out.sparse_ms =
      kFewTokensLaunchMs + matrices * (ms_to_read(problem, kReadTbPerSecond) + group_ms);
  return out;
}

Prediction predict(const FfnProblem& problem, const Device& device, const PlanOptions& options) {
  const Sparsity sparsity(problem, options);
  if (takes_few_tokens(problem, options)) return predict_few_tokens(problem, sparsity);
  const double flops_per_ms = device.multiprocessors * 1e9;  // at 1 TFLOP/s each
  const double product = 2 * static_cast<double>(problem.tokens) * weights_of(problem) /
                         flops_per_ms;  // in ms, at 1 TFLOP/s each
  const double dense_product =
      std::max(product / rates_of(device).dense, ms_to_read(problem, kReadTbPerSecond));
  Prediction out;
  out.dense_ms = kDenseLaunchMs + (1 + products_after_gate(problem)) * dense_product;
  out.sparse_ms = predict_forward(problem, device, product, sparsity);
  if (options.training) {
    out.dense_ms *= 3;  // each product has two gradients, which are products as large
    out.sparse_ms += predict_backward(problem, device, product, sparsity);
  }
  return out;
}

// Tiles of a forward's chunk: `most` or fewer, down to half of it, for the fewest waves of the gate
// in all, next the fewest chunks, next the fewest waves of down.
std::int64_t chunk_tiles(const FfnProblem& problem, const Device& device, std::int64_t most) {
  const std::int64_t tiles = cuda::ceil_div<std::int64_t>(problem.tokens, cuda::kTileTokens);
  const std::int64_t strips = cuda::ceil_div<std::int64_t>(problem.hidden, cuda::kDownOutputs);
  const std::int64_t at_once = std::max(2, device.multiprocessors);
  const auto in_all = [&](std::int64_t chunk, auto&& waves) {
    return tiles / chunk * waves(chunk) + waves(tiles % chunk);
  };
  const auto gate = [&](std::int64_t count) {
    return cuda::gate_waves(count, problem.neurons, cuda::kBlockNeurons, device.multiprocessors);
  };
  const auto down_waves = [&](std::int64_t count) {
    return cuda::ceil_div(count * strips, at_once);
  };
  const auto cost = [&](std::int64_t chunk) {
    return std::tuple(in_all(chunk, gate), cuda::ceil_div(tiles, chunk), in_all(chunk, down_waves));
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
  FfnPlan plan =
      choose_path(problem, device, options, prediction,
                  !offered.ok() || prediction.dense_ms < (1 + kMargin) * prediction.sparse_ms);
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
