// From the column masks of a chunk to the union of each token tile, where the columns over it lie
// and where those of g and u are kept, and the rounds and the order of the work. One CTA per tile;
// the last to finish makes all but the unions.

#include "cuda/check.h"
#include "cuda/forward.h"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStepCounts = kUnionItem / kUnionStep;

// The sum of `value` over the threads before this one; `total` receives that over all. All
// threads call; `scratch`, 16-byte aligned so that its vector loads touch nothing else, may be
// reused after the next call with the other scratch.
__device__ __forceinline__ int exclusive_sum(int value, int (&scratch)[kWarps], int& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  return before + sum - value;
}

// The sum of `value` over the threads before this one in its group of 8: one block's words.
__device__ __forceinline__ int sum_in_block(int value) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kMaskWords; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance, kMaskWords);
    if (threadIdx.x % kMaskWords >= static_cast<unsigned>(distance)) sum += other;
  }
  return sum - value;
}

__device__ __forceinline__ void write_union(const ForwardChunk& chunk, int tile) {
  alignas(16) __shared__ int scratch[2][kWarps];
  const int words = chunk.blocks * kMaskWords;
  const std::uint32_t* masks = chunk.masks + static_cast<std::size_t>(2 * tile) * words;
  UnionEntry* out = chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity;
  int count = 0;
  int turn = 0;
  for (int first = 0; first < words; first += kThreads, turn ^= 1) {
    const int word = first + static_cast<int>(threadIdx.x);
    std::uint32_t used[2] = {0, 0};
    if (word < words) {
      used[0] = masks[word];
      used[1] = masks[words + word];
    }
    const int block = word / kMaskWords;
    const int source[2] = {block * kBlockNeurons + sum_in_block(__popc(used[0])),
                           block * kBlockNeurons + sum_in_block(__popc(used[1]))};
    int total;
    int position = count + exclusive_sum(__popc(used[0] | used[1]), scratch[turn], total);
    if (chunk.word_first && word < words) chunk.word_first[tile * words + word] = position;
    for (std::uint32_t rest = used[0] | used[1]; rest != 0; rest &= rest - 1) {
      const int bit = __ffs(rest) - 1;
      const std::uint32_t below = (1u << bit) - 1;
      UnionEntry entry;
      entry.neuron = word * 32 + bit;
      entry.sources = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if ((used[half] >> bit) & 1u) {
          entry.neuron |= 1u << (16 + half);
          entry.sources |= (source[half] + __popc(used[half] & below)) << (16 * half);
        }
      }
      out[position++] = entry;
    }
    count += total;
  }
  const int padded = ceil_div(count, kUnionStep) * kUnionStep;
  if (count + static_cast<int>(threadIdx.x) < padded) out[count + threadIdx.x] = UnionEntry{0, 0};
  if (threadIdx.x == 0) chunk.counts[tile] = count;
}

// How many steps the largest items have: as many as they may, unless the multiprocessors, each of
// which takes every so-manieth item, longest first, would be done sooner with smaller ones. An item
// costs a step more than it has, for its tokens.
__device__ __forceinline__ int choose_steps(const ForwardChunk& chunk, const int* counts,
                                            int tiles) {
  __shared__ int items[kStepCounts][kStepCounts];  // [most - 1, steps - 1]
  __shared__ int costs[kStepCounts];
  if (chunk.multiprocessors == 0) return kStepCounts;
  if (threadIdx.x < kStepCounts * kStepCounts) (&items[0][0])[threadIdx.x] = 0;
  __syncthreads();
  for (int tile = threadIdx.x; tile < tiles; tile += kThreads) {
    const int all = ceil_div(counts[tile], kUnionStep);
#pragma unroll
    for (int most = 1; most <= kStepCounts; ++most) {
      if (all >= most) atomicAdd(&items[most - 1][most - 1], all / most);
      if (all % most != 0) atomicAdd(&items[most - 1][all % most - 1], 1);
    }
  }
  __syncthreads();
  if (const int most = static_cast<int>(threadIdx.x) + 1; most <= kStepCounts) {
    int cost = 0, end = 0;
    int next = 0;  // of the items of the multiprocessor with most to do
    for (int steps = most; steps > 0; --steps) {
      end += items[most - 1][steps - 1];
      const int taken = end > next ? ceil_div(end - next, chunk.multiprocessors) : 0;
      next += taken * chunk.multiprocessors;
      cost += taken * (steps + 1);
    }
    costs[most - 1] = cost;
  }
  __syncthreads();
  int best = kStepCounts;
#pragma unroll
  for (int most = kStepCounts - 1; most > 0; --most) {
    if (costs[most - 1] < costs[best - 1]) best = most;
  }
  return best;
}

