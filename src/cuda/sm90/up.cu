// The up projection over the unions of a chunk on Hopper: h = columns ⊙ (x Uᵀ), for 128 tokens
// and up to 256 union neurons at a time. A producer warpgroup gathers the rows of U with 16-byte
// copies into the swizzled layout, beside TMA tiles of x; two consumer warpgroups own a half tile
// each.

#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/forward.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/pipeline.cuh"

namespace twell::cuda {
namespace {

struct Config {
  static constexpr int kStages = 4;
  static constexpr int kConsumers = 2;
  static constexpr int kProducers = 128;
  static constexpr int kThreads = kProducers + 128 * kConsumers;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static constexpr std::uint32_t kAbsent = ~0u;
};

struct alignas(1024) Shared {
  __nv_bfloat16 x[Config::kStages][kTileTokens * kTileHidden];
  __nv_bfloat16 up[Config::kStages][kUnionItem * kTileHidden];
  std::uint64_t full[Config::kStages];
  std::uint64_t empty[Config::kStages];
  std::uint32_t sources[2][Config::kConsumers][kUnionItem];  // by turn
};

__device__ __forceinline__ void produce(Shared& shared, const ForwardChunk& chunk,
                                        const CUtensorMap& x_map, const __nv_bfloat16* up,
                                        int first_token) {
  constexpr int kPieces = kTileHidden / 8;                   // 16-byte pieces of a row
  constexpr int kRows = Config::kProducers / kPieces;        // rows at a time
  const int row = static_cast<int>(threadIdx.x) / kPieces;   // of the first kRows
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  const std::uint32_t target = ptx::shared_address(shared.up) + row * 128 +
                               ((piece ^ (row % 8)) * 16);
  const int items = chunk.schedule->item_count;
  Ring<Config::kStages> ring;
  LaggedArrival<Config::kStages> arrival;
#pragma unroll 1
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const UnionItem item = chunk.schedule->items[i];
    const UnionEntry* entries =
        chunk.unions + static_cast<std::size_t>(item.tile) * chunk.capacity +
        item.first * kUnionItem;
    const int groups = (item.steps + 1) * (kUnionStep / kRows);
    std::uint32_t offsets[kUnionItem / kRows];  // in pieces of 16 bytes
#pragma unroll
    for (int group = 0; group < kUnionItem / kRows; ++group) {
      offsets[group] = group < groups
                           ? entries[group * kRows + row].row() * (chunk.hidden / 8) + piece
                           : 0;
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.full[stage], sizeof(shared.x[0]));
        ptx::tma_load(shared.x[stage], &x_map, &shared.full[stage], step * kTileHidden,
                      first_token + item.tile * kTileTokens);
      }
      const bool inside = step * kTileHidden + piece * 8 < chunk.hidden;
      const uint4* source = reinterpret_cast<const uint4*>(up) + (inside ? step * kPieces : 0);
      const std::uint32_t stage_target = target + stage * sizeof(shared.up[0]);
#pragma unroll
      for (int group = 0; group < kUnionItem / kRows; ++group) {
        if (group < groups) {
          ptx::copy_async_16(stage_target + group * kRows * 128,
                             source + (inside ? offsets[group] : 0), inside);
        }
      }
      arrival.step(shared.full, stage);
    }
  }
  arrival.drain(shared.full);
}

// Where this consumer's column of each position of an item is; kAbsent if its half has none.
__device__ __forceinline__ void fetch_sources(std::uint32_t (&sources)[kUnionItem],
                                              const ForwardChunk& chunk, UnionItem item,
                                              int consumer) {
  const int first = 2 * static_cast<int>(threadIdx.x % 128);
  if (first >= (item.steps + 1) * kUnionStep) return;
  const uint4 pair = *reinterpret_cast<const uint4*>(
      chunk.unions + static_cast<std::size_t>(item.tile) * chunk.capacity +
      item.first * kUnionItem + first);
  const UnionEntry even = {pair.x, pair.y};
  const UnionEntry odd = {pair.z, pair.w};
  sources[first] = even.in_half(consumer) ? even.source(consumer) : Config::kAbsent;
  sources[first + 1] = odd.in_half(consumer) ? odd.source(consumer) : Config::kAbsent;
}

