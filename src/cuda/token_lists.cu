// From coefficients by tile and union position to lists of tokens by block of neurons: which tokens
// each column is active for, which neurons make a block, what each half tile adds to each list,
// then the rows and entries, whose places follow from the counts of all parts before.

#include "cuda/check.h"
#include "cuda/token_lists.cuh"

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

// active ← coefficients, a warp for each column, a lane for each word. With the first chunk
// activity too.
__global__ void __launch_bounds__(kThreads)
    active_kernel(const BackwardChunk chunk, const TokenLists lists) {
  const ForwardChunk& forward = chunk.forward;
  const int lane = threadIdx.x % 32;
  const int half_tile = blockIdx.y;
  const int count = forward.counts[half_tile / 2];
  const UnionEntry* entries =
      forward.unions + static_cast<std::size_t>(half_tile / 2) * forward.capacity;
  const std::size_t first = static_cast<std::size_t>(half_tile) * forward.capacity;
  // Of tokens beyond the last one a NaN or an infinity in a weight can make coefficients.
  const int token = half_tile * kHalfTokens + lane / 8 * 16 + lane % 8;
  const std::uint32_t exist = (token < forward.tokens ? kLowMagnitude : 0) |
                              (token + 8 < forward.tokens ? kHighMagnitude : 0);
  const int stride = static_cast<int>(gridDim.x) * kWarps;
#pragma unroll 4
  for (int position = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
       position < count; position += stride) {
    const std::size_t at = (first + position) * kColumnWords + lane;
    const std::uint32_t any = exist & (chunk.dg[at] | chunk.h[at] | (chunk.du ? chunk.du[at] : 0));
    const ActiveTokens active = {{__ballot_sync(~0u, (any & kLowMagnitude) != 0),
                                  __ballot_sync(~0u, (any & kHighMagnitude) != 0)}};
    if (lane != 0) continue;
    lists.active[first + position] = active;
    const int tokens = __popc(active.words[0]) + __popc(active.words[1]);
    if (chunk.first && tokens > 0) atomicAdd(&lists.activity[entries[position].row()], tokens);
  }
}

constexpr int kSortThreads = 128;

// What neurons are sorted by, all different: falling activity, then the index.
__device__ __forceinline__ std::uint32_t sort_key(const TokenLists& lists, int neuron) {
  static_assert(kMaxBackwardTiles * kTileTokens < 1 << 16);
  return static_cast<std::uint32_t>(lists.activity[neuron]) << 16 |
         static_cast<std::uint32_t>(0xffff - neuron);
}

__global__ void __launch_bounds__(kSortThreads) sort_kernel(const TokenLists lists, int neurons) {
  constexpr int kKeys = 1024;  // compared with at a time
  alignas(16) __shared__ std::uint32_t keys[kKeys];
  const int neuron = static_cast<int>(blockIdx.x) * kSortThreads + static_cast<int>(threadIdx.x);
  const std::uint32_t mine = neuron < neurons ? sort_key(lists, neuron) : 0;
  int ranks[4] = {};
  for (int first = 0; first < neurons; first += kKeys) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kKeys; i += kSortThreads) {
      keys[i] = first + i < neurons ? sort_key(lists, first + i) : 0;
    }
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < kKeys; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
      ranks[0] += four.x > mine;
      ranks[1] += four.y > mine;
      ranks[2] += four.z > mine;
      ranks[3] += four.w > mine;
    }
  }
  if (neuron < neurons) {
    lists.neurons[ranks[0] + ranks[1] + ranks[2] + ranks[3]] = neuron;
  } else if (neuron < lists.blocks * kRowNeurons) {
    lists.neurons[neuron] = -1;
  }
}

// A block and half tile, one warp each. A lane looks after two neurons of the block, and after two
// tokens of the half tile, whose values lie in one word of each column.
struct Part {
  int half_tile = blockIdx.y;
  int block = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;

  __device__ ActiveTokens active(const BackwardChunk& chunk, const TokenLists& lists,
                                 int position) const {
    if (position < 0) return {};
    return lists.active[static_cast<std::size_t>(half_tile) * chunk.forward.capacity + position];
  }
};

