#include "cuda/ffn.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "cuda/check.h"
#include "cuda/decode.h"
#include "cuda/forward.h"

namespace twell::cuda {
namespace {

Status check_call(const FfnPlan& plan, const FfnForwardArgs& args) {
  const std::pair<const char*, const void*> pointers[] = {{"x", args.x},
                                                          {"y", args.y},
                                                          {"weights.gate", args.weights.gate},
                                                          {"weights.up", args.weights.up},
                                                          {"weights.down", args.weights.down}};
  for (const auto& [name, pointer] : pointers) {
    Status status = require_aligned(pointer, std::string("ffn_forward: ") + name);
    if (!status.ok()) return status;
  }
  return require_current(plan.device, "ffn_forward: plan");
}

// The launches of one forward pass; the first error ends it.
class Forward {
 public:
  Forward(const FfnPlan& plan, const FfnForwardArgs& args)
      : problem_(plan.problem),
        products_(products_for(plan.device)),
        multiprocessors_(plan.device.multiprocessors),
        args_(args),
        layout_(plan),
        saved_(plan),
        stream_(static_cast<cudaStream_t>(args.stream)) {
    ForwardChunk& c = chunk_;
    c.hidden = static_cast<int>(problem_.hidden);
    c.neurons = static_cast<int>(problem_.neurons);
    c.blocks = static_cast<int>(layout_.blocks);
    c.capacity = static_cast<int>(layout_.capacity);
    c.multiprocessors = multiprocessors_;
    c.masks = at<std::uint32_t>(layout_.masks);
    c.columns = at<std::uint32_t>(layout_.columns);
    c.unions = at<UnionEntry>(layout_.unions);
    c.counts = at<std::int32_t>(layout_.counts);
    c.halves = at<HalfColumns>(layout_.halves);
    c.by_half = is_hopper(plan.device);
    c.room = static_cast<int>(2 * layout_.tiles * layout_.capacity);
    c.rounds = 1;
    c.h = at<std::uint32_t>(layout_.h);
    c.order = at<std::int32_t>(layout_.order);
    c.schedule = at<Schedule>(layout_.schedule);
    if (args.saved) {
      c.saved.g = at_saved<std::uint32_t>(saved_.g);
      c.saved.u = gated() ? at_saved<std::uint32_t>(saved_.u) : nullptr;
      c.saved.taken = at_saved<std::int32_t>(saved_.taken);
      if (is_hopper(plan.device)) {
        c.saved.active = at_saved<unsigned long long>(saved_.active);
      }
      c.saved.room = static_cast<int>(2 * saved_.positions);
    }
    if (wants_stats()) {
      activity_ = args.stats.activity ? args.stats.activity : at<std::int32_t>(layout_.activity);
      partial_l1_ = at<float>(layout_.partial_l1);
    }
  }

  Status run() {
    if (activity_) {
      then(check(cudaMemsetAsync(activity_, 0, problem_.neurons * sizeof(*activity_), stream_),
                 "cudaMemsetAsync"));
    }
    if (problem_.tokens > 0) run_chunks();
    if (activity_) {
      then(launch_stats_total(activity_, chunk_.neurons, partial_l1_,
                              ceil_div<std::int64_t>(problem_.tokens, kTileTokens) * kStatsParts,
                              args_.stats.l0, static_cast<float*>(args_.stats.l1), stream_));
    }
    return status_;
  }

 private:
  bool wants_stats() const { return args_.stats.l0 || args_.stats.l1 || args_.stats.activity; }
  bool gated() const { return problem_.kind == FfnKind::kGated; }

  template <class T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(args_.workspace) + offset);
  }

