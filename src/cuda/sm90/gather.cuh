#pragma once
// The product that Hopper's kernels over unions share: rows of 128 tokens by up to 256 union
// neurons, whose rows of a matrix are gathered, summed over hidden. A producer warpgroup gathers
// with 16-byte copies into the swizzled layout (64 adjacent rows are one TMA box), beside TMA tiles
// of the tokens; two consumer warpgroups own a half tile each. What becomes of the sums is the
// business of an epilogue, a kernel's parameter:
//
//   Stages                                GatherStages, which bounds the items' steps
//   kMatrices                             whose rows are gathered, each for every item
//   kFills                                whether an item has a stage for each of its steps besides
//   int count(schedule)                   of its items: the first ones
//   void fill(stages, ring, chunk, item)  all producer threads: these stages, after the product's
//   Consumer(epilogue, chunk, stages, half), of a warpgroup, with its parts of items:
//     void look_ahead(GatherPart)         begins to read what the next item needs
//     void begin()                        that item's turn has come
//     Held before<kN>(GatherPart)         reads what arrives while the products run
//     void after<kN>(sums, held, ring, GatherPart)  sums as ptx::wgmma holds them
//
// Its stages' `Scratch` is what consumers share besides.

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "cuda/forward.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/tensor_map.h"

namespace twell::cuda::sm90 {

struct Gather {
  static constexpr int kConsumers = 2;
  static constexpr int kProducers = 128;
  static constexpr int kThreads = kProducers + 128 * kConsumers;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
};

// For items of at most kMostSteps: the smaller these are, the more stages are on their way.
template <class Scratch_, int kMostSteps = kUnionItem / kUnionStep>
struct alignas(1024) GatherStages {
  using Scratch = Scratch_;
  static constexpr int kSteps = kMostSteps;
  static constexpr int kStages = kSteps <= 2 ? 6 : 4;
  using Ring = sm90::Ring<kStages>;

  __nv_bfloat16 tokens[kStages][kTileTokens * kTileHidden];
  __nv_bfloat16 weights[kStages][kSteps * kUnionStep * kTileHidden];
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  Scratch scratch;
};

template <int kMatrices>
struct GatherOperands {
  CUtensorMap tokens;            // [rows, hidden], boxes of a tile
  CUtensorMap half_tokens;       // the same, of a half
  int first_token;               // the chunk's first row of them
  CUtensorMap boxes[kMatrices];  // [neurons, hidden], for adjacent rows
  const uint4* rows[kMatrices];  // the same, to be gathered
};

template <int kMatrices>
Status make_operands(GatherOperands<kMatrices>& operands, const ForwardChunk& chunk,
                     const Tokens& tokens, const void* const (&weights)[kMatrices]) {
  operands.first_token = tokens.first;
  for (const auto& [map, box] :
       {std::pair(&operands.tokens, kTileTokens), std::pair(&operands.half_tokens, kHalfTokens)}) {
    if (Status status = make_tensor_map(*map, tokens.x, tokens.rows, chunk.hidden, box);
        !status.ok()) {
      return status;
    }
  }
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    operands.rows[matrix] = static_cast<const uint4*>(weights[matrix]);
    if (Status status = make_tensor_map(operands.boxes[matrix], weights[matrix], chunk.neurons,
                                        chunk.hidden, kUnionStep);
        !status.ok()) {
      return status;
    }
  }
  return {};
}

// What a consumer does of an item. Everything is looked up in the item's one word when it is
// needed.
struct GatherPart {
  UnionItem item;
  int half;
  int matrix;  // of the operands

  __device__ int tile() const { return item.tile(); }
  __device__ int steps() const { return item.part(half).steps; }
  __device__ int skipped() const { return item.part(half).skipped; }  // steps of the item before
  __device__ int left() const { return item.steps() - skipped() - steps(); }  // and after
  __device__ int first_position() const { return (item.first() + skipped()) * kUnionStep; }
};

