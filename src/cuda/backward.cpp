// The sparse FFN backward on CUDA, chunk by chunk of tokens:
//
//   1. masks         the forward's, completed where dy is not finite, and their unions
//
// then round by round, of as many tiles as have room for their columns:
//
//   2. coefficients  dg, du and h over the unions; g and u are made anew where none were kept
//   3. dx            dg G + du U over the unions
//   4. weights       on Hopper lists of tokens, and the gradients after the last round; on other
//                    GPUs both round by round, group by group of neurons
//
// The device decides which tiles a round has, so that all rounds that there may be are launched;
// the kernels of one without tiles return at once. Every sum has a fixed order.

#include "cuda/backward.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "cuda/check.h"
#include "cuda/ffn.h"
#include "cuda/sm80/products.h"
#include "cuda/sm90/products.h"
#include "cuda/token_lists.h"

namespace twell::cuda {
namespace {

Status check_call(const FfnPlan& plan, const FfnBackwardArgs& args) {
  const std::pair<const char*, const void*> pointers[] = {{"x", args.x},
                                                          {"grad_y", args.grad_y},
                                                          {"weights.gate", args.weights.gate},
                                                          {"weights.up", args.weights.up},
                                                          {"weights.down", args.weights.down},
                                                          {"grad_x", args.grad_x},
                                                          {"grad_gate", args.grad_gate},
                                                          {"grad_up", args.grad_up},
                                                          {"grad_down", args.grad_down}};
  for (const auto& [name, pointer] : pointers) {
    Status status = require_aligned(pointer, std::string("ffn_backward: ") + name);
    if (!status.ok()) return status;
  }
  return require_current(plan.device, "ffn_backward: plan");
}

// The launches of one backward pass; the first error ends it.
class Backward {
 public:
  Backward(const FfnPlan& plan, const FfnBackwardArgs& args)
      : problem_(plan.problem),
        products_(backward_products_for(plan.device)),
        multiprocessors_(plan.device.multiprocessors),
        args_(args),
        layout_(plan),
        saved_(plan),
        stream_(static_cast<cudaStream_t>(args.stream)) {
    const bool gated = problem_.kind == FfnKind::kGated;
    ForwardChunk& f = chunk_.forward;
    f.hidden = static_cast<int>(problem_.hidden);
    f.neurons = static_cast<int>(problem_.neurons);
    f.blocks = ceil_div(f.neurons, kBlockNeurons);
    f.capacity = static_cast<int>(layout_.capacity);
    f.multiprocessors = multiprocessors_;
    f.masks = at<std::uint32_t>(layout_.masks);
    f.unions = at<UnionEntry>(layout_.unions);
    f.counts = at<std::int32_t>(layout_.counts);
    f.order = at<std::int32_t>(layout_.order);
    f.halves = at<HalfColumns>(layout_.halves);
    f.by_half = is_hopper(plan.device);
    f.room = static_cast<int>(2 * layout_.positions);
    f.rounds = static_cast<int>(layout_.rounds);
    f.schedule_bytes = static_cast<int>(layout_.schedule_bytes);
    chunk_.grad_l1 = static_cast<const float*>(args.grad_l1);
    chunk_.nonfinite = at<std::uint32_t>(layout_.nonfinite);
    f.half_places = at<std::int32_t>(layout_.places);
    if (saved_.positions > 0) {
      chunk_.saved_g = at_saved<std::uint32_t>(saved_.g);
      chunk_.saved_u = gated ? at_saved<std::uint32_t>(saved_.u) : nullptr;
      chunk_.saved_room = static_cast<int>(2 * saved_.positions);
    }
    chunk_.dg = at<std::uint32_t>(layout_.coefficients[0]);
    chunk_.du = gated ? at<std::uint32_t>(layout_.coefficients[1]) : nullptr;
    chunk_.h = at<std::uint32_t>(layout_.coefficients[2]);

    if (is_hopper(plan.device)) {
      set_lists();
      return;
    }
    rows_.capacity = static_cast<int>(layout_.rows);
    rows_.parts = at<BlockTokens>(layout_.lists);
    rows_.tokens = at<std::int32_t>(layout_.tokens);
    rows_.counts = at<std::int32_t>(layout_.token_counts);
    rows_.projections = at<std::uint32_t>(layout_.projection_rows);
    rows_.hidden = at<std::uint32_t>(layout_.hidden_rows);

    const auto gradient = [&](void* grad, int i) {
      return WeightGradient{grad, at<float>(layout_.totals[i]), args.accumulate};
    };
    const WeightGradient of_gate = gradient(args.grad_gate, 0);
    const WeightGradient of_up = gradient(args.grad_up, 1);
    of_projections_[0] = gated ? of_gate : of_up;
    of_projections_[1] = gated ? of_up : WeightGradient{};
    of_down_ = gradient(args.grad_down, 2);
  }

  Status run() {
    if (problem_.tokens == 0) return args_.accumulate ? Status() : zero_weights();
    if (lists_.blocks > 0) {
      then(check(
          cudaMemsetAsync(at<std::byte>(layout_.list_zeros), 0, layout_.list_zero_bytes, stream_),
          "cudaMemsetAsync"));
    }
    const std::int64_t step = layout_.tiles * kTileTokens;
    for (std::int64_t first = 0; first < problem_.tokens && status_.ok(); first += step) {
      const std::int64_t left = problem_.tokens - first;
      chunk_.forward.tokens = static_cast<int>(std::min(step, left));
      chunk_.forward.tiles = ceil_div(chunk_.forward.tokens, kTileTokens);
      chunk_.last = left <= step;
      run_chunk(first);
    }
    if (lists_.blocks > 0 && wants_weights()) {
      then(launch_order_lists(lists_, stream_));
      then(sm90::launch_list_gradients(chunk_, lists_, args_.x, args_.grad_y, gradients_,
                                       multiprocessors_, stream_));
    }
    return status_;
  }

