// The gradients of the weights on Hopper: dG = dgᵀ x, dU = duᵀ x, dD = hᵀ dy for 64 neurons and 128
// hidden columns at a time, each by a consumer warpgroup of its own. The sum is over tokens, 64 per
// stage: two producer warpgroups take turns to gather the tokens' rows of x and dy and to spread
// their coefficients, which are few, over zeros.

#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/quad.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/products.h"
#include "cuda/token_lists.cuh"

namespace twell::cuda::sm90 {
namespace {

constexpr int kStages = 4;
constexpr int kStep = 64;  // tokens of a stage
constexpr int kColumns = 128;
constexpr int kProducers = 128;  // threads of a producer warpgroup
constexpr int kGroups = 2;       // producer warpgroups
constexpr int kTileElements = kStep * kRowNeurons;

// Gated: dg, du, h. Plain: dg, h.
template <bool kGated>
struct Config {
  static constexpr int kMatrices = kGated ? 3 : 2;
  static constexpr int kThreads = kProducers * kGroups + 128 * kMatrices;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = kGated ? 112 : 160;
};

template <bool kGated>
struct alignas(1024) Shared {
  __nv_bfloat16 coefficients[kStages][Config<kGated>::kMatrices][kTileElements];
  __nv_bfloat16 sources[kStages][2][kStep * kColumns];  // rows of x, of dy
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  // The CTA's pieces of work, in turn: who comes first takes the next.
  std::int32_t items[2];
  std::uint64_t item_full[2];
  std::uint64_t item_empty[2];
};

struct Gradient {
  __nv_bfloat16* rows;  // [neurons, hidden]; null: not wanted
  std::uint8_t* low;    // bits 8 to 15 of a dense pass's float32 sums
};

struct Call {
  const __nv_bfloat16* sources[2];  // x, dy: of the pass for lists, of the chunk in a dense one
  Gradient gradients[3];
  bool accumulate;
  int hidden;
  int strips;  // of kColumns
};

// The k-th token of a half tile in the order of its columns.
__device__ __forceinline__ int token_of(int k) { return k / 16 * 16 + k % 16 / 2 + k % 2 * 8; }

// A block of neurons, by its rank, and a strip of columns. The longest lists come first, since one
// of them may take as long as a CTA's whole share. The others go strip by strip, so that all blocks
// find the strip's part of x and dy in L2; but the last strips longest list first again, so that
// all CTAs end together.
struct Item {
  int rank;
  int strip;

  __device__ Item(int index, int blocks, int strips) {
    const int longest = ceil_div(blocks, 4);
    if (index < longest * strips) {
      rank = index / strips;
      strip = index % strips;
      return;
    }
    const int others = blocks - longest;
    const int last = strips / 4;
    const int at = index - longest * strips;
    const int rest = at - (strips - last) * others;
    rank = longest + (rest < 0 ? at % others : rest / last);
    strip = rest < 0 ? at / others : strips - last + rest % last;
  }
};

// The CTA's n-th next piece of work, as the publishing thread said.
template <bool kGated>
__device__ __forceinline__ int next_item(Shared<kGated>& shared, std::uint32_t n) {
  ptx::mbarrier_wait(&shared.item_full[n % 2], n / 2 % 2);
  __syncwarp();  // no lane may find the barrier two phases on
  int item = 0;
  if (threadIdx.x % 32 == 0) {
    item = shared.items[n % 2];
    ptx::mbarrier_arrive(&shared.item_empty[n % 2]);
  }
  return __shfl_sync(~0u, item, 0);
}

template <bool kGated>
__device__ __forceinline__ void publish_item(Shared<kGated>& shared, std::uint32_t n, int item) {
  ptx::mbarrier_wait(&shared.item_empty[n % 2], n / 2 % 2 ^ 1);
  shared.items[n % 2] = item;
  ptx::mbarrier_arrive(&shared.item_full[n % 2]);
}

// The n-th stage that is filled.
struct Turn {
  int stage;
  std::uint32_t parity;

