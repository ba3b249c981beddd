// The coefficients over the unions of a chunk on Hopper, of the tiles whose g and u the forward has
// kept: dh = dy Dᵀ, then dg, du and h. The columns of g and u go through the ring of stages too,
// after the item's products, so that they arrive while those run and take no registers.

#include "cuda/check.h"
#include "cuda/coefficients.cuh"
#include "cuda/sm90/gather.cuh"
#include "cuda/sm90/products.h"

namespace twell::cuda::sm90 {
namespace {

template <bool kGated>
struct CoefficientsEpilogue {
  static constexpr int kMatrices = kGated ? 2 : 1;  // g and u
  static constexpr int kBox = kUnionStep * kHalfTokens;

  struct Scratch {};
  using Stages = GatherStages<Scratch>;
  static_assert(kMatrices * Gather::kConsumers * kBox <= kUnionItem * kTileHidden);

  class Consumer;

  BackwardChunk chunk;
  CUtensorMap columns[kMatrices];  // [2 positions, 64], those that were kept

  __device__ bool takes(UnionItem item) const { return chunk.place(item.tile) >= 0; }

  // One stage for each 64 positions: their columns of both halves.
  __device__ __forceinline__ void fill(Stages& shared, GatherRing& ring,
                                       const ForwardChunk& forward, UnionItem item) const {
    const int place = chunk.place(item.tile);
    const int count = forward.counts[item.tile];
#pragma unroll 1
    for (int step = 0; step <= item.steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.full[stage], kMatrices * Gather::kConsumers * kBox * 2);
        for (int half = 0; half < Gather::kConsumers; ++half) {
          const int column = static_cast<int>(SavedColumns::column(place, half, count)) +
                             item.first * kUnionItem + step * kUnionStep;
          for (int matrix = 0; matrix < kMatrices; ++matrix) {
            ptx::tma_load(box(shared, stage, matrix, half), &columns[matrix], &shared.full[stage],
                          0, column);
          }
        }
      }
      ptx::copy_async_arrive(&shared.full[stage]);
    }
  }

  __device__ static __forceinline__ __nv_bfloat16* box(Stages& shared, int stage, int matrix,
                                                       int half) {
    return shared.weights[stage] + (matrix * Gather::kConsumers + half) * kBox;
  }
};

template <bool kGated>
class CoefficientsEpilogue<kGated>::Consumer {
 public:
  __device__ Consumer(const CoefficientsEpilogue& epilogue, const ForwardChunk&, Stages& shared,
                      int half)
      : chunk_(epilogue.chunk),
        shared_(shared),
        half_(half),
        grad_l1_(chunk_.grad_l1 ? *chunk_.grad_l1 : 0) {}

  __device__ void look_ahead(UnionItem) const {}
  __device__ void begin() const {}

  struct Held {
    int count;  // of the union
  };

  template <int kN>
  __device__ __forceinline__ Held before(UnionItem item) const {
    return {chunk_.forward.counts[item.tile]};
  }

  template <int kN>
  __device__ __forceinline__ void after(const float (&sums)[kN / 2], Held held, GatherRing& ring,
                                        UnionItem item) const {
    constexpr int kGroups = kUnionStep / 8;
    const int quad = threadIdx.x % 4;
    const int word = threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;  // of a column
    // Of column 2 quad + parity in the swizzled box; it is the same for the columns 8 further on.
    int offsets[2];
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int column = 2 * quad + parity;
      offsets[parity] = column * kColumnWords + ((word / 4) ^ column) * 4 + word % 4;
    }
    const int first = item.first * kUnionItem + 2 * quad;  // this thread's first position
    const std::size_t half_tile = 2 * item.tile + half_;
    const std::size_t at = (half_tile * chunk_.forward.capacity + first) * kColumnWords + word;
    std::uint32_t* dg = chunk_.dg + at;
    std::uint32_t* du = kGated ? chunk_.du + at : nullptr;
    std::uint32_t* h = chunk_.h + at;
#pragma unroll
    for (int step = 0; step < kN / kUnionStep; ++step, ring.advance()) {
      ptx::mbarrier_wait(&shared_.full[ring.stage], ring.parity);
      std::uint32_t factors[kMatrices][kGroups][2];
#pragma unroll
      for (int matrix = 0; matrix < kMatrices; ++matrix) {
        const auto* words =
            reinterpret_cast<const std::uint32_t*>(box(shared_, ring.stage, matrix, half_));
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            factors[matrix][j][parity] = words[8 * j * kColumnWords + offsets[parity]];
          }
        }
      }
      ptx::fence_async_proxy();  // TMA may then overwrite what was read
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared_.empty[ring.stage]);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          const int position = step * kUnionStep + 8 * j + parity;
          const float* sum = sums + (step * kGroups + j) * 4 + parity;
          const auto own = Coefficients::make<kGated>(
              factors[0][j][parity], factors[kMatrices - 1][j][parity], sum[0], sum[2], grad_l1_);
          const bool in_use = first + position < held.count;  // padding is no 0 · inf
          dg[position * kColumnWords] = in_use ? own.dg : 0;
          if constexpr (kGated) du[position * kColumnWords] = in_use ? own.du : 0;
          h[position * kColumnWords] = in_use ? own.h : 0;
        }
      }
    }
  }

 private:
  const BackwardChunk& chunk_;
  Stages& shared_;
  const int half_;
  const float grad_l1_;
};

template <bool kGated>
__global__ void __launch_bounds__(Gather::kThreads, 1)
    coefficients_kernel(const __grid_constant__ GatherOperands operands,
                        const __grid_constant__ CoefficientsEpilogue<kGated> epilogue) {
  multiply_items(epilogue.chunk.forward, operands, epilogue);
}

template <bool kGated>
Status launch_kept(const BackwardChunk& chunk, const void* down, int multiprocessors,
                   cudaStream_t stream) {
  using Epilogue = CoefficientsEpilogue<kGated>;
  GatherOperands operands;
  const Tokens dy = {chunk.dy, chunk.forward.tokens, 0};
  if (Status status = make_operands(operands, chunk.forward, dy, down); !status.ok()) {
    return status;
  }
  Epilogue epilogue = {chunk, {}};
  const std::uint32_t* const kept[] = {chunk.saved_g, chunk.saved_u};
  for (int matrix = 0; matrix < Epilogue::kMatrices; ++matrix) {
    Status status =
        make_tensor_map(epilogue.columns[matrix], kept[matrix],
                        std::int64_t{2} * chunk.saved_positions, kHalfTokens, kUnionStep);
    if (!status.ok()) return status;
  }
  return launch(coefficients_kernel<kGated>, multiprocessors, Gather::kThreads,
                kGatherBytes<Epilogue>, stream, operands, epilogue);
}

}  // namespace

Status launch_coefficients(const BackwardChunk& chunk, const FfnWeights& weights,
                           int multiprocessors, cudaStream_t stream) {
  if (!chunk.saved_g) return {};
  const auto launch_for = weights.gate ? launch_kept<true> : launch_kept<false>;
  return launch_for(chunk, weights.down, multiprocessors, stream);
}

}  // namespace twell::cuda::sm90
