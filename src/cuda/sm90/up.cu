// The up projection over the unions of a chunk on Hopper: h = columns ⊙ (x Uᵀ), for 128 tokens
// and up to 256 union neurons at a time. A producer warpgroup gathers the rows of U with 16-byte
// copies into the swizzled layout, beside TMA tiles of x; two consumer warpgroups own a half tile
// each.

#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/products.h"
#include "cuda/tensor_map.h"

namespace twell::cuda::sm90 {
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
                                        const CUtensorMap& x_map, const CUtensorMap& up_map,
                                        const __nv_bfloat16* up, int first_token) {
  constexpr int kPieces = kTileHidden / 8;             // 16-byte pieces of a row
  constexpr int kRows = Config::kProducers / kPieces;  // rows at a time
  constexpr int kTurns = kUnionStep / kRows;           // to gather kUnionStep rows
  constexpr int kGroups = kUnionItem / kUnionStep;
  constexpr int kGroupElements = kUnionStep * kTileHidden;
  const int row = static_cast<int>(threadIdx.x) / kPieces;  // of the first kRows
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  const std::uint32_t target =
      ptx::shared_address(shared.up) + row * 128 + ((piece ^ (row % 8)) * 16);
  const int items = chunk.schedule->item_count;
  Ring<Config::kStages> ring;
#pragma unroll 1
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const UnionItem item = chunk.schedule->items[i];
    const UnionEntry* entries = chunk.unions +
                                static_cast<std::size_t>(item.tile) * chunk.capacity +
                                item.first * kUnionItem;
    std::uint32_t offsets[kGroups * kTurns];  // in pieces of 16 bytes
    bool gathered[kGroups];  // by all threads; else by TMA, the rows being adjacent
    int group_row[kGroups];
    int bytes = sizeof(shared.x[0]);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const bool exists = group <= item.steps;
      const UnionEntry* mine = entries + (exists ? group * kUnionStep : 0);
      group_row[group] = mine[0].row();
      const bool adjacent = exists && mine[kUnionStep - 1].row() == mine[0].row() + kUnionStep - 1;
      gathered[group] = exists && !adjacent;
      if (!exists) group_row[group] = -1;
      bytes += adjacent ? kGroupElements * 2 : 0;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        offsets[group * kTurns + turn] =
            mine[turn * kRows + row].row() * (chunk.hidden / 8) + piece;
      }
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.full[stage], bytes);
        ptx::tma_load(shared.x[stage], &x_map, &shared.full[stage], step * kTileHidden,
                      first_token + item.tile * kTileTokens);
      }
      const bool inside = step * kTileHidden + piece * 8 < chunk.hidden;
      const uint4* source = reinterpret_cast<const uint4*>(up) + (inside ? step * kPieces : 0);
      const std::uint32_t stage_target = target + stage * sizeof(shared.up[0]);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (gathered[group]) {
#pragma unroll
          for (int turn = 0; turn < kTurns; ++turn) {
            const int at = group * kTurns + turn;
            ptx::copy_async_16(stage_target + at * kRows * 128, source + (inside ? offsets[at] : 0),
                               inside);
          }
        } else if (threadIdx.x == 0 && group_row[group] >= 0) {
          ptx::tma_load(shared.up[stage] + group * kGroupElements, &up_map, &shared.full[stage],
                        step * kTileHidden, group_row[group]);
        }
      }
      ptx::copy_async_arrive(&shared.full[stage]);
    }
  }
}

// The two positions of an item that this thread looks up for its half: where their columns are.
struct Lookup {
  std::uint32_t sources[2] = {Config::kAbsent, Config::kAbsent};