// The items of a round's schedule that this CTA works on, one after the other.
template <class Epilogue>
class Items {
 public:
  __device__ explicit Items(const ForwardChunk& chunk)
      : schedule_(*chunk.schedule), count_(Epilogue::count(schedule_) * Epilogue::kMatrices) {
    read();
  }
  __device__ __forceinline__ bool more() const { return at_ < count_; }
  __device__ __forceinline__ UnionItem item() const { return item_; }
  __device__ __forceinline__ int matrix() const { return at_ % Epilogue::kMatrices; }
  __device__ __forceinline__ GatherPart part(int half) const { return {item_, half, matrix()}; }
  __device__ __forceinline__ void advance() {
    at_ += static_cast<int>(gridDim.x);
    read();
  }

 private:
  __device__ __forceinline__ void read() {
    if (more()) item_ = schedule_.items[at_ / Epilogue::kMatrices];
  }

  const Schedule& schedule_;
  const int count_;
  int at_ = static_cast<int>(blockIdx.x);
  UnionItem item_ = {};
};

template <class Stages, class Epilogue>
__device__ __forceinline__ void gather(Stages& shared, const ForwardChunk& chunk,
                                       const GatherOperands<Epilogue::kMatrices>& operands,
                                       const Epilogue& epilogue) {
  constexpr int kPieces = kTileHidden / 8;             // 16-byte pieces of a row
  constexpr int kRows = Gather::kProducers / kPieces;  // rows at a time
  constexpr int kTurns = kUnionStep / kRows;           // to gather kUnionStep rows
  constexpr int kGroups = Stages::kSteps;
  constexpr int kGroupElements = kUnionStep * kTileHidden;
  constexpr int kHalfElements = kHalfTokens * kTileHidden;
  const int row = static_cast<int>(threadIdx.x) / kPieces;  // of the first kRows
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  const std::uint32_t target =
      ptx::shared_address(shared.weights) + row * 128 + ((piece ^ (row % 8)) * 16);
  typename Stages::Ring ring;
#pragma unroll 1
  for (Items<Epilogue> items(chunk); items.more(); items.advance()) {
    const UnionItem item = items.item();
    const UnionEntry* entries = chunk.unions +
                                static_cast<std::size_t>(item.tile()) * chunk.capacity +
                                item.first_position();
    const uint4* sources[kGroups * kTurns];  // of the next step
    bool gathered[kGroups];                  // by all threads; else by TMA, the rows being adjacent
    int group_row[kGroups];
    // The tokens of both halves, or of the one that uses any of the neurons.
    const bool both = item.part(0).steps > 0 && item.part(1).steps > 0;
    const int half = item.part(0).steps > 0 ? 0 : 1;
    const CUtensorMap* tokens = both ? &operands.tokens : &operands.half_tokens;
    const int token =
        operands.first_token + item.tile() * kTileTokens + (both ? 0 : half * kHalfTokens);
    const int tokens_at = both ? 0 : half * kHalfElements;
    int bytes = (both ? 2 : 1) * kHalfElements * 2;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const bool exists = group < item.steps();
      const UnionEntry* mine = entries + (exists ? group * kUnionStep : 0);
      group_row[group] = mine[0].row();
      const bool adjacent = exists && are_adjacent(mine[0], mine[kUnionStep - 1]);
      gathered[group] = exists && !adjacent;
      if (!exists) group_row[group] = -1;
      bytes += adjacent ? kGroupElements * 2 : 0;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        sources[group * kTurns + turn] =
            operands.rows[items.matrix()] +
            static_cast<std::size_t>(mine[turn * kRows + row].row()) * (chunk.hidden / 8) + piece;
      }
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.full[stage], bytes);
        ptx::tma_load(shared.tokens[stage] + tokens_at, tokens, &shared.full[stage],
                      step * kTileHidden, token);
      }
      const bool inside = step * kTileHidden + piece * 8 < chunk.hidden;
      const std::uint32_t stage_target = target + stage * sizeof(shared.weights[0]);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (gathered[group]) {
#pragma unroll
          for (int turn = 0; turn < kTurns; ++turn) {
            const int at = group * kTurns + turn;
            ptx::copy_async_16(stage_target + at * kRows * 128, sources[at], inside);
          }
        } else if (threadIdx.x == 0 && group_row[group] >= 0) {
          ptx::tma_load(shared.weights[stage] + group * kGroupElements,
                        &operands.boxes[items.matrix()], &shared.full[stage], step * kTileHidden,
                        group_row[group]);
        }
      }
      ptx::copy_async_arrive(&shared.full[stage]);