  __device__ explicit Turn(std::uint32_t n)
      : stage(static_cast<int>(n % kStages)), parity(n / kStages % 2) {}
};

// A thread's share of gathering the rows of both sources. A warp copies two rows at a time; each of
// its first 16 lanes holds the token of one, negative for zeros.
class Gather {
 public:
  __device__ __forceinline__ Gather(const Call& call, int strip)
      : stride_(static_cast<std::uint32_t>(call.hidden) * 2) {
    const int column = strip * kColumns + piece() * 8;
    inside_ = column < call.hidden;
    for (const int s : {0, 1}) {
      bases_[s] = reinterpret_cast<const char*>(call.sources[s] + (inside_ ? column : 0));
    }
  }

  // The row of a stage whose token this lane holds; those above kStep: none.
  __device__ static int held_row() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return thread() / 32 * 2 + lane % 2 + lane / 2 * kRows;
  }

  __device__ __forceinline__ void copy(__nv_bfloat16 (&stage)[2][kStep * kColumns],
                                       int held) const {
    const std::uint32_t target = ptx::shared_address(stage[0]) + piece() / 8 * (kStep * 128) +
                                 row() * 128 + (((piece() % 8) ^ (row() % 8)) * 16);
#pragma unroll
    for (int turn = 0; turn < kStep / kRows; ++turn) {
      const int token = __shfl_sync(~0u, held, 2 * turn + row() % 2);
      const bool valid = inside_ && token >= 0;
      const std::uint64_t offset =
          static_cast<std::uint64_t>(static_cast<std::uint32_t>(max(token, 0))) * stride_;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        ptx::copy_async_16(target + s * (kStep * kColumns * 2) + turn * kRows * 128,
                           bases_[s] + offset, valid);
      }
    }
  }

 private:
  static constexpr int kPieces = kColumns / 8;
  static constexpr int kRows = kProducers / kPieces;  // at a time
  static_assert(kRows == 8, "a thread's rows have one swizzle; a warp has two of them");

  __device__ static int thread() { return static_cast<int>(threadIdx.x) % kProducers; }
  __device__ static int piece() { return thread() % kPieces; }
  __device__ static int row() { return thread() / kPieces; }  // the first

  const std::uint32_t stride_;
  const char* bases_[2];
  bool inside_;
};

// Writes a coefficient of the token in row `row` to its place in a tile of kOuter layout.
__device__ __forceinline__ void put(__nv_bfloat16* tile, std::uint32_t row, std::uint32_t neuron,
                                    std::uint32_t value) {
  reinterpret_cast<std::uint16_t*>(tile)[row * 64 + (((neuron / 8) ^ (row % 8)) * 8) + neuron % 8] =
      static_cast<std::uint16_t>(value);
}

template <bool kGated>
__device__ __forceinline__ void put(
    __nv_bfloat16 (&tiles)[Config<kGated>::kMatrices][kTileElements], ListEntry entry) {
  const std::uint32_t row = entry.row(), neuron = entry.neuron();
  put(tiles[0], row, neuron, entry.place_dg >> 16);
  if constexpr (kGated) put(tiles[1], row, neuron, entry.du_h & 0xffffu);
  put(tiles[Config<kGated>::kMatrices - 1], row, neuron, entry.du_h >> 16);
}

// The work over the lists of a whole pass.
template <bool kGated>
struct Lists {
  static constexpr ptx::Major kMajor = ptx::Major::kOuter;  // neurons contiguous
  static constexpr bool kLast = true;                       // its sums are final

  TokenLists lists;

  __device__ int block(int rank) const { return lists.order[rank]; }
  __device__ int steps(int block) const {  // a list is filled up to a multiple of kStep
    return lists.counts[block] / kStep;
  }
  __device__ const ListRow* rows(int block) const {
    return lists.rows + static_cast<std::size_t>(block) * lists.capacity;
  }
  __device__ bool runs() const { return true; }
  // Of a dense pass the lists are empty, and the gradients hold the sums.
  __device__ bool has_kept() const { return lists.dense(); }

