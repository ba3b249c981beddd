// The coefficients over the unions of a round on Hopper: dh = dy Dᵀ, then dg, du and h from g and
// u, which the forward has kept, or which lie where h and du will (remake.cu). Their columns go
// through the ring of stages too, after the item's products, so that they arrive while those run
// and take no registers. For the lists (token_lists.h) g also says which tokens are active.

#include "cuda/check.h"
#include "cuda/coefficients.cuh"
#include "cuda/sm90/gather.cuh"
#include "cuda/sm90/products.h"

namespace twell::cuda::sm90 {
namespace {

template <bool kGated>
struct CoefficientsEpilogue {
  static constexpr int kMatrices = 1;
  static constexpr bool kFills = true;
  static constexpr int kFactors = kGated ? 2 : 1;  // g and u
  static constexpr int kBox = kUnionStep * kHalfTokens;

  struct Scratch {};
  using Stages = GatherStages<Scratch>;
  static_assert(kFactors * Gather::kConsumers * kBox <= kUnionItem * kTileHidden);

  class Consumer;

  BackwardChunk chunk;
  ActiveTokens* active;
  std::uint32_t* silent_nans;
  CUtensorMap kept[kFactors];  // [saved room, 64]
  CUtensorMap anew[kFactors];  // [room, 64]

  __device__ static int count(const Schedule& schedule) { return schedule.item_count; }

  // One stage for each 64 positions: their columns of the halves that use them. Those made anew are
  // read before the coefficients that replace them are written: these wait for the stage.
  __device__ __forceinline__ void fill(Stages& shared, typename Stages::Ring& ring,
                                       const ForwardChunk& forward, UnionItem item) const {
    const int place = forward.kept_place(item.tile());
    const CUtensorMap* columns = place >= 0 ? kept : anew;
    const int bases[Gather::kConsumers] = {base_of(forward, place, item.tile(), 0),
                                           base_of(forward, place, item.tile(), 1)};
#pragma unroll 1
    for (int step = 0; step < item.steps(); ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      if (threadIdx.x == 0) {
        const int wanting = item.part(0).has(step) + item.part(1).has(step);
        ptx::mbarrier_arrive_expect(&shared.full[stage], kFactors * wanting * kBox * 2);
#pragma unroll
        for (int half = 0; half < Gather::kConsumers; ++half) {
          if (!item.part(half).has(step)) continue;
          const int column = bases[half] + item.first_position() + step * kUnionStep;
          for (int factor = 0; factor < kFactors; ++factor) {
            ptx::tma_load(box(shared, stage, factor, half), &columns[factor], &shared.full[stage],
                          0, column);
          }
        }
      }
      ptx::copy_async_arrive(&shared.full[stage]);
    }
  }

  // Where the factors of a half lie.
  __device__ static __forceinline__ int base_of(const ForwardChunk& forward, int place, int tile,
                                                int half) {
    return place >= 0 ? forward.kept_base(place, tile, half) : forward.halves[2 * tile + half].base;
  }

  __device__ static __forceinline__ __nv_bfloat16* box(Stages& shared, int stage, int factor,
                                                       int half) {
    return shared.weights[stage] + (factor * Gather::kConsumers + half) * kBox;
  }
};

template <bool kGated>
class CoefficientsEpilogue<kGated>::Consumer {
 public:
  __device__ Consumer(const CoefficientsEpilogue& epilogue, const ForwardChunk&, Stages& shared,
                      int half)
      : epilogue_(epilogue),
        chunk_(epilogue.chunk),
        shared_(shared),
        half_(half),
        grad_l1_(chunk_.grad_l1 ? *chunk_.grad_l1 : 0) {}

  __device__ void look_ahead(GatherPart) const {}
  __device__ void begin() const {}

  struct Held {
    int count;   // of the union
    int column;  // of the part's first position
  };

  template <int kN>
  __device__ __forceinline__ Held before(GatherPart part) const {
    return {chunk_.forward.counts[part.tile()],
            chunk_.forward.halves[2 * part.tile() + half_].base + part.first_position()};
  }

