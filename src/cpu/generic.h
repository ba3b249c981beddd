// The primitives of kernels.h for any element type, on GCC/Clang vectors of kVectorBytes. Each
// instruction set's source file defines TWELL_VECTOR_BYTES and includes this once: everything has
// internal linkage, so code compiled for AVX never leaks into the portable build.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace twell::cpu {
namespace {

constexpr int kVectorBytes = TWELL_VECTOR_BYTES;
constexpr int kVectorRegisters = kVectorBytes == 64 ? 32 : 16;

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

template <class A>
struct VecOf {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};

template <class V, class S>
inline V load(const S* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class S>
inline void store(S* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline FloatVec low_half(WordVec pairs) { return reinterpret_cast<FloatVec>(pairs << 16); }
inline FloatVec high_half(WordVec pairs) { return reinterpret_cast<FloatVec>(pairs & 0xffff0000u); }

inline float widen(bf16 v) { return to_float(v); }
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }

inline void narrow(float v, bf16* out) { *out = to_bf16(v); }
inline void narrow(float v, float* out) { *out = v; }
inline void narrow(double v, double* out) { *out = v; }

template <class A, class V>
inline A sum_lanes(V v) {
  A sum = 0;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(A)); ++i) sum += v[i];
  return sum;
}

// ---- panels --------------------------------------------------------------------------------

template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

// Where B[k][j] lies within its strip.
template <class T>
inline std::int64_t strip_offset(std::int64_t k, std::int64_t j) {
  constexpr int pair = kPair<T>;
  return (k / pair * kPanelColumns + j) * pair + k % pair;
}

template <class T>
void generic_pack_transposed(Rows<T> rows, std::int64_t columns, std::int64_t inner, T* panel) {
  const std::int64_t depth = padded(inner);
  for (std::int64_t first = 0; first < columns; first += kPanelColumns) {
    T* strip = panel + first * depth;
    for (std::int64_t j = 0; j < kPanelColumns; ++j) {
      const T* row = first + j < columns ? rows[first + j] : nullptr;
      for (std::int64_t k = 0; k < depth; ++k) {
        strip[strip_offset<T>(k, j)] = row && k < inner ? row[k] : T{};
      }
    }
  }
}

template <class T>
void generic_pack(Rows<T> rows, std::int64_t inner, std::int64_t columns, T* panel) {
  constexpr int pair = kPair<T>;
  const std::int64_t depth = padded(inner);
  for (std::int64_t first = 0; first < columns; first += kPanelColumns) {
    T* out = panel + first * depth;
    const std::int64_t width = columns - first < kPanelColumns ? columns - first : kPanelColumns;
    for (std::int64_t k = 0; k < depth; k += pair, out += pair * kPanelColumns) {
      T part[pair][kPanelColumns] = {};
      for (int i = 0; i < pair && k + i < inner; ++i) {
        std::memcpy(part[i], rows[k + i] + first, static_cast<std::size_t>(width) * sizeof(T));
      }
      if constexpr (pair == 1) {
        std::memcpy(out, part, sizeof part);
      } else {
        std::uint32_t words[kPanelColumns];
        for (std::int64_t j = 0; j < kPanelColumns; ++j) {
          words[j] = part[0][j].bits | static_cast<std::uint32_t>(part[1][j].bits) << 16;
        }
        std::memcpy(out, words, sizeof words);
      }
    }
  }
}

// ---- multiply ------------------------------------------------------------------------------

// One step along inner of a kRows × 32 block: one k, or for bf16 a pair of them.
template <int kRows, int kVectors, class T, class V>
inline void multiply_step(const T* const* a, std::int64_t k, const T* b, V (*acc)[kVectors]) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  for (int v = 0; v < kVectors; ++v) {
    const V right = load<V>(b + v * lanes);
    for (int r = 0; r < kRows; ++r) acc[r][v] += a[r][k] * right;
  }
}

template <int kRows, int kVectors>
inline void multiply_step(const bf16* const* a, std::int64_t k, const bf16* b,
                          FloatVec (*acc)[kVectors]) {
  constexpr int lanes = kVectorBytes / 4;
  float low[kRows], high[kRows];
  for (int r = 0; r < kRows; ++r) {
    low[r] = to_float(a[r][k]);
    high[r] = to_float(a[r][k + 1]);
  }
  for (int v = 0; v < kVectors; ++v) {
    const WordVec pairs = load<WordVec>(b + v * lanes * 2);
    const FloatVec right_low = low_half(pairs), right_high = high_half(pairs);
    for (int r = 0; r < kRows; ++r) {
      acc[r][v] += low[r] * right_low;
      acc[r][v] += high[r] * right_high;
    }
  }
}