#pragma unroll
      for (const uint4*& source : sources) {
        source += kPieces;
        ptx::pin(source);
      }
    }
    if constexpr (Epilogue::kFills) epilogue.fill(shared, ring, chunk, item);
  }
}

// `part`: the consumer's, of kN positions.
template <int kN, class Epilogue, class Consumer>
__device__ __forceinline__ void multiply_part(typename Epilogue::Stages& shared,
                                              typename Epilogue::Stages::Ring& ring,
                                              const ForwardChunk& chunk, Consumer& consumer,
                                              GatherPart part) {
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
  };
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  if constexpr (kN == 0) {
    skip(ring, steps + (Epilogue::kFills ? part.item.steps() : 0), shared.full, release);
  } else {
    const auto held = consumer.template before<kN>(part);
    float sums[kN / 2];
    const int tokens = part.half * kHalfTokens * kTileHidden;
    const int weights = part.skipped() * kUnionStep * kTileHidden;
    multiply<kN, ptx::Major::kInner, ptx::Major::kInner, Filler::kTmaAndThreads>(
        sums, ring, steps, shared.full, [&](int stage) { return shared.tokens[stage] + tokens; },
        [&](int stage) { return shared.weights[stage] + weights; }, release);
    if constexpr (Epilogue::kFills) skip(ring, part.skipped(), shared.full, release);
    consumer.template after<kN>(sums, held, ring, part);
    if constexpr (Epilogue::kFills) skip(ring, part.left(), shared.full, release);
  }
}

// Makes what is made for `steps`, at most kMost.
template <int kMost, class Make>
__device__ __forceinline__ void for_steps(int steps, Make&& make) {
  if constexpr (kMost == 0) {
    make.template operator()<0>();
  } else if (steps == kMost) {
    make.template operator()<kMost>();
  } else {
    for_steps<kMost - 1>(steps, make);
  }
}

template <class Stages, class Epilogue>
__device__ __forceinline__ void consume(Stages& shared, const ForwardChunk& chunk,
                                        const Epilogue& epilogue, int half) {
  typename Epilogue::Consumer consumer(epilogue, chunk, shared, half);
  typename Stages::Ring ring;
  Items<Epilogue> items(chunk);
  if (items.more()) consumer.look_ahead(items.part(half));
#pragma unroll 1
  while (items.more()) {
    const GatherPart part = items.part(half);
    consumer.begin();
    items.advance();
    if (items.more()) consumer.look_ahead(items.part(half));
    for_steps<Stages::kSteps>(part.steps(), [&]<int kSteps>() {
      multiply_part<kSteps * kUnionStep, Epilogue>(shared, ring, chunk, consumer, part);
    });
  }
}

// The body of a kernel of Gather::kThreads.
template <class Epilogue>
__device__ __forceinline__ void multiply_items(const ForwardChunk& chunk,
                                               const GatherOperands<Epilogue::kMatrices>& operands,
                                               const Epilogue& epilogue) {
  using Stages = typename Epilogue::Stages;
  if (Epilogue::count(*chunk.schedule) == 0) return;
  extern __shared__ std::uint8_t raw[];
  auto& shared = aligned_shared<Stages>(raw);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Stages::kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], Gather::kProducers + 1);
      ptx::mbarrier_init(&shared.empty[stage], Gather::kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::register_decrease<Gather::kProducerRegisters>();
    gather(shared, chunk, operands, epilogue);
  } else {
    ptx::register_increase<Gather::kConsumerRegisters>();
    consume(shared, chunk, epilogue, warpgroup - 1);
  }
}

template <class Epilogue>
inline constexpr std::size_t kGatherBytes = sizeof(typename Epilogue::Stages) +
                                            alignof(typename Epilogue::Stages);

}  // namespace twell::cuda::sm90
