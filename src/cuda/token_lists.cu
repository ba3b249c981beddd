// From coefficients by tile and union position to lists of tokens by block of neurons: what each
// half tile adds to each list, then the rows and entries, whose places follow from the counts of
// all parts before. A lane looks after two tokens of a half tile, whose values lie in one word of
// each column.

#include "cuda/check.h"
#include "cuda/token_lists.h"

namespace twell::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr std::uint32_t kLowMagnitude = 0x7fffu;
constexpr std::uint32_t kHighMagnitude = 0x7fff0000u;

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// The sum over the lanes before this one.
__device__ __forceinline__ int sum_before(int value) {
  const int lane = threadIdx.x % 32;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - value;
}

// A block and half tile; one warp each.
struct Part {
  int half_tile = blockIdx.y;
  int block = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
};

// The words of the three coefficients that this lane looks after, in one column.
struct Words {
  std::uint32_t dg, du, h;

  __device__ Words(const BackwardChunk& chunk, std::size_t column)
      : dg(chunk.dg[column * kColumnWords + threadIdx.x % 32]),
        du(chunk.du ? chunk.du[column * kColumnWords + threadIdx.x % 32] : 0),
        h(chunk.h[column * kColumnWords + threadIdx.x % 32]) {}
  __device__ std::uint32_t any() const { return dg | du | h; }
};

__device__ __forceinline__ void count_part(const BackwardChunk& chunk, const TokenLists& lists,
                                           const Part& at) {
  const ForwardChunk& forward = chunk.forward;
  const int lane = threadIdx.x % 32;

  // The block's positions in the union, from the number of neurons before it.
  const int words = forward.blocks * kMaskWords;
  const std::uint32_t* masks =
      forward.masks + static_cast<std::size_t>(at.half_tile & ~1) * words;  // of the tile
  const int word = at.block * (kRowNeurons / 32);
  int before = 0;
  for (int w = lane; w < word; w += 32) before += __popc(masks[w] | masks[words + w]);
  const int first = warp_sum(before);
  int columns = 0;
#pragma unroll
  for (int w = word; w < word + kRowNeurons / 32; ++w) {
    columns += __popc(masks[w] | masks[words + w]);
  }

  const std::size_t column = static_cast<std::size_t>(at.half_tile) * forward.capacity + first;
  std::uint32_t any = 0;
  int count = 0;
#pragma unroll 4
  for (int i = 0; i < columns; ++i) {
    const std::uint32_t pair = Words(chunk, column + i).any();
    any |= pair;
    count += ((pair & kLowMagnitude) != 0) + ((pair & kHighMagnitude) != 0);
  }
  count = warp_sum(count);

  const int token = lane / 8 * 16 + lane % 8;
  const auto listed = [&](std::uint32_t value, int t) {
    const bool forced = (chunk.nonfinite[2 * at.half_tile + t / 32] >> (t % 32)) & 1u;
    return at.half_tile * kHalfTokens + t < forward.tokens && (value != 0 || forced);
  };
  ListPart part;
  part.tokens[0] = __ballot_sync(~0u, listed(any & kLowMagnitude, token));
  part.tokens[1] = __ballot_sync(~0u, listed(any & kHighMagnitude, token + 8));
  part.first = first;
  part.columns_count = static_cast<std::uint32_t>(count << 8 | columns);
  if (lane == 0) lists.parts[at.block * 2 * forward.tiles + at.half_tile] = part;
}

// half_first and state ← parts, by the last CTA.
__device__ __forceinline__ void place_chunk(const TokenLists& lists, int halves) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (int half = warp; half < halves; half += kWarps) {
    int count = 0;
#pragma unroll 4
    for (int block = lane; block < lists.blocks; block += 32) {
      count += static_cast<int>(__ldcg(&lists.parts[block * halves + half].columns_count) >> 8);
    }
    count = warp_sum(count);
    if (lane == 0) lists.half_first[half] = count;
  }
  __syncthreads();
  if (warp != 0) return;
  std::int64_t used = lists.state->entries;
  for (int first = 0; first < halves; first += 32) {
    const bool exists = first + lane < halves;
    const int count = exists ? lists.half_first[first + lane] : 0;
    const int before = sum_before(count);
    if (exists) {
      lists.half_first[first + lane] =
          static_cast<std::int32_t>(min(used + before, std::int64_t{lists.entry_capacity}));
    }
    used += __shfl_sync(~0u, before + count, 31);
  }
  if (lane == 0) {
    ListState& state = *lists.state;
    state.dense = used > lists.entry_capacity;
    state.dense_chunks += state.dense;
    if (!state.dense) state.entries = static_cast<std::int32_t>(used);
    state.finished = 0;
    state.taken = 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const BackwardChunk chunk, const TokenLists lists) {
  __shared__ bool last;
  const Part at;
  if (at.block < lists.blocks) count_part(chunk, lists, at);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&lists.state->finished, 1u) == gridDim.x * gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) place_chunk(lists, 2 * chunk.forward.tiles);
}