  // Every other step of an item. A warp spreads the coefficients of 16 rows, which lie side by
  // side.
  __device__ __forceinline__ void produce(Shared<kGated>& shared, const Call& call, int block,
                                          int strip, int group, std::uint32_t first_turn) const {
    constexpr int kRows = kStep / 4;
    constexpr int kEarly = 4;  // entries per lane that are loaded a step ahead
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first_row = static_cast<int>(threadIdx.x) % kProducers / 32 * kRows;
    const int steps = this->steps(block);
    const ListRow* list = rows(block);
    const Gather share_of_rows(call, strip);
    const auto load_token = [&](int step) {  // the lane's
      const int row = step * kStep + Gather::held_row();
      return step < steps && Gather::held_row() < kStep ? static_cast<int>(list[row].token) : -1;
    };
    struct Range {  // of the warp's entries of a step
      int first, end;
    };
    const auto range_of = [&](int step) {
      if (step >= steps) return Range{0, 0};
      const ListRow* mine = list + step * kStep + first_row;
      return Range{mine[0].first(), mine[kRows - 1].end()};
    };
    struct Share {
      int place, end;
      ListEntry early[kEarly];
    };
    const auto load = [&](Range range) {
      Share share = {range.first + lane, range.end, {}};
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        if (share.place + 32 * i < share.end) share.early[i] = lists.entries[share.place + 32 * i];
      }
      return share;
    };
    int step = static_cast<int>((first_turn + group) % kGroups);
    Share next = load(range_of(step));
    Range next_range = range_of(step + kGroups);
    int next_token = load_token(step);
#pragma unroll 1
    for (; step < steps; step += kGroups) {
      const Share share = next;
      next = load(next_range);
      next_range = range_of(step + 2 * kGroups);
      const int token = next_token;
      next_token = load_token(step + kGroups);
      const Turn turn(first_turn + step);
      ptx::mbarrier_wait(&shared.empty[turn.stage], turn.parity ^ 1);
      share_of_rows.copy(shared.sources[turn.stage], token);
      ptx::copy_async_arrive(&shared.full[turn.stage]);
      auto& tiles = shared.coefficients[turn.stage];
#pragma unroll
      for (auto& tile : tiles) {
        auto* zeros = reinterpret_cast<uint4*>(tile + first_row * kRowNeurons);
#pragma unroll
        for (int i = lane; i < kRows * kRowNeurons / 8; i += 32) zeros[i] = make_uint4(0, 0, 0, 0);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        if (share.place + 32 * i < share.end) put<kGated>(tiles, share.early[i]);
      }
#pragma unroll 4
      for (int place = share.place + 32 * kEarly; place < share.end; place += 32) {
        put<kGated>(tiles, lists.entries[place]);
      }
      // The fence between these stores and WGMMA is the consumer's, after its wait: here it would
      // also wait for the loads ahead.
      ptx::mbarrier_arrive(&shared.full[turn.stage]);
    }
  }
};

// The work over the columns of a round of a dense pass: a step is a half tile.
template <bool kGated>
struct HalfTiles {
  static constexpr ptx::Major kMajor = ptx::Major::kInner;  // tokens contiguous
  static constexpr bool kLast = false;

  BackwardChunk chunk;
  TokenLists lists;

  __device__ int begin() const { return 2 * chunk.forward.schedule->first_tile; }
  __device__ int end() const { return begin() + 2 * chunk.forward.schedule->tiles; }
  __device__ const ListPart* parts(int block) const {
    return lists.parts + block * 2 * chunk.forward.tiles;
  }
  __device__ static bool in_use(const ListPart& part) {
    return (part.tokens.words[0] | part.tokens.words[1]) != 0;
  }
  __device__ int block(int rank) const { return rank; }
  __device__ int steps(int block) const {  // all lanes of a warp call
    int sum = 0;
    const int end = this->end();
    for (int first = begin(); first < end; first += 32) {
      const int half = first + static_cast<int>(threadIdx.x) % 32;
      sum += __popc(__ballot_sync(~0u, half < end && in_use(parts(block)[half])));
    }
    return sum;
  }
  __device__ bool runs() const { return lists.dense() && chunk.forward.schedule->tiles > 0; }
  __device__ bool has_kept() const { return !chunk.first; }