// Where a neuron stands in the union of a tile; negative: not there.
__device__ __forceinline__ int union_position(const ForwardChunk& chunk, int tile, int neuron) {
  if (neuron < 0) return -1;
  const int words = chunk.blocks * kMaskWords;
  const int word = neuron / 32;
  const std::uint32_t* masks = chunk.masks + static_cast<std::size_t>(2 * tile) * words + word;
  const std::uint32_t used = masks[0] | masks[words];
  const int before = chunk.word_first[tile * words + word];
  if (((used >> (neuron % 32)) & 1u) == 0) return -1;
  return before + __popc(used & ((1u << (neuron % 32)) - 1));
}

__device__ __forceinline__ std::uint32_t or_of_warp(std::uint32_t value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value |= __shfl_xor_sync(~0u, value, lanes);
  return value;
}

__device__ __forceinline__ void count_part(const BackwardChunk& chunk, const TokenLists& lists,
                                           const Part& at) {
  const int lane = threadIdx.x % 32;
  ListPart part = {};
#pragma unroll
  for (int i = 0; i < kRowNeurons / 32; ++i) {
    const int neuron = lists.neurons[at.block * kRowNeurons + 32 * i + lane];
    const int position = union_position(chunk.forward, at.half_tile / 2, neuron);
    if (at.half_tile % 2 == 0) {
      positions_of(lists, at.half_tile / 2, at.block)[32 * i + lane] = position;
    }
    const ActiveTokens mine = at.active(chunk, lists, position);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      part.tokens.words[s] |= mine.words[s];
      part.coefficients += __popc(mine.words[s]);
    }
  }
  part.coefficients = warp_sum(part.coefficients);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const std::uint32_t any = or_of_warp(part.tokens.words[s]);
    const int token = lane / 8 * 16 + lane % 8 + 8 * s;
    const bool forced = (chunk.nonfinite[2 * at.half_tile + token / 32] >> (token % 32)) & 1u;
    const bool exists = at.half_tile * kHalfTokens + token < chunk.forward.tokens;
    part.tokens.words[s] = __ballot_sync(~0u, exists && (forced || ((any >> lane) & 1u)));
  }
  if (lane == 0) lists.parts[at.block * 2 * chunk.forward.tiles + at.half_tile] = part;
}

