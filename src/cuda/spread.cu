// The plain block's h, which is g: the columns, moved to their positions in the unions.

#include "cuda/check.h"
#include "cuda/forward.h"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kColumnWords / 4;  // threads of one column, 16 bytes each

// Of a word's two tokens.
__device__ __forceinline__ int count_active(std::uint32_t g) {
  return ((g & 0x7fffu) != 0) + ((g & 0x7fff0000u) != 0);
}

__global__ void __launch_bounds__(kThreads) spread_kernel(const ForwardChunk chunk) {
  const int tile = blockIdx.x;
  const int place = chunk.place(tile);
  int active = 0;
  const int lane = threadIdx.x % kLanes;
  const UnionEntry* entries = chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity;
  for (int half = 0; half < 2; ++half) {
    const std::size_t half_tile = 2 * tile + half;
    const auto* columns =
        reinterpret_cast<const uint4*>(chunk.columns) +
        half_tile * static_cast<std::size_t>(chunk.blocks) * kBlockNeurons * kLanes + lane;
    const HalfColumns own = chunk.halves[half_tile];
    const std::int64_t kept = chunk.kept_base(place, tile, half);
    auto* h = reinterpret_cast<uint4*>(chunk.h) + std::int64_t{own.base} * kLanes + lane;
    auto* g = reinterpret_cast<uint4*>(chunk.saved.g) + kept * kLanes + lane;
    for (int i = own.first * kUnionStep + threadIdx.x / kLanes; i < own.end * kUnionStep;
         i += kThreads / kLanes) {
      const UnionEntry entry = entries[i];
      const uint4 words =
          entry.in_half(half) ? columns[entry.source(half) * kLanes] : make_uint4(0, 0, 0, 0);
      h[i * kLanes] = words;
      if (place >= 0) g[i * kLanes] = words;
      active += count_active(words.x) + count_active(words.y) + count_active(words.z) +
                count_active(words.w);
    }
  }
  active = __reduce_add_sync(~0u, active);
  if (chunk.saved.active && threadIdx.x % 32 == 0) atomicAdd(chunk.saved.active, active);
}

}  // namespace

Status launch_spread(const ForwardChunk& chunk, cudaStream_t stream) {
  return launch(spread_kernel, chunk.tiles, kThreads, 0, stream, chunk);
}

}  // namespace twell::cuda