  __device__ __forceinline__ void produce(Shared<kGated>& shared, const Call& call, int block,
                                          int strip, int group, std::uint32_t first_turn) const {
    constexpr int kMatrices = Config<kGated>::kMatrices;
    const int thread = static_cast<int>(threadIdx.x) % kProducers;
    const int piece = thread % 8;
    const std::uint32_t* const columns[3] = {chunk.dg, kGated ? chunk.du : chunk.h, chunk.h};
    constexpr int kNeurons = kRowNeurons * 8 / kProducers;  // of a thread
    const int first = thread / 8;
    // Looks ahead to the next half tile in use, where its columns are, and where the neurons stand
    // in its tile's union.
    HalfColumns next_half = {};
    int positions[kNeurons];
    const int end = this->end();
    const auto seek = [&](int half) {
      while (half < end && !in_use(parts(block)[half])) ++half;
      if (half == end) return half;
      next_half = chunk.forward.halves[half];
      const std::int32_t* all = positions_of(lists, half / 2, block) + first;
#pragma unroll
      for (int i = 0; i < kNeurons; ++i) positions[i] = all[i * (kProducers / 8)];
      return half;
    };
    const Gather share_of_rows(call, strip);
    int next = seek(begin());
#pragma unroll 1
    for (std::uint32_t n = first_turn; next < end; ++n) {
      if (n % kGroups != static_cast<std::uint32_t>(group)) {
        next = seek(next + 1);
        continue;
      }
      const Turn turn(n);
      const HalfColumns half = next_half;
      const int token = next * kHalfTokens + token_of(Gather::held_row());
      const bool exists = Gather::held_row() < kStep && token < chunk.forward.tokens;
      int places[kNeurons];
#pragma unroll
      for (int i = 0; i < kNeurons; ++i) places[i] = positions[i];
      next = seek(next + 1);
      ptx::mbarrier_wait(&shared.empty[turn.stage], turn.parity ^ 1);
      share_of_rows.copy(shared.sources[turn.stage], exists ? token : -1);
      ptx::mbarrier_arrive(&shared.full[turn.stage]);
#pragma unroll
      for (int i = 0; i < kNeurons; ++i) {
        const int row = first + i * (kProducers / 8);
        const std::int64_t at =
            (std::int64_t{half.base} + max(places[i], 0)) * kColumnWords + piece * 4;
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          ptx::copy_async_16(ptx::shared_address(shared.coefficients[turn.stage][m]) + row * 128 +
                                 ((piece ^ (row % 8)) * 16),
                             columns[m] + at, half.has(places[i]));
        }
      }
      ptx::copy_async_arrive(&shared.full[turn.stage]);
    }
  }
};

// A pair of float32 from their upper halves and the 8 bits below.
__device__ __forceinline__ float2 join(std::uint32_t high, std::uint32_t low) {
  return {__uint_as_float(high << 16 | (low & 0xffu) << 8),
          __uint_as_float((high & 0xffff0000u) | (low & 0xff00u))};
}

// The bits of a float32 rounded to the upper 24; a NaN as it is.
__device__ __forceinline__ std::uint32_t round_to_24_bits(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  return isnan(value) ? bits : bits + 0x7fu + (bits >> 8 & 1u);
}

// The neurons whose sums a thread holds; negative: none.
using Neurons = int[2];

// Adds to `acc` the sums kept in `gradient`, or if there are none its values.
__device__ __forceinline__ void add_old(float (&acc)[kColumns / 2], const Call& call,
                                        const Gradient& gradient, bool has_kept,
                                        const Neurons& neurons, int column) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (neurons[s] < 0 || column + 8 * j >= call.hidden) continue;
      const std::size_t at = static_cast<std::size_t>(neurons[s]) * call.hidden + column + 8 * j;
      const float2 old =
          join(*reinterpret_cast<const std::uint32_t*>(gradient.rows + at),
               has_kept ? *reinterpret_cast<const std::uint16_t*>(gradient.low + at) : 0);
      acc[4 * j + 2 * s] += old.x;
      acc[4 * j + 2 * s + 1] += old.y;
    }
  }
}

