// bf16 on AVX-512: vdpbf16ps multiplies pairs of bf16 and adds them to float32 lanes. It has no
// exceptions and takes denormals for zero. The other types use the generic primitives.

#include <immintrin.h>

#define TWELL_VECTOR_BYTES 64
#include "cpu/generic.h"
#include "cpu/prefetcher.h"
#include "cpu/tables.h"

namespace twell::cpu {
namespace {

constexpr std::int64_t kVec = 32;       // bf16 per vector
constexpr std::int64_t kRowsAhead = 6;  // of scattered rows, to prefetch

inline __m512i load_words(const bf16* from) { return _mm512_loadu_si512(from); }
inline __m512i load_words(const bf16* from, std::int64_t count) {  // count < 32; the rest is 0
  return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
}
inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
inline std::int32_t pair_at(const bf16* from) {
  std::int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// ---- panels --------------------------------------------------------------------------------

// Transposes a 16 × 16 matrix of 32-bit words.
inline void transpose(__m512i (&m)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      m[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      m[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = m[i], b = m[4 + i], c = m[8 + i], d = m[12 + i];
    const __m512i ab_even = _mm512_shuffle_i32x4(a, b, 0x88);
    const __m512i ab_odd = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i cd_even = _mm512_shuffle_i32x4(c, d, 0x88);
    const __m512i cd_odd = _mm512_shuffle_i32x4(c, d, 0xdd);
    t[i] = _mm512_shuffle_i32x4(ab_even, cd_even, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(ab_even, cd_even, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd);
  }
  for (int i = 0; i < 16; ++i) m[i] = t[i];
}

void pack_transposed(Rows<bf16> rows, std::int64_t columns, std::int64_t inner, bf16* panel) {
  const std::int64_t depth = padded(inner);
  for (std::int64_t first = 0; first < padded(columns); first += 16) {
    bf16* strip = panel + first / kPanelColumns * kPanelColumns * depth + first % kPanelColumns * 2;
    const std::int64_t width = smaller(16, columns - first);
    for (std::int64_t k = 0; k < depth; k += kVec) {
      const std::int64_t left = inner - k;
      __m512i block[16];
      for (std::int64_t j = 0; j < 16; ++j) {
        block[j] = j >= width    ? _mm512_setzero_si512()
                   : left < kVec ? load_words(rows[first + j] + k, left)
                                 : load_words(rows[first + j] + k);
      }
      transpose(block);
      for (std::int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_si512(strip + (k + 2 * i) * kPanelColumns, block[i]);
      }
    }
  }
}

void pack(Rows<bf16> rows, std::int64_t inner, std::int64_t columns, bf16* panel) {
  alignas(64) std::int16_t order[64];
  for (std::int16_t i = 0; i < 64; ++i) {
    order[i] = static_cast<std::int16_t>(i / 32 * 16 + i % 32 / 2 + i % 2 * 32);
  }
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  const std::int64_t depth = padded(inner);
  for (std::int64_t k = 0; k < depth; k += 2) {
    const bf16* even = k < inner ? rows[k] : nullptr;
    const bf16* odd = k + 1 < inner ? rows[k + 1] : nullptr;
    const bf16* ahead = rows[smaller(k + kRowsAhead, inner - 1)];
    const bf16* ahead_odd = rows[smaller(k + kRowsAhead + 1, inner - 1)];
    for (std::int64_t j = 0; j < columns; j += kPanelColumns) {
      __builtin_prefetch(ahead + j);
      __builtin_prefetch(ahead_odd + j);
      const std::int64_t width = columns - j;
      const auto part = [&](const bf16* row) {
        return !row           ? _mm512_setzero_si512()
               : width < kVec ? load_words(row + j, width)
                              : load_words(row + j);
      };
      const __m512i a = part(even), b = part(odd);
      bf16* out = panel + j * depth + k * kPanelColumns;
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(out + kVec, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// ---- multiply ------------------------------------------------------------------------------

constexpr int kBlockRows = 8;

template <int kRows>
inline void multiply_rows(Rows<bf16> a, std::int64_t inner, const bf16* strip, float* c,
                          std::int64_t ldc, bool accumulate) {
  const bf16* row[kRows];
  __m512 acc[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    row[r] = a[r];
    for (int v = 0; v < 2; ++v) {
      acc[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + v * 16) : _mm512_setzero_ps();
    }
  }
  for (std::int64_t k = 0; k < inner; k += 2) {
    const __m512i b0 = load_words(strip + k * kPanelColumns);
    const __m512i b1 = load_words(strip + k * kPanelColumns + kVec);
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = _mm512_set1_epi32(pair_at(row[r] + k));
      acc[r][0] = dot_pairs(acc[r][0], pair, b0);
      acc[r][1] = dot_pairs(acc[r][1], pair, b1);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * ldc + v * 16, acc[r][v]);
  }
}

void multiply(Rows<bf16> a, std::int64_t rows, std::int64_t inner, const bf16* panel,
              std::int64_t columns, float* c, std::int64_t ldc, bool accumulate, const bf16* next) {
  Prefetcher prefetcher(
      {next, a.stride}, rows, inner,
      (columns + kPanelColumns - 1) / kPanelColumns * ((rows + kBlockRows - 1) / kBlockRows));
  for (std::int64_t j = 0; j < columns; j += kPanelColumns) {
    const bf16* strip = panel + j * padded(inner);
    std::int64_t r = 0;
    for (; r + kBlockRows <= rows; r += kBlockRows) {
      prefetcher.step();
      multiply_rows<kBlockRows>(a.from(r), inner, strip, c + r * ldc + j, ldc, accumulate);
    }
    for (; r < rows; ++r) {
      multiply_rows<1>(a.from(r), inner, strip, c + r * ldc + j, ldc, accumulate);
    }
  }
}

// ---- dots ----------------------------------------------------------------------------------

// out[i * step_a + j * step_b] for kA × kB rows, prefetching what lies `ahead` rows further in a.
template <int kA, int kB>
inline void dot_block(Rows<bf16> a, Rows<bf16> b, std::int64_t inner, const bf16* const* ahead,
                      float* out, std::int64_t step_a, std::int64_t step_b) {
  const bf16* left[kA];
  const bf16* right[kB];
  __m512 acc[kA][kB];
  for (int i = 0; i < kA; ++i) left[i] = a[i];
  for (int j = 0; j < kB; ++j) right[j] = b[j];
  for (int i = 0; i < kA; ++i) {
    for (int j = 0; j < kB; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  std::int64_t k = 0;
  for (; k + kVec <= inner; k += kVec) {
    __m512i x[kA];
    for (int i = 0; i < kA; ++i) {
      x[i] = load_words(left[i] + k);
      if (ahead) __builtin_prefetch(ahead[i] + k);
    }
    for (int j = 0; j < kB; ++j) {
      const __m512i y = load_words(right[j] + k);
      for (int i = 0; i < kA; ++i) acc[i][j] = dot_pairs(acc[i][j], x[i], y);
    }
  }
  if (k < inner) {
    for (int j = 0; j < kB; ++j) {
      const __m512i y = load_words(right[j] + k, inner - k);
      for (int i = 0; i < kA; ++i) {
        acc[i][j] = dot_pairs(acc[i][j], load_words(left[i] + k, inner - k), y);
      }
    }
  }
  for (int i = 0; i < kA; ++i) {
    for (int j = 0; j < kB; ++j) out[i * step_a + j * step_b] = _mm512_reduce_add_ps(acc[i][j]);
  }
}

// kA rows of a against all of b.
template <int kA>
inline void dot_rows(Rows<bf16> a, Rows<bf16> b, std::int64_t b_rows, std::int64_t inner,
                     const bf16* const* ahead, float* out, std::int64_t step_a,
                     std::int64_t step_b) {
  constexpr int kB = kA == 1 ? 8 : 4;
  std::int64_t j = 0;
  for (; j + kB <= b_rows; j += kB, ahead = nullptr) {
    dot_block<kA, kB>(a, b.from(j), inner, ahead, out + j * step_b, step_a, step_b);
  }
  for (; j + 2 <= b_rows; j += 2, ahead = nullptr) {
    dot_block<kA, 2>(a, b.from(j), inner, ahead, out + j * step_b, step_a, step_b);
  }
  if (j < b_rows) dot_block<kA, 1>(a, b.from(j), inner, ahead, out + j * step_b, step_a, step_b);
}

template <int kA>
inline void all_dots(Rows<bf16> a, std::int64_t a_rows, Rows<bf16> b, std::int64_t b_rows,
                     std::int64_t inner, float* out, std::int64_t ldo) {
  std::int64_t i = 0;
  for (; i + kA <= a_rows; i += kA) {
    const bf16* ahead[kA];
    for (int r = 0; r < kA; ++r) {
      // Consecutive rows go on in memory after the last; a prefetch past the end does no harm.
      ahead[r] = a[a.index ? smaller(i + kA + r, a_rows - 1) : i + kA + r];
    }
    dot_rows<kA>(a.from(i), b, b_rows, inner, ahead, out + i * ldo, ldo, 1);
  }
  for (; i < a_rows; ++i) dot_rows<1>(a.from(i), b, b_rows, inner, nullptr, out + i * ldo, ldo, 1);
}

void dots(Rows<bf16> a, std::int64_t a_rows, Rows<bf16> b, std::int64_t b_rows, std::int64_t inner,
          float* out, std::int64_t ldo) {
  if (b_rows == 1) {
    all_dots<8>(a, a_rows, b, b_rows, inner, out, ldo);
  } else {
    all_dots<4>(a, a_rows, b, b_rows, inner, out, ldo);
  }
}

// ---- weighted_sum --------------------------------------------------------------------------

// kVectors × 32 columns, the last vector of `width` ≤ 32. Two rows are interleaved by unpack,
// which works within 128-bit lanes; the sums are put in order once at the end.
template <int kVectors, bool kPartial>
inline void sum_columns(Rows<bf16> rows, const bf16* weights, std::int64_t count,
                        std::int64_t first, std::int64_t width, float* out) {
  const auto part = [&](const bf16* row, int v) {
    return kPartial ? load_words(row + first, width) : load_words(row + first + v * kVec);
  };
  __m512 low[kVectors], high[kVectors];
  for (int v = 0; v < kVectors; ++v) low[v] = high[v] = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < count; i += 2) {
    const bool both = i + 1 < count;
    const bf16* even = rows[i];
    const bf16* odd = both ? rows[i + 1] : nullptr;
    const __m512i pair = _mm512_set1_epi32(
        weights[i].bits | (both ? static_cast<int>(weights[i + 1].bits) << 16 : 0));
    if (!kPartial && i + kRowsAhead + 1 < count) {
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(rows[i + kRowsAhead] + first + v * kVec);
        __builtin_prefetch(rows[i + kRowsAhead + 1] + first + v * kVec);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const __m512i a = part(even, v);
      const __m512i b = both ? part(odd, v) : _mm512_setzero_si512();
      low[v] = dot_pairs(low[v], pair, _mm512_unpacklo_epi16(a, b));
      high[v] = dot_pairs(high[v], pair, _mm512_unpackhi_epi16(a, b));
    }
  }
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int v = 0; v < kVectors; ++v) {
    const __m512 sums[2] = {_mm512_permutex2var_ps(low[v], front, high[v]),
                            _mm512_permutex2var_ps(low[v], back, high[v])};
    for (int half = 0; half < 2; ++half) {
      float* to = out + first + v * kVec + half * 16;
      if constexpr (kPartial) {
        const std::int64_t columns = smaller(16, width - half * 16);
        if (columns <= 0) continue;
        const auto mask = static_cast<__mmask16>((1u << columns) - 1);
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[half]));
      } else {
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[half]));
      }
    }
  }
}

void weighted_sum(Rows<bf16> rows, const bf16* weights, std::int64_t count, std::int64_t columns,
                  float* out) {
  constexpr int kWide = 8;
  if (count == 0) return;
  std::int64_t j = 0;
  for (; j + kWide * kVec <= columns; j += kWide * kVec) {
    sum_columns<kWide, false>(rows, weights, count, j, kVec, out);
  }
  for (; j + kVec <= columns; j += kVec) {
    sum_columns<1, false>(rows, weights, count, j, kVec, out);
  }
  if (j < columns) sum_columns<1, true>(rows, weights, count, j, columns - j, out);
}

// ---- relu_pack, round ----------------------------------------------------------------------

inline __m512i to_words(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

int relu_pack(const float* c, int tokens, TokenMask forced, TokenMask* mask, bf16* values) {
  int count = 0;
  *mask = {};
  for (int t = 0; t < tokens; t += 32) {
    const int width = tokens - t < 32 ? tokens - t : 32;
    const auto valid = width == 32 ? ~0u : (1u << width) - 1;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), c + t);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), c + t + 16);
    // Not ≤ 0: positive or NaN.
    const __mmask16 low_mask = _mm512_cmp_ps_mask(low, _mm512_setzero_ps(), _CMP_NLE_UQ);
    const __mmask16 high_mask = _mm512_cmp_ps_mask(high, _mm512_setzero_ps(), _CMP_NLE_UQ);
    const auto forced_here = static_cast<std::uint32_t>(forced.word[t / 64] >> (t % 64));
    if ((low_mask | high_mask | forced_here) == 0) continue;
    const __m512i g =
        to_words(_mm512_maskz_mov_ps(low_mask, low), _mm512_maskz_mov_ps(high_mask, high));
    const __mmask32 active = _mm512_test_epi16_mask(g, g) | forced_here;
    _mm512_storeu_si512(values + count, _mm512_maskz_compress_epi16(active, g));
    mask->word[t / 64] |= static_cast<std::uint64_t>(active) << (t % 64);
    count += __builtin_popcount(active);
  }
  return count;
}

void expand(const bf16* values, TokenMask mask, int tokens, bf16* out) {
  for (int t = 0; t < tokens; t += 32) {
    const auto here = static_cast<__mmask32>(mask.word[t / 64] >> (t % 64));
    _mm512_storeu_si512(out + t, _mm512_maskz_expand_epi16(here, load_words(values)));
    values += __builtin_popcount(here);
  }
}

void scale(const bf16* g, const float* u, std::int64_t count, bf16* h) {
  for (std::int64_t i = 0; i < count; i += kVec) {
    const std::int64_t width = smaller(kVec, count - i);
    const auto mask = static_cast<__mmask32>(~0u >> (kVec - width));
    const auto low_mask = static_cast<__mmask16>(mask),
               high_mask = static_cast<__mmask16>(mask >> 16);
    const __m512i words = _mm512_maskz_loadu_epi16(mask, g + i);
    const auto half = [](__m256i part) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
    };
    const __m512 low =
        _mm512_mul_ps(half(_mm512_castsi512_si256(words)), _mm512_maskz_loadu_ps(low_mask, u + i));
    const __m512 high = _mm512_mul_ps(half(_mm512_extracti64x4_epi64(words, 1)),
                                      _mm512_maskz_loadu_ps(high_mask, u + i + 16));
    _mm512_mask_storeu_epi16(h + i, mask, to_words(low, high));
  }
}

void round(const float* in, std::int64_t count, bf16* out) {
  std::int64_t i = 0;
  for (; i + kVec <= count; i += kVec) {
    _mm512_storeu_si512(out + i, to_words(_mm512_loadu_ps(in + i), _mm512_loadu_ps(in + i + 16)));
  }
  for (; i < count; ++i) out[i] = to_bf16(in[i]);
}

constexpr Kernels<bf16> table(decltype(Kernels<bf16>::multiply) multiply) {
  return {pack_transposed,
          pack,
          multiply,
          dots,
          weighted_sum,
          relu_pack,
          expand,
          scale,
          generic_abs_sum<bf16>,
          generic_all_finite<bf16>,
          round};
}

}  // namespace

constinit const Kernels<bf16> avx512_bf16 = table(multiply);
constinit const Kernels<bf16> amx_bf16 = table(amx_multiply);
constinit const Kernels<float> avx512_float = generic_kernels<float>();
constinit const Kernels<double> avx512_double = generic_kernels<double>();

}  // namespace twell::cpu
