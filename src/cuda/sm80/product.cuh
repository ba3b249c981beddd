#pragma once
// The product that the kernels for sm_80 and newer share: a CTA of eight warps multiplies 128
// tokens by kN columns, 32 summed elements at a time, through a ring of shared-memory stages that
// cp.async fills. Warp w looks after half tile w / 4 and the columns from w % 4 * kN / 4 on. Where
// the operands' rows lie is the business of a source (below).

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/forward.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace twell::cuda::sm80 {

inline constexpr int kThreads = 256;
inline constexpr int kResident = 2;  // CTAs per multiprocessor: one's epilogue under the other
inline constexpr int kColumns = 128;
inline constexpr int kStep = 32;  // summed elements of a stage
inline constexpr int kStages = 3;
inline constexpr int kWarpsPerHalf = 4;
inline constexpr int kSubtiles = kHalfTokens / 16;  // of a warp's tokens

// How an operand lies in memory, and in a stage.
enum class Major {
  kInner,  // a row is one token or column, its summed elements contiguous
  kOuter,  // a row is one summed element, its tokens or columns contiguous
};

// An operand of a stage: 128 x 32 or 32 x 128 bf16 in pieces of 16 bytes, swizzled so that eight
// rows of an 8 x 8 matrix always lie in different banks.
template <Major kMajor>
struct Tile {
  static constexpr int kRows = kMajor == Major::kInner ? kTileTokens : kStep;
  static constexpr int kPieces = (kMajor == Major::kInner ? kStep : kTileTokens) / 8;  // of a row
  static constexpr int kRowsAtOnce = kThreads / kPieces;  // by all threads
  static constexpr int kBytes = kRows * kPieces * 16;

  __device__ static __forceinline__ std::uint32_t offset(int row, int piece) {
    const int mixed = piece ^ (kMajor == Major::kInner ? row / 2 % 4 : row % 8);
    return (row * kPieces + mixed) * 16;
  }
};

inline constexpr int kTileBytes = Tile<Major::kInner>::kBytes;
inline constexpr int kSharedBytes = kStages * 2 * kTileBytes;
static_assert(kTileTokens == kColumns && Tile<Major::kOuter>::kBytes == kTileBytes);

// A source copies one operand, stage after stage: copy(target) issues this thread's share of the
// next stage's copies. Rows and elements that do not exist become zeros.

// Rows [tokens or columns] of `matrix` [any, hidden], whose summed elements are contiguous. row(r):
// where the r-th of the kRows begins, null if it does not exist.
template <int kRows>
class InnerSource {
 public:
  template <class Row>
  __device__ __forceinline__ InnerSource(const __nv_bfloat16* matrix, int hidden, const Row& row)
      : matrix_(matrix), left_(hidden - piece() * 8) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) rows_[i] = row(first() + i * T::kRowsAtOnce);
  }

  __device__ __forceinline__ void copy(std::uint32_t target) {
    const std::uint32_t place = target + T::offset(first(), piece());
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const bool exists = rows_[i] != nullptr && at_ < left_;
      ptx::copy_async_16(place + i * T::kRowsAtOnce * T::kPieces * 16,
                         exists ? rows_[i] + (at_ + piece() * 8) : matrix_, exists);
    }
    at_ += kStep;
  }

 private:
  using T = Tile<Major::kInner>;
  static constexpr int kShare = kRows / T::kRowsAtOnce;
  static_assert(kRows % T::kRowsAtOnce == 0 && T::kRowsAtOnce % 8 == 0);

  __device__ static __forceinline__ int first() { return threadIdx.x / T::kPieces; }
  __device__ static __forceinline__ int piece() { return threadIdx.x % T::kPieces; }

  const __nv_bfloat16* matrix_;
  const __nv_bfloat16* rows_[kShare];
  int at_ = 0;
  int left_;  // elements of a row from this thread's first piece on
};

// Rows [summed elements] of rows.matrix, whose tokens or columns are contiguous. rows.row(r) says,
// one stage ahead, what row r of all stages is: a value that is kept until rows.address(value,
// piece) makes it the address of 8 of its elements, null if they do not exist.
template <class Rows>
class OuterSource {
 public:
  __device__ __forceinline__ explicit OuterSource(const Rows& rows) : rows_(rows) { look_ahead(); }

  __device__ __forceinline__ void copy(std::uint32_t target) {
    const int piece = threadIdx.x % T::kPieces;
    const std::uint32_t place = target + T::offset(threadIdx.x / T::kPieces, piece);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const __nv_bfloat16* source = rows_.address(next_[i], piece);
      ptx::copy_async_16(place + i * T::kRowsAtOnce * T::kPieces * 16,
                         source ? source : rows_.matrix, source != nullptr);
    }
    at_ += kStep;
    look_ahead();
  }

 private:
  using T = Tile<Major::kOuter>;
  static constexpr int kShare = T::kRows / T::kRowsAtOnce;
  static_assert(T::kRowsAtOnce % 8 == 0);

  __device__ __forceinline__ void look_ahead() {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      next_[i] = rows_.row(at_ + static_cast<int>(threadIdx.x) / T::kPieces + i * T::kRowsAtOnce);
    }
  }

  const Rows& rows_;
  typename Rows::Row next_[kShare];
  int at_ = 0;
};

