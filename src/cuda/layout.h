#pragma once
// How the CUDA forward cuts its work, and how large its intermediates are. Host code without a
// CUDA header, shared by the planner and the kernels.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "twell/ffn.h"

namespace twell::cuda {

inline constexpr int kTileTokens = 128;    // tokens that share one union
inline constexpr int kHalfTokens = 64;     // tokens of one warpgroup's products
inline constexpr int kBlockNeurons = 256;  // neurons of one piece of gate work
inline constexpr int kMaskWords = kBlockNeurons / 32;
inline constexpr int kColumnWords = kHalfTokens / 2;
inline constexpr int kUnionStep = 64;   // unions are padded to a multiple of this
inline constexpr int kUnionItem = 256;  // union positions of one piece of up work
inline constexpr int kMaxChunkTiles = 1024;

// Up to kMaxDecodeTokens tokens take the kernels that read each weight row at most once.
inline constexpr int kMaxDecodeTokens = 64;
inline constexpr int kDecodeTokens = 16;  // tokens of a group
inline constexpr int kDecodeNeurons = 8;  // neurons of the smallest piece of work

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline bool takes_decode_path(const FfnPlan& plan) { return plan.tile_tokens == kDecodeTokens; }

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
  std::int64_t groups;  // of tokens
  std::size_t masks, h, activity, partial_l1, bytes;

  explicit DecodeLayout(const FfnProblem& problem)
      : groups(ceil_div<std::int64_t>(problem.tokens, kDecodeTokens)) {
    Parts carve;
    masks = carve.take(groups * problem.neurons / 8);
    h = carve.take(groups * problem.neurons * kDecodeTokens * 2);
    activity = carve.take(problem.neurons * 4);
    partial_l1 = carve.take(groups * ceil_div<std::int64_t>(problem.neurons, kDecodeNeurons) * 4);
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

}  // namespace twell::cuda
