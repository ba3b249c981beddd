#pragma once
// The primitives that every CPU driver (forward, backward, gate_pack) is built from, as a table of
// functions per element type and instruction set. Drivers are templates on T over a table; an
// instruction set is one source file that fills in a table.
//
// Every function is deterministic: the same arguments give the same bits.

#include <cstddef>
#include <cstdint>

#include "twell/device.h"
#include "twell/types.h"

namespace twell::cpu {

// The type products are accumulated in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// Rows of a row-major matrix: row i starts at data + (index ? index[i] : i) * stride.
template <class T>
struct Rows {
  const T* data = nullptr;
  std::int64_t stride = 0;  // elements
  const std::int32_t* index = nullptr;

  const T* operator[](std::int64_t i) const {
    return data + (index ? static_cast<std::int64_t>(index[i]) : i) * stride;
  }
  Rows from(std::int64_t first) const {
    return index ? Rows{data, stride, index + first} : Rows{data + first * stride, stride, nullptr};
  }
};

// A panel is the right operand B [inner, columns] of a product, cut into strips of 32 columns:
//
//   bf16:            [columns / 32][inner / 2][32][2]   (pairs along inner side by side)
//   float32, float64: [columns / 32][inner][32]
//
// with columns and inner rounded up to 32 and the padding zero. Strip s starts at
// panel + s * 32 * padded(inner).
inline constexpr std::int64_t kPanelColumns = 32;

constexpr std::int64_t padded(std::int64_t n) { return (n + 31) / 32 * 32; }

constexpr std::int64_t panel_elements(std::int64_t inner, std::int64_t columns) {
  return padded(inner) * padded(columns);
}

// A set of the tokens of one tile.
inline constexpr int kMaxTileTokens = 128;
struct TokenMask {
  std::uint64_t word[kMaxTileTokens / 64];

  bool any() const { return (word[0] | word[1]) != 0; }
  int count() const { return __builtin_popcountll(word[0]) + __builtin_popcountll(word[1]); }
  bool operator[](int token) const { return word[token / 64] >> (token % 64) & 1; }
  // Calls visit(token) for each member, ascending.
  template <class Visit>
  void for_each(Visit&& visit) const {
    for (int w = 0; w < kMaxTileTokens / 64; ++w) {
      for (std::uint64_t left = word[w]; left != 0; left &= left - 1) {
        visit(w * 64 + __builtin_ctzll(left));
      }
    }
  }
};

// relu_pack may write this many elements past the values it returns.
inline constexpr std::int64_t kPackSlack = 64;

template <class T>
struct Kernels {
  // panel = rowsᵀ: B[k][j] = rows[j][k], j < columns, k < inner.
  void (*pack_transposed)(Rows<T> rows, std::int64_t columns, std::int64_t inner, T* panel);

  // panel = rows: B[k][j] = rows[k][j], k < inner, j < columns.
  void (*pack)(Rows<T> rows, std::int64_t inner, std::int64_t columns, T* panel);

  // C[i][j] (+)= Σ_k a[i][k] B[k][j], i < rows, j < padded(columns) (the padding is written too).
  // c: stride ldc ≥ padded(columns), 64-byte aligned, ldc a multiple of 16. `next`, if not null:
  // where rows × inner elements with a's stride will soon be read; prefetched meanwhile.
  void (*multiply)(Rows<T> a, std::int64_t rows, std::int64_t inner, const T* panel,
                   std::int64_t columns, Acc<T>* c, std::int64_t ldc, bool accumulate,
                   const T* next);

  // out[i * ldo + j] = Σ_k a[i][k] b[j][k]: for few rows or few columns, where packing a panel
  // does not pay.
  void (*dots)(Rows<T> a, std::int64_t a_rows, Rows<T> b, std::int64_t b_rows, std::int64_t inner,
               Acc<T>* out, std::int64_t ldo);

  // out[j] += Σ_i weights[i] rows[i][j], j < columns.
  void (*weighted_sum)(Rows<T> rows, const T* weights, std::int64_t count, std::int64_t columns,
                       Acc<T>* out);

  // g = T(relu(c)) for `tokens` ≤ 128 values. mask: the tokens with g > 0, g = NaN, or in
  // `forced`; their g go to `values`, ascending. Returns their number.
  int (*relu_pack)(const Acc<T>* c, int tokens, TokenMask forced, TokenMask* mask, T* values);

  // out[t] = the next of `values` for each t in `mask`, else 0; t < padded(tokens). May read
  // kPackSlack elements past the values.
  void (*expand)(const T* values, TokenMask mask, int tokens, T* out);

  // h[i] = T(g[i] · u[i]).
  void (*scale)(const T* g, const Acc<T>* u, std::int64_t count, T* h);

  // Σ |values[i]|.
  double (*abs_sum)(const T* values, std::int64_t count);

  // Whether none of `count` values is NaN or infinite.
  bool (*all_finite)(const T* values, std::int64_t count);

  // out[i] = T(in[i]).
  void (*round)(const Acc<T>* in, std::int64_t count, T* out);
};

// The best table for T that `isa` offers (float32 and float64 have no tables of their own beyond
// AVX-512, so the AMX table is the AVX-512 one).
template <class T>
const Kernels<T>& kernels(CpuIsa isa);

}  // namespace twell::cpu