  __device__ Lookup(const ForwardChunk& chunk, UnionItem item, int consumer) {
    const int first = 2 * static_cast<int>(threadIdx.x % 128);
    if (first >= (item.steps + 1) * kUnionStep) return;
    const uint4 pair = *reinterpret_cast<const uint4*>(
        chunk.unions + static_cast<std::size_t>(item.tile) * chunk.capacity +
        item.first * kUnionItem + first);
    const UnionEntry entries[2] = {{pair.x, pair.y}, {pair.z, pair.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (entries[i].in_half(consumer)) sources[i] = entries[i].source(consumer);
    }
  }

  // Shares the look-ups of the warpgroup.
  __device__ void publish(std::uint32_t (&all)[kUnionItem], int consumer) const {
    reinterpret_cast<uint2*>(all)[threadIdx.x % 128] = make_uint2(sources[0], sources[1]);
    ptx::named_barrier_sync(1 + consumer, 128);
  }
};

template <int kN>
__device__ __forceinline__ void consume_item(Shared& shared, Ring<Config::kStages>& ring,
                                             const std::uint32_t (&sources)[kUnionItem],
                                             const ForwardChunk& chunk, UnionItem item,
                                             int consumer) {
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  const std::size_t half_tile = 2 * item.tile + consumer;
  const int word = warp * 8 + lane / 4;

  // The gate's values arrive while the products run.
  const std::uint32_t* columns =
      chunk.columns + half_tile * chunk.blocks * kBlockNeurons * kColumnWords + word;
  std::uint32_t g[kN / 4];
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const uint2 source = *reinterpret_cast<const uint2*>(&sources[8 * j + 2 * quad]);
    g[2 * j] = source.x == Config::kAbsent ? 0 : columns[source.x * kColumnWords];
    g[2 * j + 1] = source.y == Config::kAbsent ? 0 : columns[source.y * kColumnWords];
  }
  const int valid = chunk.counts[item.tile] - item.first * kUnionItem - 2 * quad;

  float acc[kN / 2];
  multiply<kN, ptx::Major::kInner, ptx::Major::kInner, Filler::kTmaAndThreads>(
      acc, ring, ceil_div(chunk.hidden, kTileHidden), shared.full,
      [&](int stage) { return shared.x[stage] + consumer * kHalfTokens * kTileHidden; },
      [&](int stage) { return shared.up[stage]; },
      [&](int stage) {
        if (lane == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
      });

  std::uint32_t* h =
      chunk.h + (half_tile * chunk.capacity + item.first * kUnionItem + 2 * quad) * kColumnWords +
      word;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const float* u = acc + 4 * j + parity;
      const std::uint32_t value = ptx::pack(ptx::low_half(g[2 * j + parity]) * u[0],
                                            ptx::high_half(g[2 * j + parity]) * u[2]);
      const int position = 8 * j + parity;
      h[position * kColumnWords] = position < valid ? value : 0;  // padding is no 0 · inf
    }
  }
}

__device__ __forceinline__ void consume(Shared& shared, const ForwardChunk& chunk, int consumer) {
  const int items = chunk.schedule->item_count;
  if (static_cast<int>(blockIdx.x) >= items) return;
  Ring<Config::kStages> ring;
  UnionItem next = chunk.schedule->items[blockIdx.x];
  Lookup lookup(chunk, next, consumer);
  int turn = 0;
#pragma unroll 1
  for (int i = blockIdx.x; i < items; i += gridDim.x, turn ^= 1) {
    const UnionItem item = next;
    auto& sources = shared.sources[turn][consumer];
    lookup.publish(sources, consumer);
    if (i + static_cast<int>(gridDim.x) < items) {
      next = chunk.schedule->items[i + gridDim.x];
      lookup = Lookup(chunk, next, consumer);
    }
    switch (item.steps) {
      case 0:
        consume_item<64>(shared, ring, sources, chunk, item, consumer);
        break;
      case 1:
        consume_item<128>(shared, ring, sources, chunk, item, consumer);
        break;
      case 2:
        consume_item<192>(shared, ring, sources, chunk, item, consumer);
        break;
      default:
        consume_item<256>(shared, ring, sources, chunk, item, consumer);
    }
  }
}

__global__ void __launch_bounds__(Config::kThreads, 1)
    up_kernel(const ForwardChunk chunk, const __grid_constant__ CUtensorMap x_map,
              const __grid_constant__ CUtensorMap up_map, const __nv_bfloat16* __restrict__ up,
              int first_token) {
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
    produce(shared, chunk, x_map, up_map, up, first_token);
  } else {
    ptx::register_increase<Config::kConsumerRegisters>();
    consume(shared, chunk, warpgroup - 1);
  }
}

}  // namespace

Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream) {
  CUtensorMap x_map, up_map;
  if (Status status = make_tensor_map(x_map, x.x, x.rows, chunk.hidden, kTileTokens);
      !status.ok()) {
    return status;
  }
  if (Status status = make_tensor_map(up_map, up, chunk.neurons, chunk.hidden, kUnionStep);
      !status.ok()) {
    return status;
  }
  return launch(up_kernel, multiprocessors, Config::kThreads, sizeof(Shared) + alignof(Shared),
                stream, chunk, x_map, up_map, static_cast<const __nv_bfloat16*>(up), x.first);
}

}  // namespace twell::cuda::sm90
