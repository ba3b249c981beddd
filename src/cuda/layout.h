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

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Offsets in bytes into the workspace; every part is 256-byte aligned.
struct ForwardLayout {
  std::int64_t tiles = 0;     // of one chunk
  std::int64_t blocks = 0;    // of neurons
  std::int64_t capacity = 0;  // neurons rounded up to a multiple of kUnionStep

  std::size_t masks = 0;
  std::size_t columns = 0;
  std::size_t unions = 0;
  std::size_t counts = 0;
  std::size_t h = 0;
  std::size_t order = 0;
  std::size_t schedule = 0;
  std::size_t activity = 0;
  std::size_t partial_l1 = 0;
  std::size_t bytes = 0;

  explicit ForwardLayout(const FfnPlan& plan) {
    const std::int64_t all_tiles = ceil_div<std::int64_t>(plan.problem.tokens, kTileTokens);
    tiles = std::min<std::int64_t>(all_tiles, plan.chunk_tokens / kTileTokens);
    blocks = ceil_div<std::int64_t>(plan.problem.neurons, kBlockNeurons);
    capacity = ceil_div<std::int64_t>(plan.problem.neurons, kUnionStep) * kUnionStep;
    constexpr std::int64_t kColumnBytes = kColumnWords * 4;
    masks = take(2 * tiles * blocks * kMaskWords * 4);
    columns = take(2 * tiles * blocks * kBlockNeurons * kColumnBytes);
    unions = take(tiles * capacity * 8);
    counts = take(tiles * 4);
    h = take(2 * tiles * capacity * kColumnBytes);
    order = take(tiles * 4);
    schedule = take(8 + tiles * ceil_div<std::int64_t>(capacity, kUnionItem) * 4);
    activity = take(plan.problem.neurons * 4);
    partial_l1 = take(all_tiles * 4);
  }

 private:
  std::size_t take(std::int64_t count) {
    const std::size_t offset = bytes;
    bytes += ceil_div<std::size_t>(static_cast<std::size_t>(count), 256) * 256;
    return offset;
  }
};

}  // namespace twell::cuda