// What a thread reads of an operand's tile: matrices of 16 tokens or columns by 16 summed elements.
template <Major kMajor>
class Fragments {
 public:
  // `outer`: the warp's first token or column. The matrices' order: tokens before summed elements
  // for the left operand, after them for the right one.
  __device__ __forceinline__ Fragments(int outer, bool left) {
    const int lane = threadIdx.x % 32;
    const int matrix = lane / 8;
    const int row = lane % 8;
    const int along = (left ? matrix % 2 : matrix / 2) * 8;  // tokens or columns
    const int across = left ? matrix / 2 : matrix % 2;       // pieces of summed elements
    offset_ = kMajor == Major::kInner ? Tile<kMajor>::offset(outer + along + row, across)
                                      : Tile<kMajor>::offset(across * 8 + row, (outer + along) / 8);
  }

  // The i-th 16 tokens or columns and the k-th 16 summed elements.
  __device__ __forceinline__ void load(std::uint32_t (&registers)[4], std::uint32_t tile, int i,
                                       int k) const {
    const int pieces = kMajor == Major::kInner ? k * 2 : i * 2;
    const int rows = (kMajor == Major::kInner ? i : k) * 16;
    ptx::load_matrices<kMajor == Major::kOuter>(
        registers, tile + (offset_ ^ (pieces * 16)) + rows * Tile<kMajor>::kPieces * 16);
  }

 private:
  std::uint32_t offset_;
};

// Where a thread's sums lie: [subtile of 16 tokens, group of 8 columns, accumulator].
template <int kN>
using Sums = float[kSubtiles][kN / kWarpsPerHalf / 8][4];

// sums ← the products of 128 tokens (`left`) with kN columns (`right`) over `steps` stages. Begins
// with a barrier; all threads call.
template <int kN, Major kMajor, class Left, class Right>
__device__ __forceinline__ void multiply(Sums<kN>& sums, int steps, Left& left, Right& right) {
  constexpr int kGroups = kN / kWarpsPerHalf / 8;
  const int warp = threadIdx.x / 32;
  const std::uint32_t stages = ptx::shared_address(ptx::dynamic_shared<std::uint8_t>());
  const Fragments<kMajor> tokens(warp / kWarpsPerHalf * kHalfTokens, true);
  const Fragments<kMajor> columns(warp % kWarpsPerHalf * (kGroups * 8), false);
#pragma unroll
  for (auto& subtile : sums) {
#pragma unroll
    for (auto& group : subtile) {
#pragma unroll
      for (float& sum : group) sum = 0;
    }
  }
  const auto fill = [&](std::uint32_t stage) {
    left.copy(stage);
    right.copy(stage + kTileBytes);
  };
  constexpr std::uint32_t kStageBytes = 2 * kTileBytes;

  __syncthreads();  // the previous product may still be reading
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) fill(stages + stage * kStageBytes);
    ptx::copy_async_commit();
  }
  std::uint32_t full = stages;
  std::uint32_t empty = stages + (kStages - 1) * kStageBytes;
  const auto advance = [&](std::uint32_t& stage) {
    stage += kStageBytes;
    if (stage == stages + kStages * kStageBytes) stage = stages;
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();  // every thread's copies are here, and the stage before is no longer read
    if (step + kStages - 1 < steps) fill(empty);
    ptx::copy_async_commit();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      std::uint32_t a[kSubtiles][4], b[kGroups / 2][4];
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) tokens.load(a[i], full, i, k);
#pragma unroll
      for (int j = 0; j < kGroups / 2; ++j) columns.load(b[j], full + kTileBytes, j, k);
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          const auto& pair = b[j / 2];
          ptx::mma_16x8x16(sums[i][j], a[i], {pair[j % 2 * 2], pair[j % 2 * 2 + 1]});
        }
      }
    }
    advance(full);
    advance(empty);
  }
}

// The rows of x in a tile of 128 tokens.
__device__ __forceinline__ InnerSource<kTileTokens> tokens_of(const ForwardChunk& chunk,
                                                              const __nv_bfloat16* x, int tile) {
  return {x, chunk.hidden, [&](int row) -> const __nv_bfloat16* {
            const int token = tile * kTileTokens + row;
            if (token >= chunk.tokens) return nullptr;
            return x + static_cast<std::size_t>(token) * chunk.hidden;
          }};
}

// x, from the chunk's first token on.
inline const __nv_bfloat16* rows_of(const ForwardChunk& chunk, const Tokens& x) {
  return static_cast<const __nv_bfloat16*>(x.x) + static_cast<std::size_t>(x.first) * chunk.hidden;
}

}  // namespace twell::cuda::sm80