  template <class T>
  T* at_saved(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(args_.saved) + offset);
  }

  void then(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  void run_chunks() {
    const std::int64_t step = layout_.tiles * kTileTokens;
    for (std::int64_t first = 0; first < problem_.tokens && status_.ok(); first += step) {
      chunk_.tokens = static_cast<int>(std::min(step, problem_.tokens - first));
      chunk_.tiles = ceil_div(chunk_.tokens, kTileTokens);
      if (chunk_.by_half) {
        chunk_.region = gate_region(chunk_.tiles, problem_.neurons, multiprocessors_);
        chunk_.item_steps = up_item(chunk_.tiles, multiprocessors_) / kUnionStep;
      }
      run_chunk(static_cast<int>(first));
    }
  }

  void run_chunk(int first) {
    const FfnWeights& weights = args_.weights;
    const Tokens x = {args_.x, problem_.tokens, first};
    if (args_.saved) {
      chunk_.masks =
          at_saved<std::uint32_t>(saved_.masks) + first / kHalfTokens * saved_.half_words;
      chunk_.saved.places = at_saved<std::int32_t>(saved_.places) + first / kTileTokens;
      chunk_.saved.first = first == 0;
    }
    then(products_.gate(chunk_, x, gated() ? weights.gate : weights.up, multiprocessors_, stream_));
    then(launch_unions(chunk_, stream_));
    if (gated()) {
      then(products_.up(chunk_, x, weights.up, multiprocessors_, stream_));
    } else {
      then(launch_spread(chunk_, stream_));
    }
    auto* y =
        static_cast<std::uint16_t*>(args_.y) + static_cast<std::size_t>(first) * chunk_.hidden;
    then(products_.down(chunk_, weights.down, y, multiprocessors_, stream_));
    if (activity_) {
      float* l1 = partial_l1_ + static_cast<std::ptrdiff_t>(first / kTileTokens * kStatsParts);
      then(launch_stats(chunk_, activity_, l1, stream_));
    }
  }

  const FfnProblem problem_;
  const Products& products_;
  const int multiprocessors_;
  const FfnForwardArgs& args_;
  const ForwardLayout layout_;
  const SavedLayout saved_;
  const cudaStream_t stream_;
  ForwardChunk chunk_ = {};
  std::int32_t* activity_ = nullptr;  // null: no stats wanted
  float* partial_l1_ = nullptr;
  Status status_;
};

// As Forward, for few tokens.
Status forward_decode(const FfnPlan& plan, const FfnForwardArgs& args) {
  const FfnProblem& problem = plan.problem;
  const DecodeLayout layout(plan);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  auto* base = static_cast<std::byte*>(args.workspace);
  DecodeCall call = {};
  call.x = args.x;
  call.gate = args.weights.gate;
  call.up = args.weights.up;
  call.down = args.weights.down;
  call.y = args.y;
  call.tokens = static_cast<int>(problem.tokens);
  call.hidden = static_cast<int>(problem.hidden);
  call.neurons = static_cast<int>(problem.neurons);
  call.groups = static_cast<int>(layout.groups);
  call.group_tokens = plan.tile_tokens;
  call.units = static_cast<int>(layout.units);
  call.unit_neurons = plan.block_neurons;
  call.hidden_shared = plan.device.shared_memory_bytes / 2;
  call.overlap = plan.device.compute_capability >= 90;
  call.masks = reinterpret_cast<std::uint64_t*>(base + layout.masks);
  call.h = reinterpret_cast<std::uint16_t*>(base + layout.h);
  const FfnStats& stats = args.stats;
  const bool counts = stats.l0 || stats.l1 || stats.activity;
  Status status;
  if (counts) {
    call.activity =
        stats.activity ? stats.activity : reinterpret_cast<std::int32_t*>(base + layout.activity);
    call.partial_l1 = reinterpret_cast<float*>(base + layout.partial_l1);
    status = check(cudaMemsetAsync(call.activity, 0, problem.neurons * 4, stream), "counts");
  }
  if (status.ok()) status = launch_decode_hidden(call, stream);
  if (status.ok()) status = launch_decode_down(call, stream);
  if (status.ok() && counts) {
    status = launch_stats_total(call.activity, call.neurons, call.partial_l1,
                                layout.groups * layout.units, stats.l0,
                                static_cast<float*>(stats.l1), stream);
  }
  return status;
}

}  // namespace

Status forward(const FfnPlan& plan, const FfnForwardArgs& args) {
  if (Status status = check_call(plan, args); !status.ok()) return status;
  return takes_decode_path(plan) ? forward_decode(plan, args) : Forward(plan, args).run();
}

}  // namespace twell::cuda