 private:
  template <class T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(args_.workspace) + offset);
  }

  template <class T>
  const T* at_saved(std::size_t offset) const {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(args_.saved) + offset);
  }

  void then(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  bool wants_weights() const { return args_.grad_gate || args_.grad_up || args_.grad_down; }

  void set_lists() {
    chunk_.forward.words = at<WordPositions>(layout_.word_positions);
    lists_.blocks = static_cast<int>(layout_.blocks);
    lists_.capacity = static_cast<int>(layout_.rows);
    lists_.entry_capacity = static_cast<int>(layout_.entries);
    lists_.pairs = at_saved<unsigned long long>(saved_.active);
    lists_.state = at<ListState>(layout_.list_state);
    lists_.neurons = at<std::int32_t>(layout_.list_neurons);
    lists_.silent_nans = at<std::uint32_t>(layout_.silent_nans);
    lists_.positions = at<std::int32_t>(layout_.list_positions);
    lists_.active = at<ActiveTokens>(layout_.active);
    lists_.parts = at<ListPart>(layout_.lists);
    lists_.shares = at<ListShare>(layout_.list_shares);
    lists_.first_rows = at<std::int32_t>(layout_.first_rows);
    lists_.first_entries = at<std::int32_t>(layout_.first_entries);
    lists_.counts = at<std::int32_t>(layout_.token_counts);
    lists_.order = at<std::int32_t>(layout_.list_order);
    lists_.rows = at<ListRow>(layout_.list_rows);
    lists_.entries = at<ListEntry>(layout_.list_entries);
    gradients_ = {args_.grad_gate, args_.grad_up, args_.grad_down, args_.accumulate, {}};
    for (const int i : {0, 1, 2}) gradients_.low[i] = at<std::uint8_t>(layout_.totals[i]);
  }

  Status zero_weights() {
    const auto bytes = static_cast<std::size_t>(problem_.neurons * problem_.hidden) * 2;
    for (void* grad : {args_.grad_gate, args_.grad_up, args_.grad_down}) {
      if (grad) then(check(cudaMemsetAsync(grad, 0, bytes, stream_), "cudaMemsetAsync"));
    }
    return status_;
  }

  void run_chunk(std::int64_t first) {
    const std::int64_t row = first * problem_.hidden;
    chunk_.x = static_cast<const std::uint16_t*>(args_.x) + row;
    chunk_.dy = static_cast<const std::uint16_t*>(args_.grad_y) + row;
    const auto* masks =
        at_saved<std::uint32_t>(saved_.masks) + first / kHalfTokens * saved_.half_words;
    const auto* places = at_saved<std::int32_t>(saved_.places) + first / kTileTokens;
    ForwardChunk& f = chunk_.forward;
    f.schedule = at<Schedule>(layout_.schedules);
    then(launch_complete_masks(chunk_, masks, places, stream_));
    then(launch_unions(f, stream_));
    lists_.first = static_cast<int>(first);
    for (std::int64_t round = 0; round < layout_.rounds && status_.ok(); ++round) {
      chunk_.first = first == 0 && round == 0;
      f.schedule = at<Schedule>(layout_.schedules + round * layout_.schedule_bytes);
      run_round(row);
    }
  }

  void run_round(std::int64_t row) {
    then(products_.coefficients(chunk_, lists_, args_.weights, multiprocessors_, stream_));
    if (args_.grad_x) {
      auto* dx = static_cast<std::uint16_t*>(args_.grad_x) + row;
      then(products_.input_gradient(chunk_, args_.weights, dx, multiprocessors_, stream_));
    }
    if (!wants_weights()) return;
    if (lists_.blocks > 0) {
      if (chunk_.first) {
        then(launch_sort_neurons(chunk_, lists_, at<std::int32_t>(layout_.activity), stream_));
      }
      then(launch_add_to_lists(chunk_, lists_, multiprocessors_, stream_));
      then(sm90::launch_dense_gradients(chunk_, lists_, gradients_, multiprocessors_, stream_));
      return;
    }
    const bool wants_projections = of_projections_[0].grad || of_projections_[1].grad;
    const std::int64_t step = layout_.blocks * kRowNeurons;
    for (std::int64_t neuron = 0; neuron < problem_.neurons; neuron += step) {
      rows_.first = static_cast<int>(neuron);
      rows_.blocks = static_cast<int>(
          ceil_div<std::int64_t>(std::min(step, problem_.neurons - neuron), kRowNeurons));
      then(launch_neuron_rows(chunk_, rows_, stream_));
      if (wants_projections) {
        then(sm80::launch_projection_gradients(chunk_, rows_, of_projections_, stream_));
      }
      if (of_down_.grad) then(sm80::launch_down_gradient(chunk_, rows_, of_down_, stream_));
    }
  }

  const FfnProblem problem_;
  const BackwardProducts& products_;
  const int multiprocessors_;
  const FfnBackwardArgs& args_;
  const BackwardLayout layout_;
  const SavedLayout saved_;
  const cudaStream_t stream_;
  BackwardChunk chunk_ = {};
  TokenLists lists_ = {};  // no blocks: rows_ instead
  WeightGradients gradients_ = {};
  NeuronRows rows_ = {};
  WeightGradient of_projections_[2] = {};
  WeightGradient of_down_ = {};
  Status status_;
};

}  // namespace

Status backward(const FfnPlan& plan, const FfnBackwardArgs& args) {
  if (Status status = check_call(plan, args); !status.ok()) return status;
  return Backward(plan, args).run();
}

}  // namespace twell::cuda