// Items of tiles whose g and u must be made anew, then all others, each longest first, and tiles by
// falling count; ties by index, so that it is deterministic.
__device__ __forceinline__ void write_schedule(const ForwardChunk& chunk, Schedule& round,
                                               int first_tile, int tiles) {
  __shared__ int counts[kMaxChunkTiles];  // of the round's tiles
  alignas(16) __shared__ int scratch[2][kWarps];
  const bool backward = chunk.half_places != nullptr;
  for (int i = threadIdx.x; i < tiles; i += kThreads) {
    counts[i] = __ldcg(&chunk.counts[first_tile + i]);
  }
  __syncthreads();

  if (threadIdx.x == 0) {
    round.first_tile = first_tile;
    round.tiles = tiles;
  }
  if (tiles == 0) {
    if (threadIdx.x == 0) round.item_count = round.anew = 0;
    return;
  }
  const int most = choose_steps(chunk, counts, tiles);
  int items = 0;
  int turn = 0;
  const auto append = [&](int steps, bool anew) {
    for (int first = 0; first < tiles; first += kThreads, turn ^= 1) {
      const int i = first + static_cast<int>(threadIdx.x);
      const int tile = first_tile + i;
      const bool takes = i < tiles && (backward && chunk.kept_place(tile) < 0) == anew;
      const int all = takes ? ceil_div(counts[i], kUnionStep) : 0;
      const int whole = all / most;
      const bool has_rest = steps < most && all % most == steps;
      const int mine = steps == most ? whole : has_rest;
      int total;
      int at = items + exclusive_sum(mine, scratch[turn], total);
      for (int k = 0; k < mine; ++k) {
        UnionItem& item = round.items[at + k];
        item.tile = tile;
        item.first = (has_rest ? whole : k) * most;
        item.steps = steps - 1;
      }
      items += total;
    }
  };
  for (int steps = most; backward && steps > 0; --steps) append(steps, true);
  if (threadIdx.x == 0) round.anew = items;
  for (int steps = most; steps > 0; --steps) append(steps, false);
  if (threadIdx.x == 0) round.item_count = items;

  for (int i = threadIdx.x; i < tiles; i += kThreads) {
    int rank = 0;
    for (int other = 0; other < tiles; ++other) {
      rank += counts[other] > counts[i] || (counts[other] == counts[i] && other < i);
    }
    chunk.order[first_tile + rank] = first_tile + i;
  }
  __syncthreads();
}

// Each round takes tiles, one after the other, as long as their positions find room and until it
// has its share of as few rounds as may do. That is never more rounds than if each took only the
// tiles that find room with all neurons in use.
__device__ __forceinline__ void write_rounds(const ForwardChunk& chunk) {
  alignas(16) __shared__ int scratch[2][kWarps];
  const auto padded = [&](int tile) {
    const int count = tile < chunk.tiles ? __ldcg(&chunk.counts[tile]) : 0;
    return ceil_div(count, kUnionStep) * kUnionStep;
  };
  int mine = 0;
  for (int tile = threadIdx.x; tile < chunk.tiles; tile += kThreads) mine += padded(tile);
  int all;
  exclusive_sum(mine, scratch[1], all);
  const int share = ceil_div(all, max(1, ceil_div(all, chunk.positions)));

  int next = 0;  // tile
  for (int i = 0; i < chunk.rounds; ++i) {
    const int first = next;
    int taken = 0;  // positions
    int fitting = next < chunk.tiles ? kThreads : 0;
    while (fitting == kThreads) {
      const int tile = next + static_cast<int>(threadIdx.x);
      const int own = padded(tile);
      int total;
      const int position = taken + exclusive_sum(own, scratch[0], total);
      const bool fits =
          tile < chunk.tiles && position <= share && position + own <= chunk.positions;
      if (fits) chunk.first_positions[tile] = position;
      exclusive_sum(fits, scratch[1], fitting);
      taken += total;
      next += fitting;
    }
    write_schedule(chunk, chunk.schedule_of(i), first, next - first);
  }
}

// One tile after the other, from where the chunk before ended, so that it is deterministic.
__device__ __forceinline__ void write_places(const ForwardChunk& chunk) {
  alignas(16) __shared__ int scratch[2][kWarps];
  const SavedColumns& saved = chunk.saved;
  int taken = saved.first ? 0 : *saved.taken;
  int turn = 0;
  for (int first = 0; first < chunk.tiles; first += kThreads, turn ^= 1) {
    const int tile = first + static_cast<int>(threadIdx.x);
    const int count = tile < chunk.tiles ? __ldcg(&chunk.counts[tile]) : 0;
    const int padded = ceil_div(count, kUnionStep) * kUnionStep;
    int total;
    const int before = taken + exclusive_sum(padded, scratch[turn], total);
    const int place = min(before, saved.positions);
    if (tile < chunk.tiles) saved.places[tile] = place + padded <= saved.positions ? place : -1;
    taken = min(taken + total, saved.positions);
  }
  if (threadIdx.x != 0) return;
  *saved.taken = taken;
  if (saved.active && saved.first) *saved.active = 0;
}

__global__ void __launch_bounds__(kThreads) unions_kernel(const ForwardChunk chunk) {
  __shared__ bool last;
  write_union(chunk, blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&chunk.schedule->finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  write_rounds(chunk);
  if (chunk.saved.places) write_places(chunk);
}

}  // namespace

Status launch_unions(const ForwardChunk& chunk, cudaStream_t stream) {
  return launch(unions_kernel, chunk.tiles, kThreads, 0, stream, chunk);
}

}  // namespace twell::cuda
