// Products over the unions of a round on Hopper, for 128 tokens and 256 outputs at a time, or fewer
// where there are few tiles: y = h D, and the gated block's dx = dg G + du U, two such sums in one.
// A producer warpgroup gathers the rows of the weights; h arrives by TMA, tokens contiguous; two
// consumer warpgroups own a half tile each.

#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/quad.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/products.h"
#include "cuda/tensor_map.h"

namespace twell::cuda::sm90 {
namespace {

struct Config {
  static constexpr int kConsumers = 2;
  static constexpr int kProducers = 128;
  static constexpr int kThreads = kProducers + 128 * kConsumers;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
};

// The fewer outputs a CTA has, the more stages are on their way.
template <int kOutputs>
struct alignas(1024) Shared {
  static constexpr int kStages = kOutputs == 256 ? 4 : kOutputs == 128 ? 6 : 8;

  __nv_bfloat16 h[kStages][Config::kConsumers][kUnionStep * kHalfTokens];
  __nv_bfloat16 down[kStages][kUnionStep * kOutputs];
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
};

// y = Σ over pairs of h D.
struct Pair {
  CUtensorMap h;              // columns by union position
  CUtensorMap down;           // [neurons, hidden], for adjacent rows
  const __nv_bfloat16* rows;  // the same, to be gathered
};

template <int kPairs>
struct Operands {
  Pair pairs[kPairs];
};

template <int kOutputs>
struct Piece {
  int tile;
  int column;  // first of the outputs
  int steps;   // of one pair
  HalfColumns first_half, second_half;

  __device__ Piece(const ForwardChunk& chunk, int item, int strips)
      : tile(chunk.order[chunk.schedule->first_tile + item / strips]),
        column(item % strips * kOutputs),
        steps(ceil_div(chunk.counts[tile], kUnionStep)),
        first_half(chunk.halves[2 * tile]),
        second_half(chunk.halves[2 * tile + 1]) {}

  __device__ HalfColumns half(int half) const { return half == 0 ? first_half : second_half; }
};

// What a warp gathers in four steps, a UnionEntry::neuron in each lane. It is read four steps
// ahead, because a load may return only after the copies that were issued before it.
struct Lookahead {
  static constexpr int kSteps = 4;

  // [j], lane l: of step 2 j + l / 16 and in it row 16 (l % 16 / 4) + 4 warp + l % 4.
  std::uint32_t rows[2];
  std::uint32_t edges;  // lane l: of step l % 8 / 2 the first row (l even) or the last

  __device__ __forceinline__ void read(const UnionEntry* entries, int first, int steps) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int step = min(first + 2 * j + lane / 16, steps - 1);
      rows[j] = entries[step * kUnionStep + lane % 16 / 4 * 16 + warp * 4 + lane % 4].neuron;
    }
    const int step = min(first + lane % 8 / 2, steps - 1);
    edges = entries[step * kUnionStep + lane % 2 * (kUnionStep - 1)].neuron;
  }
  __device__ __forceinline__ UnionEntry first(int step) const {
    return {__shfl_sync(~0u, edges, 2 * step), 0};
  }
  __device__ __forceinline__ UnionEntry last(int step) const {
    return {__shfl_sync(~0u, edges, 2 * step + 1), 0};
  }
  // Row 16 turn + threadIdx.x / 8.
  __device__ __forceinline__ UnionEntry row(int step, int turn) const {
    const int lane = step % 2 * 16 + turn * 4 + static_cast<int>(threadIdx.x) % 32 / 8;
    return {__shfl_sync(~0u, step < 2 ? rows[0] : rows[1], lane), 0};
  }
};