// `inner` may be odd for bf16 only where the caller's rows are padded to even; K is a multiple
// of 8, and gathered operands are padded.
template <int kRows, class T>
inline void multiply_block(Rows<T> a, std::int64_t inner, const T* strip, Acc<T>* c,
                           std::int64_t ldc, bool accumulate) {
  using V = typename VecOf<Acc<T>>::type;
  constexpr int lanes = kVectorBytes / sizeof(Acc<T>);
  constexpr int vectors = kPanelColumns / lanes;
  constexpr int pair = kPair<T>;
  const T* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = a[r];
  V acc[kRows][vectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = accumulate ? load<V>(c + r * ldc + v * lanes) : V{};
    }
  }
  for (std::int64_t k = 0; k < inner; k += pair) {
    multiply_step<kRows, vectors>(rows, k, strip + k * kPanelColumns, acc);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < vectors; ++v) store(c + r * ldc + v * lanes, acc[r][v]);
  }
}

template <class T>
void generic_multiply(Rows<T> a, std::int64_t rows, std::int64_t inner, const T* panel,
                      std::int64_t columns, Acc<T>* c, std::int64_t ldc, bool accumulate,
                      const T* /*next*/) {
  constexpr int vectors = kPanelColumns * static_cast<int>(sizeof(Acc<T>)) / kVectorBytes;
  constexpr int block =
      kVectorRegisters * 3 / 4 / vectors > 1 ? kVectorRegisters * 3 / 4 / vectors : 1;
  for (std::int64_t first = 0; first < columns; first += kPanelColumns) {
    const T* strip = panel + first * padded(inner);
    std::int64_t r = 0;
    for (; r + block <= rows; r += block) {
      multiply_block<block>(a.from(r), inner, strip, c + r * ldc + first, ldc, accumulate);
    }
    for (; r < rows; ++r) {
      multiply_block<1>(a.from(r), inner, strip, c + r * ldc + first, ldc, accumulate);
    }
  }
}

// ---- dots ----------------------------------------------------------------------------------

template <class T, class V>
inline V dot_step(V acc, const T* a, const T* b) {
  return acc + load<V>(a) * load<V>(b);
}
template <>
inline FloatVec dot_step(FloatVec acc, const bf16* a, const bf16* b) {
  const WordVec x = load<WordVec>(a), y = load<WordVec>(b);
  acc += low_half(x) * low_half(y);
  return acc + high_half(x) * high_half(y);
}

template <class T>
inline Acc<T> dot(const T* a, const T* b, std::int64_t inner) {
  using V = typename VecOf<Acc<T>>::type;
  constexpr std::int64_t step = kVectorBytes / sizeof(T);
  V acc[4] = {};
  std::int64_t k = 0;
  for (; k + 4 * step <= inner; k += 4 * step) {
    for (int i = 0; i < 4; ++i) acc[i] = dot_step(acc[i], a + k + i * step, b + k + i * step);
  }
  for (; k + step <= inner; k += step) acc[0] = dot_step(acc[0], a + k, b + k);
  Acc<T> sum = sum_lanes<Acc<T>>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; k < inner; ++k) sum += widen(a[k]) * widen(b[k]);
  return sum;
}

template <class T>
void generic_dots(Rows<T> a, std::int64_t a_rows, Rows<T> b, std::int64_t b_rows,
                  std::int64_t inner, Acc<T>* out, std::int64_t ldo) {
  for (std::int64_t i = 0; i < a_rows; ++i) {
    for (std::int64_t j = 0; j < b_rows; ++j) out[i * ldo + j] = dot(a[i], b[j], inner);
  }
}

// ---- weighted_sum --------------------------------------------------------------------------

// Columns whose sums fit the registers.
constexpr std::int64_t kSumColumns = 8 * kVectorBytes / sizeof(float);

template <class T>
inline void sum_block(Rows<T> rows, const T* weights, std::int64_t count, std::int64_t first,
                      Acc<T>* out) {
  using V = typename VecOf<Acc<T>>::type;
  constexpr std::int64_t lanes = sizeof(V) / sizeof(T);
  constexpr std::int64_t vectors = kSumColumns / lanes;
  V acc[vectors];
  for (int v = 0; v < vectors; ++v) acc[v] = load<V>(out + first + v * lanes);
  for (std::int64_t i = 0; i < count; ++i) {
    const T* row = rows[i] + first;
    for (int v = 0; v < vectors; ++v) acc[v] += weights[i] * load<V>(row + v * lanes);
  }
  for (int v = 0; v < vectors; ++v) store(out + first + v * lanes, acc[v]);
}

