#pragma once
// How the CUDA kernels cut their work, and how large its intermediates are. Host code without a
// CUDA header, shared by the planner and the kernels.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "twell/ffn.h"

namespace twell::cuda {

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline constexpr int kTileTokens = 128;    // tokens that share one union
inline constexpr int kHalfTokens = 64;     // tokens of one warpgroup's products
inline constexpr int kBlockNeurons = 256;  // neurons of one piece of gate work
inline constexpr int kMaskWords = kBlockNeurons / 32;
inline constexpr int kColumnWords = kHalfTokens / 2;
inline constexpr int kUnionStep = 64;   // unions are padded to a multiple of this
inline constexpr int kUnionItem = 256;  // union positions of one piece of up work
inline constexpr int kMaxChunkTiles = 1024;

// Of the backward. Its chunks are smaller than the forward's, as it keeps three values for each
// neuron of a union, not two, and float32 sums of the weights' gradients besides.
inline constexpr int kMaxBackwardTiles = 64;
inline constexpr int kRowNeurons = 64;   // neurons that share a list of tokens
inline constexpr int kGroupBlocks = 32;  // lists of tokens that exist at once

// Up to kMaxDecodeTokens tokens take the kernels that are bound by reading the weights.
inline constexpr int kMaxDecodeTokens = 64;
inline constexpr int kMaxDecodeGroup = 32;  // tokens whose products share the reads of the weights
inline constexpr int kMaxDecodeUnit = 48;   // neurons of one CTA

// Tokens of a group: 8, 16 or 32.
constexpr int decode_group(std::int64_t tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : 32; }

// Neurons of a unit, the work of one CTA: as many CTAs as multiprocessors, or a multiple of it.
constexpr int decode_unit(std::int64_t neurons, int multiprocessors) {
  const std::int64_t at_once = multiprocessors;
  const std::int64_t turns = ceil_div(neurons, at_once * kMaxDecodeUnit);
  return static_cast<int>(ceil_div(neurons, turns * at_once));
}

inline bool takes_decode_path(const FfnPlan& plan) { return plan.tile_tokens <= kMaxDecodeGroup; }

// Parts of a workspace: offsets in bytes, each 256-byte aligned.
class Parts {
 public:
  std::size_t take(std::int64_t bytes) {
    const std::size_t offset = bytes_;
    bytes_ += ceil_div<std::size_t>(static_cast<std::size_t>(bytes), 256) * 256;
    return offset;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

struct DecodeLayout {
  std::int64_t groups;  // of plan.tile_tokens tokens
  std::int64_t units;   // of plan.block_neurons neurons
  std::size_t masks, h, activity, partial_l1, bytes;

  explicit DecodeLayout(const FfnPlan& plan)
      : groups(ceil_div<std::int64_t>(plan.problem.tokens, plan.tile_tokens)),
        units(ceil_div<std::int64_t>(plan.problem.neurons, plan.block_neurons)) {
    Parts carve;
    masks = carve.take(groups * units * 8);
    h = carve.take(groups * plan.problem.neurons * plan.tile_tokens * 2);
    activity = carve.take(plan.problem.neurons * 4);
    partial_l1 = carve.take(groups * units * 4);
    bytes = carve.bytes();
  }
};

struct ForwardLayout {
  std::int64_t tiles = 0;     // of one chunk
  std::int64_t blocks = 0;    // of neurons
  std::int64_t capacity = 0;  // neurons rounded up to a multiple of kUnionStep

  std::size_t masks, columns, unions, counts, h, order, schedule, activity, partial_l1, bytes;

  explicit ForwardLayout(const FfnPlan& plan) {
    const std::int64_t all_tiles = ceil_div<std::int64_t>(plan.problem.tokens, kTileTokens);
    tiles = std::min<std::int64_t>(all_tiles, plan.chunk_tokens / kTileTokens);
    blocks = ceil_div<std::int64_t>(plan.problem.neurons, kBlockNeurons);
    capacity = ceil_div<std::int64_t>(plan.problem.neurons, kUnionStep) * kUnionStep;
    constexpr std::int64_t kColumnBytes = kColumnWords * 4;
    Parts carve;
    masks = carve.take(2 * tiles * blocks * kMaskWords * 4);
    columns = carve.take(2 * tiles * blocks * kBlockNeurons * kColumnBytes);
    unions = carve.take(tiles * capacity * 8);
    counts = carve.take(tiles * 4);
    h = carve.take(2 * tiles * capacity * kColumnBytes);
    order = carve.take(tiles * 4);
    schedule = carve.take(8 + tiles * ceil_div<std::int64_t>(capacity, kUnionItem) * 4);
    activity = carve.take(plan.problem.neurons * 4);
    partial_l1 = carve.take(all_tiles * 4);
    bytes = carve.bytes();
  }
};

// What the forward keeps for the backward: which columns of each half tile are in use.
struct SavedLayout {
  std::int64_t half_words;  // 32-bit words of a half tile's masks
  std::size_t masks = 0, bytes;

  explicit SavedLayout(const FfnProblem& problem)
      : half_words(ceil_div<std::int64_t>(problem.neurons, kBlockNeurons) * kMaskWords),
        bytes(2 * ceil_div<std::int64_t>(problem.tokens, kTileTokens) * half_words * 4) {}
};

struct BackwardLayout {
  std::int64_t chunks = 0;
  std::int64_t tiles = 0;     // of one chunk
  std::int64_t capacity = 0;  // as the forward's
  std::int64_t groups = 0;    // of blocks of kRowNeurons
  std::int64_t blocks = 0;    // of a group

  std::size_t masks, nonfinite, unions, counts, order, schedule;
  std::size_t coefficients[3];  // dg, du, h
  std::size_t lists, tokens, token_counts, projection_rows, hidden_rows;
  std::size_t totals[3];  // of the gradients of G, U, D
  std::size_t bytes;

  explicit BackwardLayout(const FfnPlan& plan) {
    const FfnProblem& problem = plan.problem;
    const std::int64_t inputs = problem.kind == FfnKind::kGated ? 2 : 1;  // projections of x
    const std::int64_t all_tiles = ceil_div<std::int64_t>(problem.tokens, kTileTokens);
    const std::int64_t most =
        std::min<std::int64_t>(plan.chunk_tokens / kTileTokens, kMaxBackwardTiles);
    chunks = ceil_div(all_tiles, most);
    tiles = chunks > 0 ? ceil_div(all_tiles, chunks) : 0;
    capacity = ceil_div<std::int64_t>(problem.neurons, kUnionStep) * kUnionStep;
    const std::int64_t all_blocks = ceil_div<std::int64_t>(problem.neurons, kRowNeurons);
    groups = ceil_div<std::int64_t>(all_blocks, kGroupBlocks);
    blocks = ceil_div(all_blocks, groups);

    constexpr std::int64_t kColumnBytes = kColumnWords * 4;
    Parts carve;
    masks = carve.take(2 * tiles * SavedLayout(problem).half_words * 4);
    nonfinite = carve.take(2 * tiles * 8);
    unions = carve.take(tiles * capacity * 8);
    counts = carve.take(tiles * 4);
    order = carve.take(tiles * 4);
    schedule = carve.take(8 + tiles * ceil_div<std::int64_t>(capacity, kUnionItem) * 4);
    for (const int i : {0, 1, 2}) {
      const bool exists = i != 1 || inputs == 2;
      coefficients[i] = carve.take(exists ? 2 * tiles * capacity * kColumnBytes : 0);
    }
    const std::int64_t rows = blocks * tiles * kTileTokens;
    lists = carve.take(blocks * 2 * tiles * 16);
    tokens = carve.take(rows * 4);
    token_counts = carve.take(blocks * 4);
    projection_rows = carve.take(rows * inputs * kRowNeurons * 2);
    hidden_rows = carve.take(rows * kRowNeurons * 2);
    for (const int i : {0, 1, 2}) {
      const bool exists = chunks > 1 && (i != 0 || inputs == 2);
      totals[i] = carve.take(exists ? problem.neurons * problem.hidden * 4 : 0);
    }
    bytes = carve.bytes();
  }
};

}  // namespace twell::cuda
