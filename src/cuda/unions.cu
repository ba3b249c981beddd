// From the column masks of a chunk to the union of each token tile, where the columns over it lie
// and where those of g and u are kept, and the rounds and the order of the work. One CTA per tile;
// the last to finish makes all but the unions.

#include "cuda/check.h"
#include "cuda/forward.h"

namespace twell::cuda {
namespace {

constexpr int kThreads = 288;
static_assert(kThreads >= kMaxChunkTiles, "the last CTA has a thread for each tile");
constexpr int kWarps = kThreads / 32;
constexpr int kStepCounts = kUnionItem / kUnionStep;

// A value of each warp, in whole vectors, so that vector loads touch nothing else.
template <class T>
struct alignas(16) Scratch {
  T of_warp[kWarps];
};

// The sum of `value` over the threads before this one; `total` receives that over all. All threads
// call; `scratch` may be reused after the next call with the other scratch.
template <class T>
__device__ __forceinline__ T exclusive_sum(T value, Scratch<T>& scratch, T& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  T sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) scratch.of_warp[warp] = sum;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch.of_warp[w];
    total += scratch.of_warp[w];
  }
  return before + sum - value;
}

// The sum of `value` over the threads before this one in its group of `words`: one region's.
__device__ __forceinline__ int sum_in_region(int value, int words) {
  int sum = value;
#pragma unroll 1
  for (int distance = 1; distance < words; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance, words);
    if (static_cast<int>(threadIdx.x) % words >= distance) sum += other;
  }
  return sum - value;
}

constexpr int kClasses = UsedNeurons::kClasses;

// How many neurons of each class, 21 bits each.
using ClassCounts = unsigned long long;

__device__ __forceinline__ ClassCounts count(const UsedNeurons& used) {
  ClassCounts counts = 0;
#pragma unroll
  for (int c = kClasses - 1; c >= 0; --c) counts = counts << 21 | __popc(used.classes[c]);
  return counts;
}

__device__ __forceinline__ int of_class(ClassCounts counts, int c) {
  return static_cast<int>(counts >> (21 * c) & 0x1fffffu);
}

// Those of a word that a tile uses. Where order by half is not wanted all count as used by both.
__device__ __forceinline__ UsedNeurons used_of(const ForwardChunk& chunk, std::uint32_t by_first,
                                               std::uint32_t by_second) {
  if (chunk.by_half) return {by_first, by_second};
  return {by_first | by_second, by_first | by_second};
}

// A half that uses the positions [first, end); the last CTA gives its columns their place.
__device__ __forceinline__ HalfColumns steps_of(int first, int end) {
  if (first == end) return {0, 0, 0};
  return {0, static_cast<std::uint16_t>(first / kUnionStep),
          static_cast<std::uint16_t>(ceil_div(end, kUnionStep))};
}

// A word of the masks of a tile, and where what belongs to it begins.
struct alignas(16) Word {
  std::uint32_t used[2];  // by each half
  int sources[2];         // columns of each half
  int positions[kClasses];
};

// Writes the entry of the `bit`th neuron of a word, if a half uses it.
__device__ __forceinline__ void write_entry(const ForwardChunk& chunk, UnionEntry* out,
                                            const Word& word, int index, int bit) {
  const std::uint32_t below = (1u << bit) - 1;
  UnionEntry entry = {static_cast<std::uint32_t>(index * 32 + bit), 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (((word.used[half] >> bit) & 1u) == 0) continue;
    entry.neuron |= 1u << (16 + half);
    entry.sources |= (word.sources[half] + __popc(word.used[half] & below)) << (16 * half);
  }
  const UsedNeurons neurons = used_of(chunk, word.used[0], word.used[1]);
  std::uint32_t mates = neurons.classes[0];  // of the same class
  int position = word.positions[0];
#pragma unroll
  for (int c = 1; c < kClasses; ++c) {
    const bool is = (neurons.classes[c] >> bit) & 1u;
    mates = is ? neurons.classes[c] : mates;
    position = is ? word.positions[c] : position;
  }
  if (entry.in_use()) out[position + __popc(mates & below)] = entry;
}