// Eight threads copy a row, 128 bytes at a time, so that a thread needs an address for each of its
// four rows only: an address's registers are busy until the load units have read them.
template <int kOutputs, int kPairs>
__device__ __forceinline__ void produce(Shared<kOutputs>& shared, const ForwardChunk& chunk,
                                        const Operands<kPairs>& operands, int items, int strips) {
  constexpr int kPieces = 8;                           // 16-byte pieces of 64 outputs
  constexpr int kRows = Config::kProducers / kPieces;  // rows at a time
  static_assert(kRows == 16);                          // Lookahead's order
  constexpr int kTurns = kUnionStep / kRows;
  constexpr int kGroups = kOutputs / 64;
  constexpr int kGroupElements = kUnionStep * 64;  // 64 outputs of each row
  const int row = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const std::uint32_t target =
      ptx::shared_address(shared.down) + row * 128 + ((piece ^ (row % 8)) * 16);
  Ring<Shared<kOutputs>::kStages> ring;
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Piece<kOutputs> work(chunk, item, strips);
    const UnionEntry* entries = chunk.unions + static_cast<std::size_t>(work.tile) * chunk.capacity;
    const int column = work.column + piece * 8;
    Lookahead ahead = {};
    if (work.steps > 0) ahead.read(entries, 0, work.steps);
#pragma unroll 1
    for (int p = 0; p < kPairs; ++p) {
      const Pair& pair = operands.pairs[p];
      const __nv_bfloat16* source = pair.rows + column;
#pragma unroll 1
      for (int first = 0; first < work.steps; first += Lookahead::kSteps) {
        const Lookahead now = ahead;
        const int next = first + Lookahead::kSteps;
        ahead.read(entries, next < work.steps ? next : 0, work.steps);
        const int count = min(Lookahead::kSteps, work.steps - first);
#pragma unroll 1
        for (int step = 0; step < count; ++step, ring.advance()) {
          const UnionEntry first_entry = now.first(step);
          const bool adjacent = are_adjacent(first_entry, now.last(step));
          const __nv_bfloat16* sources[kTurns];
          bool in_use[kTurns];
#pragma unroll
          for (int turn = 0; turn < kTurns; ++turn) {
            const UnionEntry entry = now.row(step, turn);
            sources[turn] = source + static_cast<std::size_t>(entry.row()) * chunk.hidden;
            in_use[turn] = entry.in_use();
          }
          const int stage = ring.stage;
          ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
          if (threadIdx.x == 0) {
            const auto wants = [&](int half) {
              return work.half(half).has((first + step) * kUnionStep);
            };
            ptx::mbarrier_arrive_expect(&shared.full[stage],
                                        (wants(0) + wants(1)) * sizeof(shared.h[0][0]) +
                                            (adjacent ? sizeof(shared.down[0]) : 0));
            for (int half = 0; half < Config::kConsumers; ++half) {
              if (!wants(half)) continue;
              ptx::tma_load(shared.h[stage][half], &pair.h, &shared.full[stage], 0,
                            work.half(half).base + (first + step) * kUnionStep);
            }
            for (int group = 0; adjacent && group < kGroups; ++group) {
              ptx::tma_load(shared.down[stage] + group * kGroupElements, &pair.down,
                            &shared.full[stage], work.column + group * 64,
                            static_cast<int>(first_entry.row()));
            }
          }
          if (!adjacent) {
            const std::uint32_t stage_target = target + stage * sizeof(shared.down[0]);
#pragma unroll
            for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
              for (int group = 0; group < kGroups; ++group) {
                ptx::copy_async_16(stage_target + turn * kRows * 128 + group * kGroupElements * 2,
                                   sources[turn] + group * 64,
                                   in_use[turn] && column + group * 64 < chunk.hidden);
              }
            }
          }
          ptx::copy_async_arrive(&shared.full[stage]);
        }
      }
    }
  }
}

template <int kOutputs, int kPairs>
__device__ __forceinline__ void consume(Shared<kOutputs>& shared, const ForwardChunk& chunk,
                                        __nv_bfloat16* y, int items, int strips, int consumer) {
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  float acc[kOutputs / 2];
  Ring<Shared<kOutputs>::kStages> ring;
  const auto release = [&](int stage) {
    if (lane == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
  };
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Piece<kOutputs> piece(chunk, item, strips);
    const HalfColumns own = piece.half(consumer);
#pragma unroll
    for (float& value : acc) value = 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      skip(ring, own.first, shared.full, release);
      accumulate<kOutputs, ptx::Major::kOuter, ptx::Major::kOuter, Filler::kTmaAndThreads>(
          acc, ring, own.steps(), shared.full, [&](int stage) { return shared.h[stage][consumer]; },
          [&](int stage) { return shared.down[stage]; }, release);
      if (p + 1 < kPairs) skip(ring, piece.steps - own.end, shared.full, release);
    }

    // Row l of a warp's 16 is token l / 2 + 8 (l % 2): see the columns in forward.h.
    const int row = lane / 4;
    const int token =
        piece.tile * kTileTokens + consumer * kHalfTokens + warp * 16 + row / 2 + row % 2 * 8;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      __nv_bfloat16* out = y + static_cast<std::size_t>(token + 4 * s) * chunk.hidden;
#pragma unroll
      for (int j = 0; j < kOutputs / 8; j += 4) {
        const float* v = acc + 4 * j + 2 * s;
        const uint4 words =
            transpose_in_quad(make_uint4(ptx::pack(v[0], v[1]), ptx::pack(v[4], v[5]),
                                         ptx::pack(v[8], v[9]), ptx::pack(v[12], v[13])),
                              quad);
        const int column = piece.column + 8 * (j + quad);
        if (token + 4 * s < chunk.tokens && column < chunk.hidden) {
          *reinterpret_cast<uint4*>(out + column) = words;
        }
      }
    }
    skip(ring, piece.steps - own.end, shared.full, release);
  }
}

