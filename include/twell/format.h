#pragma once
// TwELL, tile-wise ELLPACK (arXiv 2603.23198): a sparse row-major matrix [rows, columns] of
// non-negative bf16 values, cut into tiles of 256 columns. A tile of a row owns `slots` 32-bit
// words: word 0 is the count of non-zero values, word i ≥ 1 is `bf16(value) << 16 | column` with
// the global column index, columns ascending. Bit-compatible with the published layout for rows
// that fit; a tile row with more than slots - 1 non-zeros keeps its true count and its first
// slots - 1 entries, so that an overflow is always seen, never silent.
//
//   words [rows, ceil(columns / 256), slots] uint32

#include <cstdint>
#include <span>

#include "twell/status.h"
#include "twell/types.h"

namespace twell {

inline constexpr int kTwellTileColumns = 256;
inline constexpr std::int64_t kTwellMaxColumns = 65536;
inline constexpr int kTwellMaxSlots = 128;

struct TwellShape {
  std::int64_t rows = 0;     // ≥ 0
  std::int64_t columns = 0;  // 1 to 65,536
  int slots = 32;            // 8, 16, 32, 64 or kTwellMaxSlots

  std::int64_t tiles() const { return (columns + kTwellTileColumns - 1) / kTwellTileColumns; }
  std::int64_t words() const { return rows * tiles() * slots; }
};

Status validate(const TwellShape& shape);

// The number of tile rows whose count exceeds slots - 1.
struct TwellOverflow {
  std::int64_t tile_rows = 0;
};

// values [rows, columns] bf16 → words. Negative values and ±0 count as zero; NaN is kept.
// Unused slots are written as 0. Errors: sizes that do not match the shape.
Result<TwellOverflow> twell_encode(const TwellShape& shape, std::span<const bf16> values,
                                   std::span<std::uint32_t> words);

// words → values [rows, columns] bf16, zeros included. Errors: kCorrupt, naming row, tile and
// slot, for anything that twell_validate refuses; kUnsupported, naming the first place, if a tile
// row overflowed (its missing values are not in the buffer).
Status twell_decode(const TwellShape& shape, std::span<const std::uint32_t> words,
                    std::span<bf16> values);

// kCorrupt, with row, tile and slot, unless every count is at most its tile's width, every column
// lies in its tile and in the matrix, columns ascend strictly and no stored value is ±0 or
// negative. Never reads past `words`.
Status twell_validate(const TwellShape& shape, std::span<const std::uint32_t> words);

// The union of the active columns of rows [first_row, first_row + row_count): sets bit c % 32 of
// mask[c / 32] for each active column c and clears the others. An overflowed tile row is
// refused. mask: ceil(columns / 32) words.
Status twell_union(const TwellShape& shape, std::span<const std::uint32_t> words,
                   std::int64_t first_row, std::int64_t row_count, std::span<std::uint32_t> mask);

}  // namespace twell
