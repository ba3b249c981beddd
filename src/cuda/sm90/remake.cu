// On Hopper, g and u over the unions of the tiles of which the forward could not keep them, with
// the sums and roundings of the forward: relu(x Gᵀ) (plain: relu(x Uᵀ)) into the place of h and x
// Uᵀ into that of du, where the coefficients kernel reads them. One item for each matrix.

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/sm90/gather.cuh"
#include "cuda/sm90/products.h"

namespace twell::cuda::sm90 {
namespace {

template <bool kGated>
struct RemakeEpilogue {
  static constexpr int kMatrices = kGated ? 2 : 1;  // the first decides
  static constexpr bool kFills = false;

  struct Scratch {};
  using Stages = GatherStages<Scratch>;

  class Consumer;

  std::uint32_t* columns[kMatrices];  // [room, 32]

  __device__ static int count(const Schedule& schedule) { return schedule.anew; }
};

template <bool kGated>
class RemakeEpilogue<kGated>::Consumer {
 public:
  __device__ Consumer(const RemakeEpilogue& epilogue, const ForwardChunk& chunk, Stages&, int half)
      : epilogue_(epilogue), chunk_(chunk), half_(half) {}

  // Each lane looks up every 32nd position.
  __device__ __forceinline__ void look_ahead(GatherPart part) {
    const UnionEntry* entries = chunk_.unions +
                                static_cast<std::size_t>(part.tile()) * chunk_.capacity +
                                part.first_position() + threadIdx.x % 32;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      next_[w] = w < part.steps() * (kUnionStep / 32) ? entries[32 * w].neuron : 0;
    }
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      used_[w] = __ballot_sync(~0u, UnionEntry{next_[w], 0}.in_half(half_));
    }
  }

  struct Held {
    std::int64_t column;
  };

  template <int kN>
  __device__ __forceinline__ Held before(GatherPart part) const {
    return {std::int64_t{chunk_.halves[2 * part.tile() + half_].base} + part.first_position()};
  }

  template <int kN>
  __device__ __forceinline__ void after(const float (&sums)[kN / 2], Held held,
                                        typename Stages::Ring&, GatherPart part) const {
    const int quad = threadIdx.x % 4;
    const int word = threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;  // of a column
    std::uint32_t* out =
        epilogue_.columns[part.matrix] + (held.column + 2 * quad) * kColumnWords + word;
    const bool decides = part.matrix == 0;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const std::uint32_t used = used_[j / 4] >> (8 * (j % 4) + 2 * quad);
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const float low = sums[4 * j + parity], high = sums[4 * j + 2 + parity];
        std::uint32_t value = ptx::pack(low, high);
        // As in the forward, a neuron that the half does not use has g = 0 for its tokens.
        if (decides) value = used >> parity & 1u ? ptx::pack_relu(low, high) : 0;
        out[(8 * j + parity) * kColumnWords] = value;
      }
    }
  }

 private:
  static constexpr int kWords = kUnionItem / 32;

  const RemakeEpilogue& epilogue_;
  const ForwardChunk& chunk_;
  const int half_;
  std::uint32_t next_[kWords] = {};
  std::uint32_t used_[kWords] = {};  // a bit for each of the item's positions
};

template <bool kGated>
__global__ void __launch_bounds__(Gather::kThreads, 1)
    remake_kernel(const ForwardChunk chunk,
                  const __grid_constant__ GatherOperands<kGated ? 2 : 1> operands,
                  const __grid_constant__ RemakeEpilogue<kGated> epilogue) {
  multiply_items(chunk, operands, epilogue);
}

template <bool kGated>
Status launch_for(const BackwardChunk& chunk, const void* const (&weights)[kGated ? 2 : 1],
                  const RemakeEpilogue<kGated>& epilogue, int multiprocessors,
                  cudaStream_t stream) {
  GatherOperands<kGated ? 2 : 1> operands;
  const Tokens x = {chunk.x, chunk.forward.tokens, 0};
  if (Status status = make_operands(operands, chunk.forward, x, weights); !status.ok()) {
    return status;
  }
  return launch(remake_kernel<kGated>, multiprocessors, Gather::kThreads,
                kGatherBytes<RemakeEpilogue<kGated>>, stream, chunk.forward, operands, epilogue);
}

}  // namespace

Status launch_remake(const BackwardChunk& chunk, const FfnWeights& weights, int multiprocessors,
                     cudaStream_t stream) {
  if (!weights.gate) {
    return launch_for<false>(chunk, {weights.up}, {{chunk.h}}, multiprocessors, stream);
  }
  return launch_for<true>(chunk, {weights.gate, weights.up}, {{chunk.h, chunk.du}}, multiprocessors,
                          stream);
}

}  // namespace twell::cuda::sm90