__device__ __forceinline__ void keep(const float (&acc)[kColumns / 2], const Call& call,
                                     const Gradient& gradient, const Neurons& neurons, int column) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (neurons[s] < 0 || column + 8 * j >= call.hidden) continue;
      const std::size_t at = static_cast<std::size_t>(neurons[s]) * call.hidden + column + 8 * j;
      const std::uint32_t a = round_to_24_bits(acc[4 * j + 2 * s]);
      const std::uint32_t b = round_to_24_bits(acc[4 * j + 2 * s + 1]);
      *reinterpret_cast<std::uint32_t*>(gradient.rows + at) = a >> 16 | (b & 0xffff0000u);
      *reinterpret_cast<std::uint16_t*>(gradient.low + at) =
          static_cast<std::uint16_t>((a >> 8 & 0xffu) | (b & 0xff00u));
    }
  }
}

__device__ __forceinline__ void store(const float (&acc)[kColumns / 2], const Call& call,
                                      const Gradient& gradient, const Neurons& neurons,
                                      int first_column) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 4) {
      const float* v = acc + 4 * j + 2 * s;
      const uint4 words =
          transpose_in_quad(make_uint4(ptx::pack(v[0], v[1]), ptx::pack(v[4], v[5]),
                                       ptx::pack(v[8], v[9]), ptx::pack(v[12], v[13])),
                            quad);
      const int column = first_column + 8 * (j + quad);
      if (neurons[s] >= 0 && column < call.hidden) {
        *reinterpret_cast<uint4*>(
            gradient.rows + static_cast<std::size_t>(neurons[s]) * call.hidden + column) = words;
      }
    }
  }
}

// The silent_nans that a matrix's gradient has.
template <bool kGated>
__device__ __forceinline__ std::uint32_t nans_of(int matrix) {
  if (matrix == Config<kGated>::kMatrices - 1) return TokenLists::kNanH;
  return matrix == 1 ? TokenLists::kNanDu : 0;
}

template <bool kGated, class Work>
__device__ __forceinline__ void consume(Shared<kGated>& shared, const Work& work, const Call& call,
                                        int blocks, int matrix) {
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const Gradient gradient = call.gradients[matrix];
  const int source = matrix == Config<kGated>::kMatrices - 1;  // h goes with dy
  const bool has_kept = work.has_kept();
  float acc[kColumns / 2];
  Ring<kStages> ring;
  int index = blockIdx.x;
#pragma unroll 1
  for (std::uint32_t n = 0; index < blocks * call.strips; index = next_item(shared, n++)) {
    const Item item(index, blocks, call.strips);
    const int block = work.block(item.rank);
    multiply<kColumns, Work::kMajor, ptx::Major::kOuter, Filler::kTmaAndThreads>(
        acc, ring, work.steps(block), shared.full,
        [&](int stage) { return shared.coefficients[stage][matrix]; },
        [&](int stage) { return shared.sources[stage][source]; },
        [&](int stage) {
          if (lane == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
        });
    if (!gradient.rows) continue;
    const std::int32_t* row = work.lists.neurons + block * kRowNeurons + warp * 16 + lane / 4;
    const Neurons neurons = {row[0], row[8]};
    const int column = item.strip * kColumns;
    if (has_kept || call.accumulate) {
      add_old(acc, call, gradient, has_kept, neurons, column + 2 * (lane % 4));
    }
    if constexpr (Work::kLast) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool is_nan =
            neurons[s] >= 0 && (work.lists.silent_nans[neurons[s]] & nans_of<kGated>(matrix)) != 0;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          if (is_nan) acc[4 * j + 2 * s] = acc[4 * j + 2 * s + 1] = __int_as_float(0x7fffffff);
        }
      }
      store(acc, call, gradient, neurons, column);
    } else {
      keep(acc, call, gradient, neurons, column + 2 * (lane % 4));
    }
  }
}

