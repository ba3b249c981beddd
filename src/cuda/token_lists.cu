// From coefficients by tile and union position to lists of tokens by block of neurons: which
// neurons make a block; for each round which tokens each column is active for and what each half
// tile adds to each list; then the rows and entries, whose places follow from the counts of all
// parts before.

#include "cuda/check.h"
#include "cuda/token_lists.cuh"

namespace twell::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kResident = 4;  // CTAs of a multiprocessor

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

constexpr int kSortThreads = 256;
constexpr int kSortNeurons = 32;  // of a CTA

// activity += active tokens of a round's columns, a thread for each.
__global__ void __launch_bounds__(kThreads)
    activity_kernel(const BackwardChunk chunk, const ActiveTokens* active, std::int32_t* activity) {
  const ForwardChunk& forward = chunk.forward;
  const int half_tile = 2 * forward.schedule->first_tile + static_cast<int>(blockIdx.y);
  const int tile = half_tile / 2;
  if (static_cast<int>(blockIdx.y) >= 2 * forward.schedule->tiles) return;
  const UnionEntry* entries = forward.unions + static_cast<std::size_t>(tile) * forward.capacity;
  const HalfColumns half = forward.halves[half_tile];
  const int end = min(half.end * kUnionStep, forward.counts[tile]);
  for (int position = half.first * kUnionStep + static_cast<int>(blockIdx.x) * kThreads +
                      static_cast<int>(threadIdx.x);
       position < end; position += static_cast<int>(gridDim.x) * kThreads) {
    const int tokens = tokens_of(active[half.base + position]);
    if (tokens > 0) atomicAdd(&activity[entries[position].row()], tokens);
  }
}

// What neurons are sorted by, all different: falling activity, then the index.
__device__ __forceinline__ std::uint32_t sort_key(const std::int32_t* activity, int neuron) {
  static_assert(kMaxBackwardTiles * kTileTokens < 1 << 16);
  return static_cast<std::uint32_t>(activity[neuron]) << 16 |
         static_cast<std::uint32_t>(0xffff - neuron);
}

// Ranks by counting: a CTA takes kSortNeurons neurons, and each of its groups of as many threads
// compares them with a share of all.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const TokenLists lists, const std::int32_t* activity, int neurons) {
  constexpr int kKeys = 1024;  // compared with at a time
  constexpr int kGroups = kSortThreads / kSortNeurons;
  alignas(16) __shared__ std::uint32_t keys[kKeys];
  __shared__ int ranks[kGroups][kSortNeurons];
  const int place = static_cast<int>(threadIdx.x) % kSortNeurons;
  const int group = static_cast<int>(threadIdx.x) / kSortNeurons;
  const int neuron = static_cast<int>(blockIdx.x) * kSortNeurons + place;
  const std::uint32_t mine = neuron < neurons ? sort_key(activity, neuron) : 0;
  int rank = 0;
  for (int first = 0; first < neurons; first += kKeys) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kKeys; i += kSortThreads) {
      keys[i] = first + i < neurons ? sort_key(activity, first + i) : 0;
    }
    __syncthreads();
    const std::uint32_t* share = keys + group * (kKeys / kGroups);
#pragma unroll 8
    for (int i = 0; i < kKeys / kGroups; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(share + i);
      rank += (four.x > mine) + (four.y > mine) + (four.z > mine) + (four.w > mine);
    }
  }
  ranks[group][place] = rank;
  __syncthreads();
  if (group != 0) return;
  for (int other = 1; other < kGroups; ++other) rank += ranks[other][place];
  if (neuron < neurons) {
    lists.neurons[rank] = neuron;
  } else if (neuron < lists.blocks * kRowNeurons) {
    lists.neurons[neuron] = -1;
  }
}

// The half tiles of a round.
struct Halves {
  int first;
  int count;

  __device__ explicit Halves(const BackwardChunk& chunk)
      : first(2 * chunk.forward.schedule->first_tile), count(2 * chunk.forward.schedule->tiles) {}
  __device__ int last() const { return first + count - 1; }
};