template <int kN>
__device__ __forceinline__ void consume_item(Shared& shared, Ring<Config::kStages>& ring,
                                             const std::uint32_t (&sources)[kUnionItem],
                                             const ForwardChunk& chunk, UnionItem item,
                                             int consumer) {
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  float acc[kN / 2];
  multiply<kN, ptx::Major::kInner, ptx::Major::kInner>(
      acc, ring, ceil_div(chunk.hidden, kTileHidden), shared.full,
      [&](int stage) { return shared.x[stage] + consumer * kHalfTokens * kTileHidden; },
      [&](int stage) { return shared.up[stage]; },
      [&](int stage) {
        if (lane == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
      });

  const int half_tile = 2 * item.tile + consumer;
  const int word = warp * 8 + lane / 4;
  const std::uint32_t* columns =
      chunk.columns +
      static_cast<std::size_t>(half_tile) * chunk.blocks * kBlockNeurons * kColumnWords + word;
  std::uint32_t* h = chunk.h +
                     (static_cast<std::size_t>(half_tile) * chunk.capacity +
                      item.first * kUnionItem + 2 * quad) *
                         kColumnWords +
                     word;
  const int valid = chunk.counts[item.tile] - item.first * kUnionItem - 2 * quad;
  constexpr int kBatch = 8;  // groups of 8 positions whose loads are in flight together
#pragma unroll
  for (int first = 0; first < kN / 8; first += kBatch) {
    std::uint32_t g[2 * kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint2 source =
          *reinterpret_cast<const uint2*>(&sources[8 * (first + i) + 2 * quad]);
      g[2 * i] = source.x == Config::kAbsent ? 0 : columns[source.x * kColumnWords];
      g[2 * i + 1] = source.y == Config::kAbsent ? 0 : columns[source.y * kColumnWords];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const float* u = acc + 4 * (first + i) + parity;
        const int position = 8 * (first + i) + parity;
        const std::uint32_t value = ptx::pack(ptx::low_half(g[2 * i + parity]) * u[0],
                                              ptx::high_half(g[2 * i + parity]) * u[2]);
        h[position * kColumnWords] = position < valid ? value : 0;  // padding is no 0 · inf
      }
    }
  }
}

__device__ __forceinline__ void consume(Shared& shared, const ForwardChunk& chunk, int consumer) {
  const int items = chunk.schedule->item_count;
  Ring<Config::kStages> ring;
  int turn = 0;
#pragma unroll 1
  for (int i = blockIdx.x; i < items; i += gridDim.x, turn ^= 1) {
    const UnionItem item = chunk.schedule->items[i];
    auto& sources = shared.sources[turn][consumer];
    fetch_sources(sources, chunk, item, consumer);
    ptx::named_barrier_sync(1 + consumer, 128);
    switch (item.steps) {
      case 0: consume_item<64>(shared, ring, sources, chunk, item, consumer); break;
      case 1: consume_item<128>(shared, ring, sources, chunk, item, consumer); break;
      case 2: consume_item<192>(shared, ring, sources, chunk, item, consumer); break;
      default: consume_item<256>(shared, ring, sources, chunk, item, consumer);
    }
  }
}

__global__ void __launch_bounds__(Config::kThreads, 1)
    up_kernel(const ForwardChunk chunk, const __grid_constant__ CUtensorMap x_map,
              const __nv_bfloat16* __restrict__ up, int first_token) {
  extern __shared__ std::uint8_t raw[];
  Shared& shared = aligned_shared<Shared>(raw);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], Config::kProducers + 1);
      ptx::mbarrier_init(&shared.empty[stage], Config::kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::register_decrease<Config::kProducerRegisters>();
    produce(shared, chunk, x_map, up, first_token);
  } else {
    ptx::register_increase<Config::kConsumerRegisters>();
    consume(shared, chunk, warpgroup - 1);
  }
}

}  // namespace

Status launch_up(const ForwardChunk& chunk, const CUtensorMap& x_map, const void* up,
                 int first_token, int multiprocessors, cudaStream_t stream) {
  return launch(up_kernel, multiprocessors, Config::kThreads, sizeof(Shared) + alignof(Shared),
                stream, chunk, x_map, static_cast<const __nv_bfloat16*>(up), first_token);
}

}  // namespace twell::cuda