__global__ void __launch_bounds__(kThreads)
    list_kernel(const BackwardChunk chunk, const TokenLists lists) {
  const ForwardChunk& forward = chunk.forward;
  const Part at;
  if (at.block >= lists.blocks) return;
  const int halves = 2 * forward.tiles;
  const int lane = threadIdx.x % 32;
  const ListPart* parts = lists.parts + at.block * halves;
  const ListPart part = parts[at.half_tile];
  const auto rows_of = [](const ListPart& p) { return __popc(p.tokens[0]) + __popc(p.tokens[1]); };
  const bool dense = lists.state->dense != 0;

  int row = 0;
  for (int i = lane; i < at.half_tile; i += 32) row += rows_of(parts[i]);
  row = warp_sum(row) + lists.counts[(lists.parity ^ 1) * lists.blocks + at.block];
  if (at.half_tile == halves - 1 && lane == 0) {
    const int before = lists.counts[(lists.parity ^ 1) * lists.blocks + at.block];
    lists.counts[lists.parity * lists.blocks + at.block] = dense ? before : row + rows_of(part);
  }
  if (dense || rows_of(part) == 0) return;

  int entry = 0;
  for (int i = lane; i < at.block; i += 32) {
    entry += lists.parts[i * halves + at.half_tile].coefficients();
  }
  entry = warp_sum(entry) + lists.half_first[at.half_tile];

  const std::size_t column = static_cast<std::size_t>(at.half_tile) * forward.capacity + part.first;
  int counts[2] = {0, 0};
#pragma unroll 4
  for (int i = 0; i < part.columns(); ++i) {
    const std::uint32_t pair = Words(chunk, column + i).any();
    counts[0] += (pair & kLowMagnitude) != 0;
    counts[1] += (pair & kHighMagnitude) != 0;
  }
  const int token = lists.first + at.half_tile * kHalfTokens + lane / 8 * 16 + lane % 8;
  ListRow* rows = lists.rows + static_cast<std::size_t>(at.block) * lists.capacity;
  int place[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    place[s] = entry + sum_before(counts[s]);
    entry += warp_sum(counts[s]);
    if ((part.tokens[s] >> lane) & 1u) {
      rows[row + __popc(part.tokens[s] & ((1u << lane) - 1))] = {
          static_cast<std::uint32_t>(token + 8 * s),
          static_cast<std::uint32_t>(place[s] << 7 | counts[s])};
    }
    row += __popc(part.tokens[s]);
  }

  const UnionEntry* entries =
      forward.unions + static_cast<std::size_t>(at.half_tile / 2) * forward.capacity + part.first;
#pragma unroll 4
  for (int i = 0; i < part.columns(); ++i) {
    const std::uint32_t neuron = entries[i].row() % kRowNeurons;
    const Words words(chunk, column + i);
    if ((words.any() & kLowMagnitude) != 0) {
      lists.entries[place[0]++] = {neuron | words.dg << 16, (words.du & 0xffffu) | words.h << 16};
    }
    if ((words.any() & kHighMagnitude) != 0) {
      lists.entries[place[1]++] = {neuron | (words.dg & 0xffff0000u),
                                   words.du >> 16 | (words.h & 0xffff0000u)};
    }
  }
}

// Ties by index: what takes longest begins first.
__global__ void __launch_bounds__(kThreads) order_kernel(const TokenLists lists) {
  const std::int32_t* counts = lists.counts + lists.parity * lists.blocks;
  if (threadIdx.x == 0) lists.state->taken = 0;
  for (int block = threadIdx.x; block < lists.blocks; block += kThreads) {
    const int mine = counts[block];
    int rank = 0;
    for (int other = 0; other < lists.blocks; ++other) {
      rank += counts[other] > mine || (counts[other] == mine && other < block);
    }
    lists.order[rank] = block;
  }
}

}  // namespace

Status launch_begin_lists(const TokenLists& lists, cudaStream_t stream) {
  Status status =
      check(cudaMemsetAsync(lists.state, 0, sizeof(ListState), stream), "cudaMemsetAsync");
  if (!status.ok()) return status;
  return check(cudaMemsetAsync(lists.counts, 0, 2 * lists.blocks * sizeof(*lists.counts), stream),
               "cudaMemsetAsync");
}

Status launch_add_to_lists(const BackwardChunk& chunk, const TokenLists& lists,
                           cudaStream_t stream) {
  const dim3 grid(ceil_div(lists.blocks, kWarps), 2 * chunk.forward.tiles);
  Status status = launch(count_kernel, grid, kThreads, 0, stream, chunk, lists);
  if (!status.ok()) return status;
  return launch(list_kernel, grid, kThreads, 0, stream, chunk, lists);
}

Status launch_order_lists(const TokenLists& lists, cudaStream_t stream) {
  return launch(order_kernel, 1, kThreads, 0, stream, lists);
}

}  // namespace twell::cuda
