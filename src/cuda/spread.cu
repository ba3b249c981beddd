// The plain block's h: the columns, moved to their positions in the unions.

#include "cuda/check.h"
#include "cuda/forward.h"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kColumnWords / 4;  // threads of one column, 16 bytes each

__global__ void __launch_bounds__(kThreads) spread_kernel(const ForwardChunk chunk) {
  const int tile = blockIdx.x;
  const int padded = ceil_div(chunk.counts[tile], kUnionStep) * kUnionStep;
  const int lane = threadIdx.x % kLanes;
  const UnionEntry* entries = chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity;
  for (int half = 0; half < 2; ++half) {
    const std::size_t half_tile = 2 * tile + half;
    const auto* columns =
        reinterpret_cast<const uint4*>(chunk.columns) +
        half_tile * static_cast<std::size_t>(chunk.blocks) * kBlockNeurons * kLanes + lane;
    auto* h = reinterpret_cast<uint4*>(chunk.h) +
              half_tile * static_cast<std::size_t>(chunk.capacity) * kLanes + lane;
    for (int i = threadIdx.x / kLanes; i < padded; i += kThreads / kLanes) {
      const UnionEntry entry = entries[i];
      h[i * kLanes] =
          entry.in_half(half) ? columns[entry.source(half) * kLanes] : make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace

Status launch_spread(const ForwardChunk& chunk, cudaStream_t stream) {
  return launch(spread_kernel, chunk.tiles, kThreads, 0, stream, chunk);
}

}  // namespace twell::cuda
