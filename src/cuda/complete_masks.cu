// The masks of the forward for the backward, completed where dy is not finite, and the places of
// what else it has kept. One CTA per half tile, one warp per token.

#include "cuda/backward.h"
#include "cuda/check.h"

namespace twell::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ bool is_finite(float value) {
  return fabsf(value) < __int_as_float(0x7f800000);
}

// Whether any of a word's two bf16 is a NaN or an infinity.
__device__ __forceinline__ bool has_nonfinite(std::uint32_t pair) {
  return (pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u;
}

// Whether row `token` of a bf16 matrix holds a NaN or an infinity; the same in all lanes.
__device__ __forceinline__ bool row_has_nonfinite(const void* matrix, int token, int hidden) {
  const auto* row =
      static_cast<const uint4*>(matrix) + static_cast<std::size_t>(token) * hidden / 8;
  bool found = false;
  for (int i = threadIdx.x % 32; i < hidden / 8; i += 32) {
    const uint4 v = row[i];
    found |= has_nonfinite(v.x) || has_nonfinite(v.y) || has_nonfinite(v.z) || has_nonfinite(v.w);
  }
  return __ballot_sync(~0u, found) != 0;
}

__global__ void __launch_bounds__(kThreads)
    complete_masks_kernel(const BackwardChunk chunk, const std::uint32_t* saved_masks,
                          const std::int32_t* saved_places) {
  __shared__ std::uint32_t warps[kWarps];
  __shared__ std::uint32_t tokens[2][2];  // with a NaN or an infinity: of dy, of x
  const ForwardChunk& forward = chunk.forward;
  const int half_tile = blockIdx.x;
  const int words = forward.blocks * kMaskWords;
  const std::uint32_t* in = saved_masks + static_cast<std::size_t>(half_tile) * words;
  std::uint32_t* out = forward.masks + static_cast<std::size_t>(half_tile) * words;
  const int warp = threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) forward.schedule->finished = 0;
  if (threadIdx.x < 4) tokens[threadIdx.x / 2][threadIdx.x % 2] = 0;

  // The neurons of word `w`.
  const auto exist = [&](int w) {
    const int bits = forward.neurons - w * 32;
    return bits >= 32 ? ~0u : bits > 0 ? (1u << bits) - 1 : 0;
  };
  bool all = true;
  for (int w = threadIdx.x; w < words; w += kThreads) all &= in[w] == exist(w);
  const std::uint32_t all_of_warp = __ballot_sync(~0u, all);
  if (threadIdx.x % 32 == 0) warps[warp] = all_of_warp;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all &= warps[w] == ~0u;

  // A token whose x is not finite uses all neurons: there is none where some are not in use.
  for (int t = warp; t < kHalfTokens; t += kWarps) {
    const int token = half_tile * kHalfTokens + t;
    if (token >= forward.tokens) break;
    const bool of_dy = row_has_nonfinite(chunk.dy, token, forward.hidden);
    const bool of_x = all && row_has_nonfinite(chunk.x, token, forward.hidden);
    if (threadIdx.x % 32 != 0) continue;
    if (of_dy) atomicOr(&tokens[0][t / 32], 1u << (t % 32));
    if (of_x) atomicOr(&tokens[1][t / 32], 1u << (t % 32));
  }
  __syncthreads();
  const bool complete =
      (tokens[0][0] | tokens[0][1]) != 0 || (chunk.grad_l1 && !is_finite(*chunk.grad_l1));
  for (int w = threadIdx.x; w < words; w += kThreads) out[w] = complete ? exist(w) : in[w];
  if (threadIdx.x == 0) {
    forward.half_places[half_tile] = complete ? -1 : saved_places[half_tile / 2];
  }
  if (threadIdx.x < 2) {
    chunk.nonfinite[2 * half_tile + threadIdx.x] = tokens[0][threadIdx.x] | tokens[1][threadIdx.x];
  }
}

}  // namespace

Status launch_complete_masks(const BackwardChunk& chunk, const std::uint32_t* saved_masks,
                             const std::int32_t* saved_places, cudaStream_t stream) {
  return launch(complete_masks_kernel, 2 * chunk.forward.tiles, kThreads, 0, stream, chunk,
                saved_masks, saved_places);
}

}  // namespace twell::cuda
