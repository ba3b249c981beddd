#pragma once
// Warp-level matrix multiply-accumulate, sm_80 and newer.

#include <cstdint>

namespace twell::cuda::ptx {

// c[16, 8] += a[16, 16] b[16, 8], bf16 in, float32 accumulated. Lane l, with r = l / 4 and
// q = l % 4, holds c[r + 8 s, 2 q + p] in c[2 s + p]; of a, rows r (a[0], a[2]) and r + 8 (a[1],
// a[3]), summed elements 2 q and 2 q + 1 (a[0], a[1]) and those + 8 (a[2], a[3]); of b, column r
// and the same summed elements (b[0]; b[1]).
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices from shared memory: lane l names the address of row l % 8 of matrix l / 8 and
// receives of each, in registers[i], the elements 2 (l % 4) and + 1 of row l / 4, or, transposed,
// of column l / 4. Rows are 16 bytes, 16-byte aligned.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&registers)[4], std::uint32_t row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
  }
}

// 16 bytes that are read once: not kept in L1.
__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

}  // namespace twell::cuda::ptx