// block_first and state ← parts, by the last CTA.
__device__ __forceinline__ void place_chunk(const TokenLists& lists, int halves) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (int block = warp; block < lists.blocks; block += kWarps) {
    int count = 0;
    for (int half = lane; half < halves; half += 32) {
      count += __ldcg(&lists.parts[block * halves + half].coefficients);
    }
    count = warp_sum(count);
    if (lane == 0) lists.block_first[block] = count;
  }
  __syncthreads();
  if (warp != 0) return;
  std::int64_t used = lists.state->entries;
  for (int first = 0; first < lists.blocks; first += 32) {
    const bool exists = first + lane < lists.blocks;
    const int count = exists ? lists.block_first[first + lane] : 0;
    const int before = sum_before(count);
    if (exists) {
      lists.block_first[first + lane] =
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
  const bool last = at.half_tile == halves - 1;
  const ListPart* parts = lists.parts + at.block * halves;
  const ListPart part = parts[at.half_tile];
  const int start = lists.counts[(lists.parity ^ 1) * lists.blocks + at.block];
  if (lists.state->dense != 0) {
    if (last && lane == 0) lists.counts[lists.parity * lists.blocks + at.block] = start;
    return;
  }
  if (rows_of(part) == 0 && !last) return;

  int row = 0, entry = 0;
  for (int i = lane; i < at.half_tile; i += 32) {
    row += rows_of(parts[i]);
    entry += parts[i].coefficients;
  }
  row = start + warp_sum(row);
  entry = lists.block_first[at.block] + warp_sum(entry);
  ListRow* rows = lists.rows + static_cast<std::size_t>(at.block) * lists.capacity;
  if (last) {
    const int end = row + rows_of(part);
    const int padded = ceil_div(end, kRowNeurons) * kRowNeurons;
    const auto place = static_cast<std::uint32_t>((entry + part.coefficients) << 7);
    for (int i = end + lane; i < padded; i += 32) rows[i] = {ListRow::kNoToken, place};
    if (lane == 0) lists.counts[lists.parity * lists.blocks + at.block] = padded;
  }

  // How many coefficients this lane's tokens have.
  int positions[2];
  ActiveTokens active[2];
  int counts[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    positions[i] = positions_of(lists, at.half_tile / 2, at.block)[32 * i + lane];
    active[i] = at.active(chunk, lists, positions[i]);
    std::uint32_t used = __ballot_sync(~0u, (active[i].words[0] | active[i].words[1]) != 0);
    for (; used != 0; used &= used - 1) {
      const int from = __ffs(used) - 1;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        counts[s] += (__shfl_sync(~0u, active[i].words[s], from) >> lane) & 1u;
      }
    }
  }
  const int token = lists.first + at.half_tile * kHalfTokens + lane / 8 * 16 + lane % 8;
  int place[2];
  std::uint32_t place_bits[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const std::uint32_t listed = part.tokens.words[s];
    const int mine = row + __popc(listed & ((1u << lane) - 1));
    place[s] = entry + sum_before(counts[s]);
    place_bits[s] = static_cast<std::uint32_t>(mine % kRowNeurons) << 6;
    if ((listed >> lane) & 1u) {
      rows[mine] = {static_cast<std::uint32_t>(token + 8 * s),
                    static_cast<std::uint32_t>(place[s] << 7 | counts[s])};
    }
    entry += warp_sum(counts[s]);
    row += __popc(listed);
  }

  const std::size_t columns = static_cast<std::size_t>(at.half_tile) * forward.capacity;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t used = __ballot_sync(~0u, (active[i].words[0] | active[i].words[1]) != 0);
    while (used != 0) {
      // Several columns' loads are in flight together.
      constexpr int kBatch = 8;
      int from[kBatch];
      bool low[kBatch], high[kBatch];
      std::uint32_t dg[kBatch], du[kBatch], h[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool exists = used != 0;
        from[b] = exists ? __ffs(used) - 1 : 0;
        used &= used - 1;
        const std::size_t column =
            (columns + __shfl_sync(~0u, positions[i], from[b])) * kColumnWords + lane;
        low[b] = exists && ((__shfl_sync(~0u, active[i].words[0], from[b]) >> lane) & 1u);
        high[b] = exists && ((__shfl_sync(~0u, active[i].words[1], from[b]) >> lane) & 1u);
        const bool any = low[b] || high[b];
        dg[b] = any ? chunk.dg[column] : 0;
        du[b] = any && chunk.du ? chunk.du[column] : 0;
        h[b] = any ? chunk.h[column] : 0;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const std::uint32_t neuron = 32 * i + from[b];
        if (low[b]) {
          lists.entries[place[0]++] = {neuron | place_bits[0] | dg[b] << 16,
                                       (du[b] & 0xffffu) | h[b] << 16};
        }
        if (high[b]) {
          lists.entries[place[1]++] = {neuron | place_bits[1] | (dg[b] & 0xffff0000u),
                                       du[b] >> 16 | (h[b] & 0xffff0000u)};
        }
      }
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

Status launch_begin_lists(const TokenLists& lists, int neurons, cudaStream_t stream) {
  const auto zero = [&](void* data, std::size_t bytes) {
    return check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
  };
  if (Status s = zero(lists.state, sizeof(ListState)); !s.ok()) return s;
  if (Status s = zero(lists.counts, 2 * lists.blocks * sizeof(*lists.counts)); !s.ok()) return s;
  return zero(lists.activity, neurons * sizeof(*lists.activity));
}

Status launch_add_to_lists(const BackwardChunk& chunk, const TokenLists& lists,
                           cudaStream_t stream) {
  const unsigned halves = 2 * chunk.forward.tiles;
  constexpr int kColumnCtas = 8;  // of a half tile
  const dim3 columns(kColumnCtas, halves);
  const dim3 parts(ceil_div(lists.blocks, kWarps), halves);
  if (Status s = launch(active_kernel, columns, kThreads, 0, stream, chunk, lists); !s.ok()) {
    return s;
  }
  if (chunk.first) {
    const int ctas = ceil_div(lists.blocks * kRowNeurons, kSortThreads);
    Status s = launch(sort_kernel, ctas, kSortThreads, 0, stream, lists, chunk.forward.neurons);
    if (!s.ok()) return s;
  }
  if (Status s = launch(count_kernel, parts, kThreads, 0, stream, chunk, lists); !s.ok()) return s;
  return launch(list_kernel, parts, kThreads, 0, stream, chunk, lists);
}

Status launch_order_lists(const TokenLists& lists, cudaStream_t stream) {
  return launch(order_kernel, 1, kThreads, 0, stream, lists);
}

}  // namespace twell::cuda