// Those of kThreads words from `first` on, one in each thread, with `used` neurons in all: thread
// by thread if these are few, else word by word with a neuron for each lane, so that neighbours are
// written together. All threads call.
__device__ __forceinline__ void write_entries(const ForwardChunk& chunk, UnionEntry* out,
                                              const Word& own, int first, int words, int used) {
  __shared__ Word shared[kThreads];
  constexpr int kFew = 8;  // of a word
  if (used <= kFew * words) {
    const int word = first + static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (std::uint32_t left = own.used[0] | own.used[1]; left != 0; left &= left - 1) {
      write_entry(chunk, out, own, word, __ffs(left) - 1);
    }
    return;
  }
  shared[threadIdx.x] = own;
  __syncthreads();
#pragma unroll 2
  for (int i = threadIdx.x / 32; i < words; i += kWarps) {
    write_entry(chunk, out, shared[i], first + i, threadIdx.x % 32);
  }
  __syncthreads();
}

__device__ __forceinline__ void write_union(const ForwardChunk& chunk, int tile) {
  __shared__ Scratch<ClassCounts> scratch[2];
  const int words = chunk.blocks * kMaskWords;
  const std::uint32_t* masks = chunk.masks + static_cast<std::size_t>(2 * tile) * words;
  UnionEntry* out = chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity;
  const auto load = [&](int word) {
    Word own = {};
    if (word < words) {
      own.used[0] = masks[word];
      own.used[1] = masks[words + word];
    }
    return own;
  };
  const auto count_of = [&](const Word& word) {
    return count(used_of(chunk, word.used[0], word.used[1]));
  };
  Word own = load(threadIdx.x);
  ClassCounts here;
  ClassCounts before = exclusive_sum(count_of(own), scratch[0], here);
  ClassCounts all = here;
  if (words > kThreads) {
    ClassCounts others = 0;
    for (int word = kThreads + threadIdx.x; word < words; word += kThreads) {
      others += count_of(load(word));
    }
    exclusive_sum(others, scratch[1], others);
    all += others;
  }
  const int first_shared = of_class(all, 0);
  const int end_shared = first_shared + of_class(all, 1);
  const int total = end_shared + of_class(all, 2);
  int next[kClasses] = {0, first_shared, end_shared};  // positions
  const int region_words = chunk.region / 32;
  int turn = 0;
#pragma unroll 1
  for (int first = 0; first < words; first += kThreads) {
    const int word = first + static_cast<int>(threadIdx.x);
    if (first > 0) {
      own = load(word);
      before = exclusive_sum(count_of(own), scratch[turn], here);
      turn ^= 1;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own.sources[half] =
          word / region_words * chunk.region + sum_in_region(__popc(own.used[half]), region_words);
    }
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      own.positions[c] = next[c] + of_class(before, c);
      next[c] += of_class(here, c);
      if (chunk.words && word < words) {
        chunk.words[tile * words + word].first[c] = static_cast<std::uint16_t>(own.positions[c]);
      }
    }
    write_entries(chunk, out, own, first, min(words - first, kThreads),
                  of_class(here, 0) + of_class(here, 1) + of_class(here, 2));
  }
  const int padded = ceil_div(total, kUnionStep) * kUnionStep;
  if (total + static_cast<int>(threadIdx.x) < padded) out[total + threadIdx.x] = UnionEntry{0, 0};
  if (threadIdx.x != 0) return;
  chunk.counts[tile] = total;
  chunk.halves[2 * tile] = steps_of(0, end_shared);
  chunk.halves[2 * tile + 1] = steps_of(first_shared, total);
}

// What the schedules need of a tile.
struct TileWork {
  int count;
  bool anew;
  HalfColumns halves[2];

  __device__ int steps() const { return ceil_div(count, kUnionStep); }
  __device__ int columns() const { return (halves[0].steps() + halves[1].steps()) * kUnionStep; }
};

__device__ __forceinline__ TileWork work_of(const ForwardChunk& chunk, int tile) {
  const int4 halves = __ldcg(reinterpret_cast<const int4*>(chunk.halves) + tile);
  const bool anew = chunk.half_places && chunk.kept_place(tile) < 0;
  return {__ldcg(&chunk.counts[tile]),
          anew,
          {__builtin_bit_cast(HalfColumns, make_int2(halves.x, halves.y)),
           __builtin_bit_cast(HalfColumns, make_int2(halves.z, halves.w))}};
}

// How many items of each number of steps: of the largest, and ten bits for each smaller one.
struct ItemCounts {
  static constexpr int kBits = 10;
  unsigned smaller = 0;
  int largest = 0;