// Calls make(block, half tile) for each of a round, one warp each; blocks of long lists first. A
// lane looks after two neurons of the block, and after two tokens of the half tile, whose values
// lie in one word of each column.
template <class Make>
__device__ __forceinline__ void for_each_part(const TokenLists& lists, Halves halves, Make&& make) {
  const int warps = static_cast<int>(gridDim.x) * kWarps;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
       i < lists.blocks * halves.count; i += warps) {
    make(i / halves.count, halves.first + i % halves.count);
  }
}

// Where a neuron stands in the union of a tile; negative: not there.
__device__ __forceinline__ int union_position(const ForwardChunk& chunk, int tile, int neuron) {
  if (neuron < 0) return -1;
  const int words = chunk.blocks * kMaskWords;
  const int word = neuron / 32;
  const std::uint32_t* masks = chunk.masks + static_cast<std::size_t>(2 * tile) * words + word;
  const UsedNeurons used(masks[0], masks[words]);
  const WordPositions positions = chunk.words[tile * words + word];
  const std::uint32_t bit = 1u << (neuron % 32);
#pragma unroll
  for (int c = 0; c < UsedNeurons::kClasses; ++c) {
    if ((used.classes[c] & bit) != 0)
      return positions.first[c] + __popc(used.classes[c] & (bit - 1));
  }
  return -1;
}

__device__ __forceinline__ void count_part(const BackwardChunk& chunk, const TokenLists& lists,
                                           int block, int half_tile) {
  const int lane = threadIdx.x % 32;
  const int tile = half_tile / 2;
  const HalfColumns half = chunk.forward.halves[half_tile];
  ListPart part = {};
#pragma unroll
  for (int i = 0; i < kRowNeurons / 32; ++i) {
    const int neuron = lists.neurons[block * kRowNeurons + 32 * i + lane];
    const int position = union_position(chunk.forward, tile, neuron);
    if (half_tile % 2 == 0) positions_of(lists, tile, block)[32 * i + lane] = position;
    if (!half.has(position)) continue;
    const ActiveTokens tokens = lists.active[half.base + position];
    part.coefficients += tokens_of(tokens);
#pragma unroll
    for (int s = 0; s < 2; ++s) part.tokens.words[s] |= tokens.words[s];
  }
  part.coefficients = __reduce_add_sync(~0u, part.coefficients);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int of_half = lane / 8 * 16 + lane % 8 + 8 * s;
    const bool forced = (chunk.nonfinite[2 * half_tile + of_half / 32] >> (of_half % 32)) & 1u;
    const bool exists = half_tile * kHalfTokens + of_half < chunk.forward.tokens;
    part.tokens.words[s] =
        __reduce_or_sync(~0u, part.tokens.words[s]) | __ballot_sync(~0u, exists && forced);
  }
  if (lane != 0) return;
  lists.parts[block * 2 * chunk.forward.tiles + half_tile] = part;
  if (rows_of(part) > 0) atomicAdd(&lists.shares[block].rows, rows_of(part));
  if (part.coefficients > 0) atomicAdd(&lists.shares[block].coefficients, part.coefficients);
}

// Where the round's rows and entries begin, from the shares, which become 0 again; by a warp.
__device__ __forceinline__ void place_round(const TokenLists& lists) {
  const int lane = threadIdx.x % 32;
  const bool dense = lists.dense();
  int entries = lists.state->entries;
  for (int first = 0; first < lists.blocks; first += 32) {
    const int block = first + lane;
    const bool exists = block < lists.blocks;
    ListShare share = {};
    if (exists && !dense) {
      share = {__ldcg(&lists.shares[block].rows), __ldcg(&lists.shares[block].coefficients)};
    }
    const int before = sum_before(share.coefficients);
    if (exists) {
      lists.first_rows[block] = lists.counts[block];
      lists.first_entries[block] = entries + before;
      lists.counts[block] += ceil_div(share.rows, kRowNeurons) * kRowNeurons;
      lists.shares[block] = {};
    }
    entries += __shfl_sync(~0u, before + share.coefficients, 31);
  }
  if (lane != 0) return;
  lists.state->entries = entries;
  lists.state->finished = 0;
  lists.state->taken = 0;
}