template <bool kGated, class Work>
__global__ void __launch_bounds__(Config<kGated>::kThreads, 1)
    weights_kernel(const Work work, const __grid_constant__ Call call, int blocks) {
  if (!work.runs()) return;
  extern __shared__ std::uint8_t raw[];
  auto& shared = aligned_shared<Shared<kGated>>(raw);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 2 * kProducers);
      ptx::mbarrier_init(&shared.empty[stage], Config<kGated>::kMatrices * 4);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&shared.item_full[i], 1);
      ptx::mbarrier_init(&shared.item_empty[i], Config<kGated>::kThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup < kGroups) {
    ptx::register_decrease<Config<kGated>::kProducerRegisters>();
    std::uint32_t turn = 0;
    int index = blockIdx.x;
#pragma unroll 1
    for (std::uint32_t n = 0; index < blocks * call.strips; index = next_item(shared, n++)) {
      int taken = 0;
      if (threadIdx.x == 0) {
        taken = static_cast<int>(gridDim.x) + atomicAdd(&work.lists.state->taken, 1);
      }
      const Item item(index, blocks, call.strips);
      const int block = work.block(item.rank);
      work.produce(shared, call, block, item.strip, warpgroup, turn);
      turn += static_cast<std::uint32_t>(work.steps(block));
      if (threadIdx.x == 0) publish_item(shared, n, taken);
      __syncwarp();
    }
  } else {
    ptx::register_increase<Config<kGated>::kConsumerRegisters>();
    consume<kGated>(shared, work, call, blocks, warpgroup - kGroups);
  }
}

template <bool kGated, class Work>
Status launch_weights(const Work& work, const Call& call, const TokenLists& lists,
                      int multiprocessors, cudaStream_t stream) {
  return launch(weights_kernel<kGated, Work>, std::min(lists.blocks * call.strips, multiprocessors),
                Config<kGated>::kThreads, sizeof(Shared<kGated>) + alignof(Shared<kGated>), stream,
                work, call, lists.blocks);
}

Call make_call(const BackwardChunk& chunk, const void* x, const void* dy,
               const WeightGradients& gradients) {
  Call call = {};
  call.sources[0] = static_cast<const __nv_bfloat16*>(x);
  call.sources[1] = static_cast<const __nv_bfloat16*>(dy);
  int matrix = 0;
  const auto add = [&](void* grad, std::uint8_t* low) {
    call.gradients[matrix++] = {static_cast<__nv_bfloat16*>(grad), low};
  };
  if (chunk.du) add(gradients.gate, gradients.low[0]);
  add(gradients.up, gradients.low[1]);
  add(gradients.down, gradients.low[2]);
  call.accumulate = gradients.accumulate;
  call.hidden = chunk.forward.hidden;
  call.strips = ceil_div(call.hidden, kColumns);
  return call;
}

}  // namespace

Status launch_dense_gradients(const BackwardChunk& chunk, const TokenLists& lists,
                              const WeightGradients& gradients, int multiprocessors,
                              cudaStream_t stream) {
  const Call call = make_call(chunk, chunk.x, chunk.dy, gradients);
  if (chunk.du) {
    return launch_weights<true>(HalfTiles<true>{chunk, lists}, call, lists, multiprocessors,
                                stream);
  }
  return launch_weights<false>(HalfTiles<false>{chunk, lists}, call, lists, multiprocessors,
                               stream);
}

Status launch_list_gradients(const BackwardChunk& chunk, const TokenLists& lists, const void* x,
                             const void* dy, const WeightGradients& gradients, int multiprocessors,
                             cudaStream_t stream) {
  const Call call = make_call(chunk, x, dy, gradients);
  if (chunk.du) {
    return launch_weights<true>(Lists<true>{lists}, call, lists, multiprocessors, stream);
  }
  return launch_weights<false>(Lists<false>{lists}, call, lists, multiprocessors, stream);
}

}  // namespace twell::cuda::sm90