inline void sum_block(Rows<bf16> rows, const bf16* weights, std::int64_t count, std::int64_t first,
                      float* out) {
  constexpr int lanes = kVectorBytes / 4;
  constexpr int vectors = kSumColumns / lanes / 2;
  FloatVec even[vectors] = {}, odd[vectors] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const bf16* row = rows[i] + first;
    const float weight = to_float(weights[i]);
    for (int v = 0; v < vectors; ++v) {
      const WordVec pairs = load<WordVec>(row + v * lanes * 2);
      even[v] += weight * low_half(pairs);
      odd[v] += weight * high_half(pairs);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    for (int lane = 0; lane < lanes; ++lane) {
      out[first + (v * lanes + lane) * 2] += even[v][lane];
      out[first + (v * lanes + lane) * 2 + 1] += odd[v][lane];
    }
  }
}

template <class T>
void generic_weighted_sum(Rows<T> rows, const T* weights, std::int64_t count, std::int64_t columns,
                          Acc<T>* out) {
  std::int64_t first = 0;
  for (; first + kSumColumns <= columns; first += kSumColumns) {
    sum_block(rows, weights, count, first, out);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const T* row = rows[i];
    const Acc<T> weight = widen(weights[i]);
    for (std::int64_t j = first; j < columns; ++j) out[j] += weight * widen(row[j]);
  }
}

// ---- element by element --------------------------------------------------------------------

template <class T>
struct BitsOf;
template <>
struct BitsOf<bf16> {
  using type = std::uint16_t;
  static constexpr type kExponent = 0x7f80;
};
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
  static constexpr type kExponent = 0x7f800000;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
  static constexpr type kExponent = 0x7ff0000000000000;
};

// By the exponent's bits: the compiler vectorises this, and no float sum has to be reordered.
template <class T>
bool generic_all_finite(const T* values, std::int64_t count) {
  using Bits = typename BitsOf<T>::type;
  constexpr Bits exponent = BitsOf<T>::kExponent;
  Bits bad = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    Bits bits;
    std::memcpy(&bits, values + k, sizeof bits);
    bad |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return bad == 0;
}

template <class T>
int generic_relu_pack(const Acc<T>* c, int tokens, TokenMask forced, TokenMask* mask, T* values) {
  int count = 0;
  for (int w = 0; w < kMaxTileTokens / 64; ++w) {
    std::uint64_t active = forced.word[w];
    const int width = tokens - w * 64 < 64 ? tokens - w * 64 : 64;
    for (int t = 0; t < width; ++t) {
      T g;
      narrow(c[w * 64 + t], &g);
      active |= static_cast<std::uint64_t>(!(widen(g) <= 0)) << t;
    }
    for (std::uint64_t left = active; left != 0; left &= left - 1) {
      const Acc<T> value = c[w * 64 + __builtin_ctzll(left)];
      narrow(value < 0 ? Acc<T>(0) : value, values + count++);
    }
    mask->word[w] = active;
  }
  return count;
}

template <class T>
void generic_expand(const T* values, TokenMask mask, int tokens, T* out) {
  for (int t = 0; t < padded(tokens); ++t) out[t] = T{};
  for (int w = 0; w < kMaxTileTokens / 64; ++w) {
    for (std::uint64_t left = mask.word[w]; left != 0; left &= left - 1) {
      out[w * 64 + __builtin_ctzll(left)] = *values++;
    }
  }
}

template <class T>
void generic_scale(const T* g, const Acc<T>* u, std::int64_t count, T* h) {
  for (std::int64_t i = 0; i < count; ++i) narrow(widen(g[i]) * u[i], h + i);
}

template <class T>
double generic_abs_sum(const T* values, std::int64_t count) {
  constexpr int kLanes = 16;
  Acc<T> lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const Acc<T> value = widen(values[i + lane]);
      lanes[lane] += value < 0 ? -value : value;
    }
  }
  double sum = 0;
  for (const Acc<T> lane : lanes) sum += lane;
  for (; i < count; ++i) {
    const Acc<T> value = widen(values[i]);
    sum += value < 0 ? -value : value;
  }
  return sum;
}

template <class T>
void generic_round(const Acc<T>* in, std::int64_t count, T* out) {
  for (std::int64_t i = 0; i < count; ++i) narrow(in[i], out + i);
}

template <class T>
constexpr Kernels<T> generic_kernels() {
  return {generic_pack_transposed<T>, generic_pack<T>,       generic_multiply<T>, generic_dots<T>,
          generic_weighted_sum<T>,    generic_relu_pack<T>,  generic_expand<T>,   generic_scale<T>,
          generic_abs_sum<T>,         generic_all_finite<T>, generic_round<T>};
}

}  // namespace
}  // namespace twell::cpu