  ItemCounts() = default;
  // Those of one tile, if the largest items have `most` steps.
  __device__ ItemCounts(int steps, int most) : largest(steps / most) {
    if (const int rest = steps % most; rest > 0) smaller = 1u << kBits * (rest - 1);
  }
  __device__ explicit ItemCounts(unsigned long long bits)
      : smaller(static_cast<unsigned>(bits)), largest(static_cast<int>(bits >> 32)) {}
  __device__ unsigned long long bits() const {
    return static_cast<unsigned long long>(largest) << 32 | smaller;
  }
  __device__ int of_smaller(int steps) const {
    return static_cast<int>(smaller >> kBits * (steps - 1) & ((1u << kBits) - 1));
  }
};

static_assert((kStepCounts - 1) * ItemCounts::kBits < 32);
static_assert(kMaxChunkTiles < 1 << ItemCounts::kBits);

// How many steps the largest items have: as many as they may, unless the multiprocessors, each of
// which takes every so-manieth item, longest first, would be done sooner with smaller ones. An item
// costs a step more than it has, for its tokens. A warp looks at one number of steps.
__device__ __forceinline__ int choose_steps(const ForwardChunk& chunk, const TileWork* work,
                                            int tiles) {
  __shared__ int costs[kStepCounts];
  static_assert(kStepCounts <= kWarps);
  if (chunk.multiprocessors == 0) return chunk.item_steps;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (const int most = static_cast<int>(threadIdx.x / 32) + 1; most <= kStepCounts) {
    ItemCounts items;
#pragma unroll 2
    for (int tile = lane; tile < tiles; tile += 32) {
      const ItemCounts own(work[tile].steps(), most);
      items.smaller += own.smaller;
      items.largest += own.largest;
    }
    items.smaller = __reduce_add_sync(~0u, items.smaller);
    items.largest = __reduce_add_sync(~0u, items.largest);
    int cost = 0, end = 0;
    int next = 0;  // of the items of the multiprocessor with most to do
#pragma unroll 1
    for (int steps = most; steps > 0; --steps) {
      end += steps == most ? items.largest : items.of_smaller(steps);
      const int taken = end > next ? ceil_div(end - next, chunk.multiprocessors) : 0;
      next += taken * chunk.multiprocessors;
      cost += taken * (steps + 1);
    }
    if (lane == 0) costs[most - 1] = cost;
  }
  __syncthreads();
  int best = chunk.item_steps;
#pragma unroll 1
  for (int most = best - 1; most > 0; --most) {
    if (costs[most - 1] < costs[best - 1]) best = most;
  }
  return best;
}

constexpr int kKeysAtOnce = 16;

// What all tiles of a round are ordered by, all different: falling count, then the index.
__device__ __forceinline__ std::uint32_t order_key(int count, int tile) {
  static_assert(kTwellMaxColumns < 1 << 22 && kMaxChunkTiles <= 1 << 10);
  return static_cast<std::uint32_t>(count) << 10 | static_cast<std::uint32_t>(0x3ff - tile);
}

// Items of tiles whose g and u must be made anew, then all others, each longest first, and tiles by
// falling count; ties by index, so that it is deterministic.
__device__ __forceinline__ void write_schedule(const ForwardChunk& chunk, Schedule& round,
                                               const TileWork* work, int first_tile, int tiles) {
  constexpr int kKeys = ceil_div(kMaxChunkTiles, kKeysAtOnce) * kKeysAtOnce;
  alignas(16) __shared__ std::uint32_t keys[kKeys];
  __shared__ Scratch<unsigned long long> scratch[2];
  if (threadIdx.x == 0) {
    round.first_tile = first_tile;
    round.tiles = tiles;
  }
  if (tiles == 0) {
    if (threadIdx.x == 0) round.item_count = round.anew = 0;
    return;
  }
  const int i = static_cast<int>(threadIdx.x);  // tile of the round
  const std::uint32_t key = i < tiles ? order_key(work[i].count, i) : 0;
  if (i < kKeys) keys[i] = key;
  const int most = choose_steps(chunk, work, tiles);

  int items = 0;
#pragma unroll 1
  for (int anew = chunk.half_places ? 1 : 0; anew >= 0; --anew) {
    const bool takes = i < tiles && work[i].anew == (anew != 0);
    const ItemCounts own(takes ? work[i].steps() : 0, most);
    unsigned long long total;
    const ItemCounts before(exclusive_sum(own.bits(), scratch[anew], total));
    const ItemCounts all(total);
    const auto write = [&](int at, int first, int steps) {
      round.items[at] = {first_tile + i, first, steps, work[i].halves[0], work[i].halves[1]};
    };
#pragma unroll 1
    for (int k = 0; k < own.largest; ++k) write(items + before.largest + k, k * most, most);
    items += all.largest;
#pragma unroll 1
    for (int steps = most - 1; steps > 0; --steps) {
      if (own.of_smaller(steps)) write(items + before.of_smaller(steps), own.largest * most, steps);
      items += all.of_smaller(steps);
    }
    if (threadIdx.x == 0) (anew ? round.anew : round.item_count) = items;
  }
  if (!chunk.half_places && threadIdx.x == 0) round.anew = 0;

  if (i < tiles) {
    int rank = 0;
#pragma unroll 1
    for (int other = 0; other < tiles; other += kKeysAtOnce) {
#pragma unroll
      for (int k = 0; k < kKeysAtOnce; k += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys + other + k);
        rank += (four.x > key) + (four.y > key) + (four.z > key) + (four.w > key);
      }
    }
    chunk.order[first_tile + rank] = first_tile + i;
  }
  __syncthreads();
}

