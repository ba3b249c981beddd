#pragma once
// The forward's intermediates and kernels. Tokens are cut into tiles of 128, each of two halves
// of 64; neurons into blocks of 256. All of it lies in the caller's workspace.
//
// A *column* is one neuron's values for the 64 tokens of a half: 32 words of two bf16, word
// 8 w + r holding tokens 16 w + r (low) and 16 w + r + 8 (high), the order in which the tensor
// cores' accumulators hold them. Columns of neurons that no token of the half uses are not
// stored.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/layout.h"
#include "twell/device.h"
#include "twell/format.h"
#include "twell/status.h"

namespace twell::cuda {

// A neuron of a tile's union and where its two columns are.
struct alignas(8) UnionEntry {
  std::uint32_t neuron;   // bits 0-15; bit 16 + h is set if half h uses it (none: padding)
  std::uint32_t sources;  // half h's column in bits 16 h to 16 h + 15, within the half's region

  __host__ __device__ std::uint32_t row() const { return neuron & 0xffffu; }
  __host__ __device__ bool in_half(int half) const { return (neuron >> (16 + half)) & 1u; }
  __host__ __device__ bool in_use() const { return neuron >> 16; }
  __host__ __device__ std::uint32_t source(int half) const {
    return (sources >> (16 * half)) & 0xffffu;
  }
};

// Whether the 64 neurons of a step are neighbours in ascending order, by its first and its last
// entry. Neurons ascend only among those that the same halves use (HalfColumns).
__host__ __device__ inline bool are_adjacent(UnionEntry first, UnionEntry last) {
  return first.neuron >> 16 == last.neuron >> 16 && last.row() - first.row() == kUnionStep - 1;
}

// Where the columns of a half lie: those of the steps [first, end) of 64 positions of its tile's
// union, outside of which the half uses no neuron, side by side. On Hopper unions are ordered for
// it: neurons of the first half alone, those of both, those of the second alone, each in ascending
// order. Elsewhere they are in ascending order, and a half has all steps.
struct alignas(8) HalfColumns {
  std::int32_t base;  // plus a position of the union: the column's index
  std::uint16_t first;
  std::uint16_t end;

  __host__ __device__ bool has(int position) const {
    return position >= first * kUnionStep && position < end * kUnionStep;
  }
  __host__ __device__ int steps() const { return end - first; }
};

// Those of a word's 32 neurons that one half or both use, in the order in which unions have them.
struct UsedNeurons {
  static constexpr int kClasses = 3;
  std::uint32_t classes[kClasses];  // a bit for each neuron

  __host__ __device__ UsedNeurons(std::uint32_t by_first, std::uint32_t by_second)
      : classes{by_first & ~by_second, by_first & by_second, by_second & ~by_first} {}
};

// Where the first of a word's neurons of each class stands in the union.
struct WordPositions {
  std::uint16_t first[UsedNeurons::kClasses];
};

// One piece of up work: steps [first, first + steps) of a tile's union.
class UnionItem {
 public:
  // What a half has of it: `steps` from first + skipped on.
  struct Part {
    int skipped;
    int steps;

    __host__ __device__ bool has(int step) const {  // of the item
      return step >= skipped && step < skipped + steps;
    }
  };

  UnionItem() = default;
  __host__ __device__ UnionItem(int tile, int first, int steps, HalfColumns first_half,
                                HalfColumns second_half)
      : tile_(tile),
        first_(first),
        more_steps_(steps - 1),
        parts_(part_bits(first_half) | part_bits(second_half) << kPartBits) {}

  __host__ __device__ int tile() const { return tile_; }
  __host__ __device__ int first() const { return first_; }
  __host__ __device__ int steps() const { return more_steps_ + 1; }
  __host__ __device__ int first_position() const { return first_ * kUnionStep; }
  __host__ __device__ Part part(int half) const {
    const std::uint32_t bits = parts_ >> (half * kPartBits);
    return {static_cast<int>(bits & 3u), static_cast<int>(bits >> 2 & 7u)};
  }

 private:
  static constexpr int kPartBits = 5;

  __host__ __device__ std::uint32_t part_bits(HalfColumns half) const {
    const int begin = half.first > first() ? half.first - first() : 0;
    const int end = half.end < first() + steps() ? half.end - first() : steps();
    return end > begin ? static_cast<std::uint32_t>(begin | (end - begin) << 2) : 0;
  }