__global__ void __launch_bounds__(kThreads, kResident)
    count_kernel(const BackwardChunk chunk, const TokenLists lists) {
  __shared__ bool last;
  const Halves halves(chunk);
  if (halves.count == 0) return;
  for_each_part(lists, halves,
                [&](int block, int half_tile) { count_part(chunk, lists, block, half_tile); });
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&lists.state->finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < 32) place_round(lists);
}

__device__ __forceinline__ void list_part(const BackwardChunk& chunk, const TokenLists& lists,
                                          Halves halves, int block, int half_tile) {
  const int lane = threadIdx.x % 32;
  const bool last = half_tile == halves.last();
  const ListPart* parts = lists.parts + block * 2 * chunk.forward.tiles;
  const ListPart part = parts[half_tile];
  if (rows_of(part) == 0 && !last) return;

  int row = 0, entry = 0;
  for (int i = halves.first + lane; i < half_tile; i += 32) {
    row += rows_of(parts[i]);
    entry += parts[i].coefficients;
  }
  row = lists.first_rows[block] + warp_sum(row);
  entry = lists.first_entries[block] + warp_sum(entry);
  ListRow* rows = lists.rows + static_cast<std::size_t>(block) * lists.capacity;
  if (last) {
    const int end = row + rows_of(part);
    const int padded = ceil_div(end, kRowNeurons) * kRowNeurons;
    const auto place = static_cast<std::uint32_t>((entry + part.coefficients) << 7);
    for (int i = end + lane; i < padded; i += 32) rows[i] = {ListRow::kNoToken, place};
  }

  // How many coefficients this lane's tokens have.
  const HalfColumns half = chunk.forward.halves[half_tile];
  int positions[2];
  ActiveTokens active[2];
  int counts[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    positions[i] = positions_of(lists, half_tile / 2, block)[32 * i + lane];
    active[i] = half.has(positions[i]) ? lists.active[half.base + positions[i]] : ActiveTokens{};
    std::uint32_t used = __ballot_sync(~0u, (active[i].words[0] | active[i].words[1]) != 0);
    for (; used != 0; used &= used - 1) {
      const int from = __ffs(used) - 1;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        counts[s] += (__shfl_sync(~0u, active[i].words[s], from) >> lane) & 1u;
      }
    }
  }
  const int token = lists.first + half_tile * kHalfTokens + lane / 8 * 16 + lane % 8;
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
        const std::int64_t column =
            (std::int64_t{half.base} + __shfl_sync(~0u, positions[i], from[b])) * kColumnWords +
            lane;
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

__global__ void __launch_bounds__(kThreads, kResident)
    list_kernel(const BackwardChunk chunk, const TokenLists lists) {
  const Halves halves(chunk);
  if (halves.count == 0 || lists.dense()) return;
  for_each_part(lists, halves, [&](int block, int half_tile) {
    list_part(chunk, lists, halves, block, half_tile);
  });
}

// Ties by index: what takes longest begins first.
__global__ void __launch_bounds__(kThreads) order_kernel(const TokenLists lists) {
  const std::int32_t* counts = lists.counts;
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

Status launch_sort_neurons(const BackwardChunk& chunk, const TokenLists& lists,
                           std::int32_t* activity, cudaStream_t stream) {
  constexpr int kColumnCtas = 4;  // of a half tile
  const dim3 columns(kColumnCtas, 2 * chunk.forward.tiles);
  Status status =
      launch(activity_kernel, columns, kThreads, 0, stream, chunk, lists.active, activity);
  if (!status.ok()) return status;
  const int ctas = ceil_div(lists.blocks * kRowNeurons, kSortNeurons);
  return launch(sort_kernel, ctas, kSortThreads, 0, stream, lists, activity, chunk.forward.neurons);
}

Status launch_add_to_lists(const BackwardChunk& chunk, const TokenLists& lists, int multiprocessors,
                           cudaStream_t stream) {
  const int ctas = kResident * multiprocessors;
  if (Status s = launch(count_kernel, ctas, kThreads, 0, stream, chunk, lists); !s.ok()) return s;
  // Parts of lists differ: who is done makes room.
  return launch(list_kernel, 4 * ctas, kThreads, 0, stream, chunk, lists);
}

Status launch_order_lists(const TokenLists& lists, cudaStream_t stream) {
  return launch(order_kernel, 1, kThreads, 0, stream, lists);
}

}  // namespace twell::cuda