// Each round takes tiles, one after the other, as long as their columns find room and until it
// has its share of as few rounds as may do. That is never more rounds than if each took only the
// tiles that find room with all neurons in use.
__device__ __forceinline__ void write_rounds(const ForwardChunk& chunk, const TileWork* work) {
  __shared__ Scratch<int> scratch[2];
  const int thread = static_cast<int>(threadIdx.x);
  int all;
  exclusive_sum(thread < chunk.tiles ? work[thread].columns() : 0, scratch[1], all);
  const int share = ceil_div(all, max(1, ceil_div(all, chunk.room)));

  int next = 0;  // tile
  for (int i = 0; i < chunk.rounds; ++i) {
    const int tile = next + thread;
    const int own = tile < chunk.tiles ? work[tile].columns() : 0;
    int total, taken;
    const int column = exclusive_sum(own, scratch[0], total);
    const bool fits = tile < chunk.tiles && column <= share && column + own <= chunk.room;
    if (fits) {
      const HalfColumns(&halves)[2] = work[tile].halves;
      const int second = column + (halves[0].end - halves[1].first) * kUnionStep;
      chunk.halves[2 * tile] = {column, halves[0].first, halves[0].end};
      chunk.halves[2 * tile + 1] = {second, halves[1].first, halves[1].end};
    }
    exclusive_sum<int>(fits, scratch[1], taken);
    write_schedule(chunk, chunk.schedule_of(i), work + next, next, taken);
    next += taken;
  }
}

// One tile after the other, from where the chunk before ended, so that it is deterministic.
__device__ __forceinline__ void write_places(const ForwardChunk& chunk, const TileWork* work) {
  __shared__ Scratch<int> scratch;
  const SavedColumns& saved = chunk.saved;
  const int tile = static_cast<int>(threadIdx.x);
  const int taken = saved.first ? 0 : *saved.taken;
  const int own = tile < chunk.tiles ? work[tile].columns() : 0;
  int total;
  const int place = min(taken + exclusive_sum(own, scratch, total), saved.room);
  if (tile < chunk.tiles) saved.places[tile] = place + own <= saved.room ? place : -1;
  if (threadIdx.x != 0) return;
  *saved.taken = min(taken + total, saved.room);
  if (saved.active && saved.first) *saved.active = 0;
}

// Two on a multiprocessor, so that all tiles of a chunk are worked on at once.
__global__ void __launch_bounds__(kThreads, 2) unions_kernel(const ForwardChunk chunk) {
  __shared__ bool last;
  __shared__ TileWork work[kMaxChunkTiles];
  write_union(chunk, blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&chunk.schedule->finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (const int tile = threadIdx.x; tile < chunk.tiles) work[tile] = work_of(chunk, tile);
  __syncthreads();
  write_rounds(chunk, work);
  if (chunk.saved.places) write_places(chunk, work);
}

}  // namespace

Status launch_unions(const ForwardChunk& chunk, cudaStream_t stream) {
  return launch(unions_kernel, chunk.tiles, kThreads, 0, stream, chunk);
}

}  // namespace twell::cuda