  template <int kN>
  __device__ __forceinline__ void after(const float (&sums)[kN / 2], Held held,
                                        typename Stages::Ring& ring, GatherPart part) const {
    constexpr int kGroups = kUnionStep / 8;
    constexpr int kAtOnce = kGroups / 2;  // whose factors are in registers
    const int quad = threadIdx.x % 4;
    const int warp = threadIdx.x / 32 % 4;
    const int row = threadIdx.x % 32 / 4;
    const int word = warp * 8 + row;  // of a column
    const int token = (2 * part.tile() + half_) * kHalfTokens + warp * 16 + row;
    // Of tokens beyond the last one a NaN or an infinity in a weight can make coefficients.
    const std::uint32_t magnitudes = (token < chunk_.forward.tokens ? 0x7fffu : 0) |
                                     (token + 8 < chunk_.forward.tokens ? 0x7fff0000u : 0);
    // Of column 2 quad + parity in the swizzled box; it is the same for the columns 8 further on.
    int offsets[2];
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int column = 2 * quad + parity;
      offsets[parity] = column * kColumnWords + ((word / 4) ^ column) * 4 + word % 4;
    }
    // Of the union's positions, from this thread's first one on: the others are padding.
    const int count = held.count - part.first_position() - 2 * quad;
    const std::int64_t at = (std::int64_t{held.column} + 2 * quad) * kColumnWords + word;
    std::uint32_t* dg = chunk_.dg + at;
    std::uint32_t* du = kGated ? chunk_.du + at : nullptr;
    std::uint32_t* h = chunk_.h + at;
    // The warp's share of the first active tokens that this thread writes.
    auto* active = reinterpret_cast<std::uint8_t*>(epilogue_.active + held.column + row / 2 * 8 +
                                                   2 * quad + row % 2) +
                   warp;
#pragma unroll
    for (int step = 0; step < kN / kUnionStep; ++step, ring.advance()) {
      ptx::mbarrier_wait(&shared_.full[ring.stage], ring.parity);
      // Bit 2 j + parity: whether the low token is active, 16 + that: the high one.
      std::uint32_t actives = 0;
      std::uint32_t silent = 0;  // of any coefficient of a pair that is not active
#pragma unroll
      for (int from = 0; from < kGroups; from += kAtOnce) {
        std::uint32_t factors[kFactors][kAtOnce][2];
#pragma unroll
        for (int factor = 0; factor < kFactors; ++factor) {
          const auto* words =
              reinterpret_cast<const std::uint32_t*>(box(shared_, ring.stage, factor, half_));
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
            for (int parity = 0; parity < 2; ++parity) {
              factors[factor][j][parity] = words[8 * (from + j) * kColumnWords + offsets[parity]];
            }
          }
        }
        if (from + kAtOnce == kGroups) {
          ptx::fence_async_proxy();  // TMA may then overwrite what was read
          __syncwarp();
          if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared_.empty[ring.stage]);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            const int position = step * kUnionStep + 8 * (from + j) + parity;
            const float* sum = sums + (step * kGroups + from + j) * 4 + parity;
            const auto own = Coefficients::make<kGated>(
                factors[0][j][parity], factors[kFactors - 1][j][parity], sum[0], sum[2], grad_l1_);
            const bool in_use = position < count;  // padding is no 0 · inf
            dg[position * kColumnWords] = in_use ? own.dg : 0;
            if constexpr (kGated) du[position * kColumnWords] = in_use ? own.du : 0;
            h[position * kColumnWords] = in_use ? own.h : 0;

            const std::uint32_t own_active =
                __vminu2(factors[0][j][parity] & magnitudes, 0x00010001u);
            actives |= own_active << (2 * (from + j) + parity);
            const std::uint32_t any = in_use ? (kGated ? own.du : 0) | own.h : 0;
            silent |= any & magnitudes & ~(own_active * 0xffffu);
          }
        }
      }
      if (silent != 0) note_nans(epilogue_, held, part, step, actives, magnitudes);
      const std::uint32_t bytes = transpose_in_rows(actives, row);
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const int position = step * kUnionStep + byte % 2 * (kUnionStep / 2);
        active[position * sizeof(ActiveTokens) + byte / 2 * sizeof(std::uint32_t)] =
            static_cast<std::uint8_t>(bytes >> (8 * byte));
      }
    }
  }

 private:
  // Each of a warp's 8 rows holds 4 bytes: bit r of row s becomes bit s of row r, in each.
  __device__ static __forceinline__ std::uint32_t transpose_in_rows(std::uint32_t bits, int row) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      constexpr std::uint32_t kKept[] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu};
      const int distance = 1 << i;
      const std::uint32_t other = __shfl_xor_sync(~0u, bits, 4 * distance);
      bits = (row & distance) == 0 ? (bits & kKept[i]) | (other & kKept[i]) << distance
                                   : (bits & ~kKept[i]) | (other >> distance & kKept[i]);
    }
    return bits;
  }

  // Of this thread's pairs in a step: one that is not active has no coefficient but 0 or NaN.
  __device__ __noinline__ static void note_nans(const CoefficientsEpilogue& epilogue, Held held,
                                                GatherPart part, int step, std::uint32_t actives,
                                                std::uint32_t magnitudes) {
    const BackwardChunk& chunk = epilogue.chunk;
    const int word = threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;
    const UnionEntry* entries = chunk.forward.unions +
                                static_cast<std::size_t>(part.tile()) * chunk.forward.capacity +
                                part.first_position();
    for (int i = 0; i < kUnionStep / 4; ++i) {
      const int position = step * kUnionStep + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const std::int64_t at = (std::int64_t{held.column} + position) * kColumnWords + word;
      const std::uint32_t silent = magnitudes & ~((actives >> i & 0x00010001u) * 0xffffu);
      const std::uint32_t nans = (kGated && (chunk.du[at] & silent) != 0 ? TokenLists::kNanDu : 0) |
                                 ((chunk.h[at] & silent) != 0 ? TokenLists::kNanH : 0);
      if (nans != 0) atomicOr(&epilogue.silent_nans[entries[position].row()], nans);
    }
  }

  const CoefficientsEpilogue& epilogue_;
  const BackwardChunk& chunk_;
  Stages& shared_;
  const int half_;
  const float grad_l1_;
};

