// The gradients of the weights: a CTA makes those of 64 neurons for 128 hidden columns, summed over
// the neurons' own list of tokens, whose rows of x or dy are gathered. Those of the gate and the up
// projection share the rows of x: the coefficients of both lie side by side.

#include "cuda/check.h"
#include "cuda/sm80/product.cuh"
#include "cuda/sm80/products.h"

namespace twell::cuda::sm80 {
namespace {

// kMatrices gradients: gradients[m] [n, k] ← Σ_t coefficients[t, 64 m + n] source[t, k].
template <int kMatrices>
struct Sum {
  const __nv_bfloat16* source;        // x or dy [chunk tokens, hidden]
  const __nv_bfloat16* coefficients;  // [blocks, capacity, 64 kMatrices]
  WeightGradient gradients[kMatrices];
  int hidden;
  int neurons;
  bool first;  // round of the pass

  Sum(const BackwardChunk& chunk, const void* rows, const std::uint32_t* own)
      : source(static_cast<const __nv_bfloat16*>(rows)),
        coefficients(reinterpret_cast<const __nv_bfloat16*>(own)),
        hidden(chunk.forward.hidden),
        neurons(chunk.forward.neurons),
        first(chunk.first) {}
};

// The listed rows of the source; columns from the strip's first on.
struct TokenRows {
  using Row = int;
  const __nv_bfloat16* matrix;
  const std::int32_t* tokens;
  int count;
  int columns;
  int hidden;

  __device__ Row row(int i) const { return i < count ? tokens[i] : -1; }
  __device__ const __nv_bfloat16* address(Row token, int piece) const {
    if (token < 0 || piece * 8 >= columns) return nullptr;
    return matrix + static_cast<std::size_t>(token) * hidden + piece * 8;
  }
};

// Their coefficients.
template <int kWidth>
struct CoefficientRows {
  using Row = int;
  const __nv_bfloat16* matrix;
  int count;

  __device__ Row row(int i) const { return i < count ? i : -1; }
  __device__ const __nv_bfloat16* address(Row i, int piece) const {
    if (i < 0 || piece * 8 >= kWidth) return nullptr;
    return matrix + static_cast<std::size_t>(i) * kWidth + piece * 8;
  }
};

// The block with the rank-th longest list, ties by index: what takes longest begins first. All
// lanes of a warp call.
__device__ __forceinline__ int block_of_rank(const NeuronRows& rows, int rank) {
  static_assert(kGroupBlocks <= 32, "a lane for each block");
  const int lane = threadIdx.x % 32;
  const int count = lane < rows.blocks ? rows.counts[lane] : -1;
  int before = 0;
#pragma unroll
  for (int other = 0; other < kGroupBlocks; ++other) {
    const int longer = __shfl_sync(~0u, count, other);
    before += longer > count || (longer == count && other < lane);
  }
  return __ffs(__ballot_sync(~0u, before == rank)) - 1;
}

template <int kMatrices>
__global__ void __launch_bounds__(kThreads, kResident)
    weights_kernel(const BackwardChunk chunk, const NeuronRows rows, const Sum<kMatrices> sum,
                   int strips) {
  constexpr int kWidth = kMatrices * kRowNeurons;
  if (chunk.forward.schedule->tiles == 0) return;
  const bool last = chunk.in_last_round();
  const int block = block_of_rank(rows, blockIdx.x / strips);
  const int strip = blockIdx.x % strips * kColumns;  // its first hidden column
  const int count = rows.counts[block];
  if (count == 0 && !sum.first && !last) return;  // nothing to add
  const std::size_t list = static_cast<std::size_t>(block) * rows.capacity;
  const TokenRows token_rows = {sum.source + strip, rows.tokens + list, count, sum.hidden - strip,
                                sum.hidden};
  const CoefficientRows<kWidth> coefficient_rows = {sum.coefficients + list * kWidth, count};
  OuterSource<TokenRows> columns(token_rows);
  OuterSource<CoefficientRows<kWidth>> neurons(coefficient_rows);
  Sums<kWidth> sums;
  multiply<kWidth, Major::kOuter>(sums, ceil_div(count, kStep), columns, neurons);

  // The product's rows are hidden columns, its columns neurons.
  constexpr int kShare = kWidth / kWarpsPerHalf;
  const int warp = threadIdx.x / 32;
  const int mine = warp % kWarpsPerHalf * kShare;
  WeightGradient gradient = sum.gradients[0];
  if (mine >= kRowNeurons) gradient = sum.gradients[kMatrices - 1];
  if (!gradient.grad) return;
  const int first_neuron =
      rows.first + block * kRowNeurons + mine % kRowNeurons + static_cast<int>(threadIdx.x) % 4 * 2;
  const int first_column =
      strip + warp / kWarpsPerHalf * kHalfTokens + static_cast<int>(threadIdx.x) % 32 / 4;
  auto* grad = static_cast<__nv_bfloat16*>(gradient.grad);
#pragma unroll
  for (int j = 0; j < kShare / 8; ++j) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int neuron = first_neuron + 8 * j + parity;
      if (neuron >= sum.neurons) continue;
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int column = first_column + 16 * i + 8 * s;
          if (column >= sum.hidden) continue;
          const std::size_t at = static_cast<std::size_t>(neuron) * sum.hidden + column;
          float value = sums[i][j][2 * s + parity];
          if (!sum.first) value += gradient.totals[at];
          if (last) {
            if (gradient.accumulate) value += __bfloat162float(grad[at]);
            grad[at] = __float2bfloat16_rn(value);
          } else {
            gradient.totals[at] = value;
          }
        }
      }
    }
  }
}

template <int kMatrices>
Status launch_sum(const BackwardChunk& chunk, const NeuronRows& rows, const Sum<kMatrices>& sum,
                  cudaStream_t stream) {
  const int strips = ceil_div(sum.hidden, kColumns);
  return launch(weights_kernel<kMatrices>, rows.blocks * strips, kThreads, kSharedBytes, stream,
                chunk, rows, sum, strips);
}

}  // namespace

Status launch_projection_gradients(const BackwardChunk& chunk, const NeuronRows& rows,
                                   const WeightGradient (&gradients)[2], cudaStream_t stream) {
  if (!chunk.du) {
    Sum<1> sum(chunk, chunk.x, rows.projections);
    sum.gradients[0] = gradients[0];
    return launch_sum(chunk, rows, sum, stream);
  }
  Sum<2> sum(chunk, chunk.x, rows.projections);
  for (const int m : {0, 1}) sum.gradients[m] = gradients[m];
  return launch_sum(chunk, rows, sum, stream);
}

Status launch_down_gradient(const BackwardChunk& chunk, const NeuronRows& rows,
                            const WeightGradient& gradient, cudaStream_t stream) {
  Sum<1> sum(chunk, chunk.dy, rows.hidden);
  sum.gradients[0] = gradient;
  return launch_sum(chunk, rows, sum, stream);
}

}  // namespace twell::cuda::sm80