  std::uint32_t tile_ : 10;
  std::uint32_t first_ : 10;
  std::uint32_t more_steps_ : 2;
  std::uint32_t parts_ : 2 * kPartBits;
};

static_assert(kMaxChunkTiles <= 1 << 10 && kUnionItem / kUnionStep == 4);
static_assert(kTwellMaxColumns / kUnionStep <= 1 << 10);

static_assert(sizeof(UnionEntry) == 8 && sizeof(UnionItem) == 4 &&
              sizeof(HalfColumns) == kHalfColumnsBytes &&
              sizeof(WordPositions) == kWordPositionsBytes);

// The work of a round: of consecutive tiles whose columns of h have room at once. A forward has one
// round for a chunk.
struct Schedule {
  std::int32_t item_count;
  std::uint32_t finished;  // of the first round: tiles whose unions are written
  std::int32_t anew;       // items of tiles whose g and u a backward must make anew
  std::int32_t first_tile;
  std::int32_t tiles;  // 0: there is no such round
  UnionItem items[1];  // [item_count], those made anew first, then longest first
};

// Where the forward of a training plan keeps the columns of g and u over the unions for the
// backward: tile after tile, as far as there is room, each tile's as in h.
struct SavedColumns {
  std::uint32_t* g;      // [room, 32]
  std::uint32_t* u;      // the same; null for a plain block, whose only projection is g
  std::int32_t* places;  // [tiles]: the first of a tile's columns; -1: it found no room
  std::int32_t* taken;   // columns of this chunk and those before it
  // Active (token, neuron) pairs of all chunks, counted for token_lists.h; null: not wanted.
  unsigned long long* active;
  int room;    // columns
  bool first;  // chunk of the pass
};

// What the kernels of one chunk of tokens share.
struct ForwardChunk {
  int tokens;           // rows of x in this chunk
  int tiles;            // ceil(tokens / 128)
  int hidden;           // K
  int neurons;          // N
  int blocks;           // ceil(N / 256)
  int capacity;         // N rounded up to a multiple of 64
  int multiprocessors;  // that share the items; 0: items as large as they may be
  int item_steps = kUnionItem / kUnionStep;  // of the largest items
  int region = kBlockNeurons;                // neurons whose columns lie side by side

  std::uint32_t* masks;    // [2 tiles, blocks, 8]: a bit for each neuron
  std::uint32_t* columns;  // [2 tiles, blocks * 256, 32]: of region r the n-th used at region r + n
  UnionEntry* unions;      // [tiles, capacity]
  std::int32_t* counts;    // [tiles]: union neurons
  HalfColumns* halves;     // [2 tiles]: of h
  bool by_half;            // the order of unions
  WordPositions* words;    // [tiles, blocks * 8]: of each word's neurons; null: not wanted
  std::uint32_t* h;        // [room, 32]: columns of h by union position
  int room;                // columns
  std::int32_t* order;     // [tiles]: of each round by falling count
  Schedule* schedule;      // of the round at hand
  int rounds;              // schedules of `schedule_bytes` each from there on, for the unions
  int schedule_bytes;
  SavedColumns saved;         // places is null where nothing is kept
  std::int32_t* half_places;  // [2 tiles]: of a backward, see backward.h; null: of a forward

  __device__ int place(int tile) const { return saved.places ? saved.places[tile] : -1; }

  __device__ Schedule& schedule_of(int round) const {
    return *reinterpret_cast<Schedule*>(reinterpret_cast<std::byte*>(schedule) +
                                        static_cast<std::size_t>(round) * schedule_bytes);
  }

  // A half's columns among those that are kept for the backward, or -1.
  __device__ int kept_base(int place, int tile, int half) const {
    return place < 0 ? -1 : place + halves[2 * tile + half].base - halves[2 * tile].base;
  }

  // Of a backward: a tile's place in what the forward has kept; -1: g and u must be made anew.
  __device__ int kept_place(int tile) const {
    return half_places[2 * tile] < 0 ? -1 : half_places[2 * tile + 1];
  }
};

static_assert(offsetof(Schedule, items) == kScheduleHeader);

// The input of a call. A chunk's tokens are the rows from `first` on.
struct Tokens {
  const void* x;      // [rows, hidden] bf16, 16-byte aligned
  std::int64_t rows;  // of all chunks
  int first;
};

// The three products of a chunk, for one family of GPUs. `gate`, `up`, `down` [neurons, hidden]
// bf16, 16-byte aligned; `multiprocessors` of the device.
struct Products {
  // masks, columns ← relu(x Gᵀ), and resets the schedule.
  Status (*gate)(const ForwardChunk& chunk, const Tokens& x, const void* gate, int multiprocessors,
                 cudaStream_t stream);
  // h ← columns ⊙ (x Uᵀ) over the unions; and the saved columns; saved.active += active pairs.
  Status (*up)(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
               cudaStream_t stream);
  // y ← h D; y [chunk.tokens, hidden].
  Status (*down)(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                 cudaStream_t stream);
};

// Those for a device of compute capability 80 or newer, which it need not really have: a Hopper GPU
// (90) described as 80 runs the PTX for all other GPUs.
const Products& products_for(const Device& device);

// unions, counts, halves, order, schedules and the saved columns' places ← masks.
Status launch_unions(const ForwardChunk& chunk, cudaStream_t stream);

// As Products::up for the plain block, whose h is g: h and the saved g ← columns.
Status launch_spread(const ForwardChunk& chunk, cudaStream_t stream);

// words [tokens, blocks, slots] ← masks, columns, as in twell/format.h; overflow += tile rows with
// more than slots - 1 values.
Status launch_words(const ForwardChunk& chunk, std::uint32_t* words, int slots,
                    std::int64_t* overflow, cudaStream_t stream);

// activity [neurons] += active tokens; partial_l1 [tiles, kStatsParts] ← Σ |h| of parts of each
// tile.
Status launch_stats(const ForwardChunk& chunk, std::int32_t* activity, float* partial_l1,
                    cudaStream_t stream);

// l0 ← Σ activity, l1 ← Σ partial_l1, in a fixed order; null where not wanted.
Status launch_stats_total(const std::int32_t* activity, int neurons, const float* partial_l1,
                          std::int64_t parts, std::int64_t* l0, float* l1, cudaStream_t stream);

}  // namespace twell::cuda