template <bool kGated>
__global__ void __launch_bounds__(Gather::kThreads, 1)
    coefficients_kernel(const __grid_constant__ GatherOperands<1> operands,
                        const __grid_constant__ CoefficientsEpilogue<kGated> epilogue) {
  multiply_items(epilogue.chunk.forward, operands, epilogue);
}

template <bool kGated>
Status launch_for(const BackwardChunk& chunk, const TokenLists& lists, const void* down,
                  int multiprocessors, cudaStream_t stream) {
  using Epilogue = CoefficientsEpilogue<kGated>;
  GatherOperands<1> operands;
  const ForwardChunk& forward = chunk.forward;
  const Tokens dy = {chunk.dy, forward.tokens, 0};
  if (Status status = make_operands<1>(operands, forward, dy, {down}); !status.ok()) return status;
  Epilogue epilogue = {chunk, lists.active, lists.silent_nans, {}, {}};
  const std::uint32_t* const kept[] = {chunk.saved_g, chunk.saved_u};
  const std::uint32_t* const anew[] = {chunk.h, chunk.du};
  const auto make_map = [](CUtensorMap& map, const std::uint32_t* data, std::int64_t rows) {
    return data ? make_tensor_map(map, data, rows, kHalfTokens, kUnionStep) : Status();
  };
  for (int factor = 0; factor < Epilogue::kFactors; ++factor) {
    for (const Status& status : {make_map(epilogue.kept[factor], kept[factor], chunk.saved_room),
                                 make_map(epilogue.anew[factor], anew[factor], forward.room)}) {
      if (!status.ok()) return status;
    }
  }
  return launch(coefficients_kernel<kGated>, multiprocessors, Gather::kThreads,
                kGatherBytes<Epilogue>, stream, operands, epilogue);
}

}  // namespace

Status launch_coefficients(const BackwardChunk& chunk, const TokenLists& lists,
                           const FfnWeights& weights, int multiprocessors, cudaStream_t stream) {
  const auto launch_it = weights.gate ? launch_for<true> : launch_for<false>;
  return launch_it(chunk, lists, weights.down, multiprocessors, stream);
}

}  // namespace twell::cuda::sm90
