// The dense product on AMX tiles: tdpbf16ps multiplies 16 × 32 by 32 × 16 bf16 in 16 cycles.
//
// In passes over a part of inner: the rows of A are copied into 16-row tiles (rows that are a power
// of two apart would evict each other from the caches), and these stream from the second-level
// cache past one strip of the panel after another, whose part stays in the first level. So the
// panel, the largest operand, is read once per group of rows. Each step multiplies 2 × 2 tiles.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/prefetcher.h"
#include "cpu/tables.h"

namespace twell::cpu {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileInner = 32;  // bf16 per tile row
constexpr std::int64_t kBlockRows = 2 * kTileRows;
constexpr std::int64_t kCopiedElements = 64 * 1024;  // of A, in the second-level cache
constexpr std::int64_t kDepth = 256;       // inner elements per pass: a strip's part is 16 KB
constexpr std::int64_t kLongDepth = 2048;  // for few columns, where reading A takes the time and
constexpr std::int64_t kFewColumns = 64;   // long pieces of rows stream best
constexpr std::int64_t kTileElements = kTileRows * kTileInner;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of this thread while in scope.
class TileRegisters {
 public:
  TileRegisters() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// a[r][first + k] → block[k / 32][r / 16][r % 16][k % 32]; rows and columns beyond are zero.
inline void copy_block(Rows<bf16> a, std::int64_t rows, std::int64_t first, std::int64_t depth,
                       bf16* block) {
  constexpr std::int64_t kAhead = 8;  // rows; for few tokens, copying is what takes the time
  const std::int64_t tiles = rows > kTileRows ? 2 : 1;
  for (std::int64_t r = 0; r < tiles * kTileRows; ++r) {
    const bf16* row = r < rows ? a[r] + first : nullptr;
    const bf16* ahead = a[a.index ? smaller(r + kAhead, rows - 1) : r + kAhead] + first;
    bf16* to = block + r * kTileInner;
    for (std::int64_t k = 0; k < depth; k += kTileInner, to += 2 * kTileElements) {
      __builtin_prefetch(ahead + k);
      const std::int64_t width = depth - k;
      const __m512i part = !row ? _mm512_setzero_si512()
                           : width < kTileInner
                               ? _mm512_maskz_loadu_epi16((1u << width) - 1, row + k)
                               : _mm512_loadu_si512(row + k);
      _mm512_store_si512(to, part);
    }
  }
}

// c (+)= block · strip for 16 or 32 rows × 32 columns.
template <bool kTwoTiles>
inline void multiply_tiles(const bf16* block, const bf16* strip, std::int64_t depth, float* c,
                           std::int64_t ldc, bool accumulate) {
  const std::int64_t c_bytes = ldc * static_cast<std::int64_t>(sizeof(float));
  constexpr std::int64_t kStripBytes = kPanelColumns * 2 * sizeof(bf16);
  float* lower = c + kTileRows * ldc;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kTwoTiles) {
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + 16, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwoTiles) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (std::int64_t k = 0; k < depth; k += kTileInner) {
    const bf16* left = block + k / kTileInner * 2 * kTileElements;
    const bf16* right = strip + k * kPanelColumns;
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, kStripBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileInner, kStripBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoTiles) {
      _tile_loadd(5, left + kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kTwoTiles) {
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + 16, c_bytes);
  }
}

// The same for any number of rows: where c lacks whole tiles of them, in a buffer.
inline void multiply_block(const bf16* block, std::int64_t rows, const bf16* strip,
                           std::int64_t depth, float* c, std::int64_t ldc, bool accumulate) {
  if (rows == kBlockRows) {
    multiply_tiles<true>(block, strip, depth, c, ldc, accumulate);
    return;
  }
  alignas(64) float edge[kBlockRows * kPanelColumns];
  constexpr std::size_t kRowBytes = kPanelColumns * sizeof(float);
  for (std::int64_t i = 0; accumulate && i < rows; ++i) {
    std::memcpy(edge + i * kPanelColumns, c + i * ldc, kRowBytes);
  }
  if (rows > kTileRows) {
    multiply_tiles<true>(block, strip, depth, edge, kPanelColumns, accumulate);
  } else {
    multiply_tiles<false>(block, strip, depth, edge, kPanelColumns, accumulate);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(c + i * ldc, edge + i * kPanelColumns, kRowBytes);
  }
}

}  // namespace

void amx_multiply(Rows<bf16> a, std::int64_t rows, std::int64_t inner, const bf16* panel,
                  std::int64_t columns, float* c, std::int64_t ldc, bool accumulate,
                  const bf16* next) {
  alignas(64) bf16 copy[kCopiedElements];
  const TileRegisters registers;
  const bool few = columns <= kFewColumns;
  const std::int64_t strips = (columns + kPanelColumns - 1) / kPanelColumns;
  const std::int64_t pass = few ? kLongDepth : kDepth;
  const std::int64_t group = kCopiedElements / pass;  // rows
  for (std::int64_t top = 0; top < rows; top += group) {
    const std::int64_t bottom = smaller(top + group, rows);
    for (std::int64_t k = 0; k < inner; k += pass) {
      const std::int64_t depth = smaller(pass, inner - k);
      for (std::int64_t r = top; r < bottom; r += kBlockRows) {
        copy_block(a.from(r), smaller(kBlockRows, rows - r), k, depth, copy + (r - top) * pass);
      }
      // Meanwhile, what the next pass copies: more of these rows, or the first of the next ones.
      const bool last = k + pass >= inner;
      Rows<bf16> later = last ? Rows<bf16>{next, a.stride} : a.from(top);
      if (!last) later.data += k + pass;
      if (few) later.data = nullptr;
      Prefetcher prefetcher(later, bottom - top, smaller(pass, last ? inner : inner - k - pass),
                            strips * ((bottom - top + kBlockRows - 1) / kBlockRows));
      for (std::int64_t j = 0; j < columns; j += kPanelColumns) {
        const bf16* strip = panel + j * padded(inner) + k * kPanelColumns;
        for (std::int64_t r = top; r < bottom; r += kBlockRows) {
          prefetcher.step();
          multiply_block(copy + (r - top) * pass, smaller(kBlockRows, rows - r), strip, depth,
                         c + r * ldc + j, ldc, accumulate || k > 0);
        }
      }
    }
  }
}

}  // namespace twell::cpu
