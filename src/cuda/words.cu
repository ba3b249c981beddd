// TwELL words from the columns that the gate projection left: one CTA turns the columns of a half
// tile and a block of neurons, the format's tile, into the rows of its 64 tokens.

#include "cuda/check.h"
#include "cuda/forward.h"
#include "cuda/ptx/shared.cuh"

namespace twell::cuda {
namespace {

// Rows of slots + 1 words: the odd stride keeps banks apart.
constexpr std::size_t rows_bytes(int slots) {
  return static_cast<std::size_t>(kHalfTokens) * (slots + 1) * 4;
}

__global__ void __launch_bounds__(kHalfTokens)
    words_kernel(const ForwardChunk chunk, std::uint32_t* words, int slots,
                 unsigned long long* overflow) {
  auto* rows = ptx::dynamic_shared<std::uint32_t>();  // [64, slots + 1]
  __shared__ std::uint32_t masks[kMaskWords];
  const int stride = slots + 1;
  const int block = blockIdx.x % chunk.blocks;
  const int half_tile = blockIdx.x / chunk.blocks;
  const std::size_t place = static_cast<std::size_t>(half_tile) * chunk.blocks + block;
  if (threadIdx.x < kMaskWords) masks[threadIdx.x] = chunk.masks[place * kMaskWords + threadIdx.x];
  for (int i = threadIdx.x; i < kHalfTokens * stride; i += kHalfTokens) rows[i] = 0;
  __syncthreads();

  // This thread's element of every column, in the order described in forward.h.
  const int word = threadIdx.x / 2;
  const int token = word / 8 * 16 + word % 8 + threadIdx.x % 2 * 8;
  const auto* column =
      reinterpret_cast<const std::uint16_t*>(chunk.columns + place * kBlockNeurons * kColumnWords) +
      threadIdx.x;
  std::uint32_t count = 0;
  for (int w = 0; w < kMaskWords; ++w) {
    for (std::uint32_t rest = masks[w]; rest != 0; rest &= rest - 1, column += kHalfTokens) {
      const std::uint32_t value = *column;
      if ((value & 0x7fffu) == 0) continue;
      ++count;
      if (count < static_cast<std::uint32_t>(slots)) {
        rows[token * stride + count] =
            value << 16 | (block * kBlockNeurons + w * 32 + __ffs(rest) - 1);
      }
    }
  }
  rows[token * stride] = count;
  const int first = half_tile * kHalfTokens;
  const bool exists = first + token < chunk.tokens;
  if (exists && count > static_cast<std::uint32_t>(slots) - 1) atomicAdd(overflow, 1ull);
  __syncthreads();

  for (int i = threadIdx.x; i < kHalfTokens * slots; i += kHalfTokens) {
    const int row = i / slots;
    if (first + row >= chunk.tokens) break;
    words[(static_cast<std::size_t>(first + row) * chunk.blocks + block) * slots + i % slots] =
        rows[row * stride + i % slots];
  }
}

}  // namespace

Status launch_words(const ForwardChunk& chunk, std::uint32_t* words, int slots,
                    std::int64_t* overflow, cudaStream_t stream) {
  const SharedBytes shared = {rows_bytes(slots), rows_bytes(kTwellMaxSlots)};
  return launch(words_kernel, 2 * chunk.tiles * chunk.blocks, kHalfTokens, shared, stream, chunk,
                words, slots, reinterpret_cast<unsigned long long*>(overflow));
}

}  // namespace twell::cuda