template <int kOutputs, int kPairs>
__global__ void __launch_bounds__(Config::kThreads, 1)
    down_kernel(const ForwardChunk chunk, const __grid_constant__ Operands<kPairs> operands,
                __nv_bfloat16* __restrict__ y) {
  const int strips = ceil_div(chunk.hidden, kOutputs);
  const int items = chunk.schedule->tiles * strips;
  if (items == 0) return;
  extern __shared__ std::uint8_t raw[];
  auto& shared = aligned_shared<Shared<kOutputs>>(raw);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < shared.kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], Config::kProducers + 1);
      ptx::mbarrier_init(&shared.empty[stage], Config::kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::register_decrease<Config::kProducerRegisters>();
    produce(shared, chunk, operands, items, strips);
  } else {
    ptx::register_increase<Config::kConsumerRegisters>();
    consume<kOutputs, kPairs>(shared, chunk, y, items, strips, warpgroup - 1);
  }
}

Status make_pair(Pair& pair, const ForwardChunk& chunk, const std::uint32_t* h, const void* down) {
  pair.rows = static_cast<const __nv_bfloat16*>(down);
  Status status = make_tensor_map(pair.h, h, chunk.room, kHalfTokens, kUnionStep);
  if (!status.ok()) return status;
  return make_tensor_map(pair.down, down, chunk.neurons, chunk.hidden, kUnionStep);
}

template <int kPairs>
Status launch_pairs(const ForwardChunk& chunk, const std::uint32_t* const (&h)[kPairs],
                    const void* const (&down)[kPairs], void* y, int multiprocessors,
                    cudaStream_t stream) {
  Operands<kPairs> operands;
  for (int p = 0; p < kPairs; ++p) {
    if (Status status = make_pair(operands.pairs[p], chunk, h[p], down[p]); !status.ok()) {
      return status;
    }
  }
  const auto launch_for = [&]<int kOutputs>() {
    const int items = chunk.tiles * ceil_div(chunk.hidden, kOutputs);
    return launch(down_kernel<kOutputs, kPairs>, std::min(items, multiprocessors), Config::kThreads,
                  sizeof(Shared<kOutputs>) + alignof(Shared<kOutputs>), stream, chunk, operands,
                  static_cast<__nv_bfloat16*>(y));
  };
  const int outputs = down_outputs(chunk.tiles, chunk.hidden, multiprocessors);
  return outputs == kSmallestOutputs ? launch_for.template operator()<kSmallestOutputs>()
         : outputs == kDownOutputs   ? launch_for.template operator()<kDownOutputs>()
                                     : launch_for.template operator()<kDownOutputs / 2>();
}

}  // namespace

Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                   cudaStream_t stream) {
  return launch_pairs<1>(chunk, {chunk.h}, {down}, y, multiprocessors, stream);
}

Status launch_input_gradient(const BackwardChunk& chunk, const FfnWeights& weights, void* dx,
                             int multiprocessors, cudaStream_t stream) {
  if (!weights.gate) {
    return launch_pairs<1>(chunk.forward, {chunk.dg}, {weights.up}, dx, multiprocessors, stream);
  }
  return launch_pairs<2>(chunk.forward, {chunk.dg, chunk.du}, {weights.gate, weights.up}, dx,
                         multiprocessors, stream);
}

}  // namespace twell::cuda::sm90
