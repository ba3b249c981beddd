#pragma once
// Rearranging accumulators among the four lanes that hold a row of them.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace twell::cuda {

// Lane q of each group of 4 holds the q-th word of four 16-byte rows; afterwards it holds row q.
__device__ __forceinline__ uint4 transpose_in_quad(uint4 words, int quad) {
  const bool odd = quad & 1;
  std::uint32_t a = __shfl_xor_sync(~0u, odd ? words.x : words.y, 1);
  std::uint32_t b = __shfl_xor_sync(~0u, odd ? words.z : words.w, 1);
  if (odd) {
    words.x = a;
    words.z = b;
  } else {
    words.y = a;
    words.w = b;
  }
  const bool upper = quad & 2;
  a = __shfl_xor_sync(~0u, upper ? words.x : words.z, 2);
  b = __shfl_xor_sync(~0u, upper ? words.y : words.w, 2);
  if (upper) {
    words.x = a;
    words.y = b;
  } else {
    words.z = a;
    words.w = b;
  }
  return words;
}

}  // namespace twell::cuda
