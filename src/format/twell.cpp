#include <algorithm>
#include <string>

#include "twell/format.h"

namespace twell {
namespace {

// Keeps rows * columns and rows * tiles * slots far from overflow.
constexpr std::int64_t kMaxRows = std::int64_t{1} << 40;

// A relu's output is stored if it is greater than zero or NaN (of either sign).
bool is_stored(std::uint32_t bits) {
  return (bits > 0 && bits < 0x8000) || (bits & 0x7fff) > 0x7f80;
}

std::uint32_t column_of(std::uint32_t word) { return word & 0xffff; }
std::uint32_t value_bits_of(std::uint32_t word) { return word >> 16; }

Status check_size(const char* name, std::size_t size, std::int64_t wanted, const char* formula) {
  if (size == static_cast<std::size_t>(wanted)) return {};
  return {StatusCode::kInvalidArgument, std::string(name) + " has " + std::to_string(size) +
                                            " elements; the shape needs " + formula + " = " +
                                            std::to_string(wanted)};
}

Status check_words(const TwellShape& shape, std::span<const std::uint32_t> words) {
  return check_size("words", words.size(), shape.words(), "rows * tiles * slots");
}

Status check_values(const TwellShape& shape, std::span<const bf16> values) {
  return check_size("values", values.size(), shape.rows * shape.columns, "rows * columns");
}

// One tile of one row, and where it stands in the matrix.
struct TileRow {
  std::int64_t row, tile;
  std::uint32_t first_column, end_column;
  const std::uint32_t* words;
  int slots;

  std::uint32_t count() const { return words[0]; }
  bool overflowed() const { return count() >= static_cast<std::uint32_t>(slots); }
  int stored() const { return overflowed() ? slots - 1 : static_cast<int>(count()); }

  std::string at(int slot) const {
    return "row " + std::to_string(row) + ", tile " + std::to_string(tile) + ", slot " +
           std::to_string(slot) + ": ";
  }
};

TileRow tile_row(const TwellShape& shape, const std::uint32_t* words, std::int64_t row,
                 std::int64_t tile) {
  const std::int64_t first = tile * kTwellTileColumns;
  const std::int64_t end = std::min(first + kTwellTileColumns, shape.columns);
  return {row,
          tile,
          static_cast<std::uint32_t>(first),
          static_cast<std::uint32_t>(end),
          words + (row * shape.tiles() + tile) * shape.slots,
          shape.slots};
}

Status corrupt(const TileRow& tile, int slot, const std::string& what) {
  return {StatusCode::kCorrupt, tile.at(slot) + what};
}

Status validate(const TileRow& tile) {
  const std::uint32_t width = tile.end_column - tile.first_column;
  if (tile.count() > width) {
    return corrupt(tile, 0,
                   "count " + std::to_string(tile.count()) + " exceeds the " +
                       std::to_string(width) + " columns of the tile");
  }
  std::uint32_t lowest = tile.first_column;
  for (int slot = 1; slot <= tile.stored(); ++slot) {
    const std::uint32_t column = column_of(tile.words[slot]);
    if (column < tile.first_column || column >= tile.end_column) {
      return corrupt(tile, slot,
                     "column " + std::to_string(column) + " lies outside the tile's [" +
                         std::to_string(tile.first_column) + ", " +
                         std::to_string(tile.end_column) + ")");
    }
    if (column < lowest) {
      return corrupt(tile, slot,
                     "column " + std::to_string(column) + " does not ascend from " +
                         std::to_string(lowest - 1));
    }
    if (!is_stored(value_bits_of(tile.words[slot]))) {
      return corrupt(tile, slot,
                     "value " +
                         std::to_string(to_float(
                             {static_cast<std::uint16_t>(value_bits_of(tile.words[slot]))})) +
                         " is not greater than 0");
    }
    lowest = column + 1;
  }
  return {};
}

// Refuses rows [first, end) if any tile row is corrupt or, failing that, if any has overflowed.
Status check_complete(const TwellShape& shape, std::span<const std::uint32_t> words,
                      std::int64_t first, std::int64_t end) {
  Status overflow;
  for (std::int64_t row = first; row < end; ++row) {
    for (std::int64_t t = 0; t < shape.tiles(); ++t) {
      const TileRow tile = tile_row(shape, words.data(), row, t);
      if (Status status = validate(tile); !status.ok()) return status;
      if (tile.overflowed() && overflow.ok()) {
        overflow = {StatusCode::kUnsupported,
                    tile.at(0) + "count " + std::to_string(tile.count()) + " overflows the " +
                        std::to_string(shape.slots - 1) +
                        " value slots, so values are missing; encode with more slots"};
      }
    }
  }
  return overflow;
}

// Calls visit(row, word) for every stored word of rows [first, end), which must be complete.
template <class Visit>
void for_each_word(const TwellShape& shape, std::span<const std::uint32_t> words,
                   std::int64_t first, std::int64_t end, Visit visit) {
  for (std::int64_t row = first; row < end; ++row) {
    for (std::int64_t t = 0; t < shape.tiles(); ++t) {
      const TileRow tile = tile_row(shape, words.data(), row, t);
      for (int slot = 1; slot <= tile.stored(); ++slot) visit(row, tile.words[slot]);
    }
  }
}

}  // namespace

Status validate(const TwellShape& shape) {
  const auto invalid = [](const char* name, std::int64_t value, const std::string& permitted) {
    return Status(StatusCode::kInvalidArgument,
                  std::string(name) + " is " + std::to_string(value) + "; permitted: " + permitted);
  };
  if (shape.rows < 0 || shape.rows > kMaxRows) {
    return invalid("rows", shape.rows, "0 to " + std::to_string(kMaxRows));
  }
  if (shape.columns < 1 || shape.columns > kTwellMaxColumns) {
    return invalid("columns", shape.columns, "1 to " + std::to_string(kTwellMaxColumns));
  }
  for (int slots = 8; slots <= kTwellMaxSlots; slots *= 2) {
    if (shape.slots == slots) return {};
  }
  return invalid("slots", shape.slots, "8, 16, 32, 64, 128");
}

Result<TwellOverflow> twell_encode(const TwellShape& shape, std::span<const bf16> values,
                                   std::span<std::uint32_t> words) {
  if (Status status = validate(shape); !status.ok()) return status;
  if (Status status = check_values(shape, values); !status.ok()) return status;
  if (Status status = check_words(shape, words); !status.ok()) return status;
  TwellOverflow overflow;
  std::uint32_t* out = words.data();
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    const bf16* row_values = values.data() + row * shape.columns;
    for (std::int64_t first = 0; first < shape.columns; first += kTwellTileColumns) {
      const std::int64_t end = std::min(first + kTwellTileColumns, shape.columns);
      int count = 0;
      for (std::int64_t column = first; column < end; ++column) {
        const std::uint32_t bits = row_values[column].bits;
        if (!is_stored(bits)) continue;
        if (++count < shape.slots) out[count] = bits << 16 | static_cast<std::uint32_t>(column);
      }
      out[0] = static_cast<std::uint32_t>(count);
      overflow.tile_rows += count >= shape.slots;
      std::fill(out + std::min(count + 1, shape.slots), out + shape.slots, 0u);
      out += shape.slots;
    }
  }
  return overflow;
}

Status twell_decode(const TwellShape& shape, std::span<const std::uint32_t> words,
                    std::span<bf16> values) {
  if (Status status = validate(shape); !status.ok()) return status;
  if (Status status = check_words(shape, words); !status.ok()) return status;
  if (Status status = check_values(shape, values); !status.ok()) return status;
  if (Status status = check_complete(shape, words, 0, shape.rows); !status.ok()) return status;
  std::fill(values.begin(), values.end(), bf16{0});
  for_each_word(shape, words, 0, shape.rows, [&](std::int64_t row, std::uint32_t word) {
    values[row * shape.columns + column_of(word)] = {
        static_cast<std::uint16_t>(value_bits_of(word))};
  });
  return {};
}

Status twell_validate(const TwellShape& shape, std::span<const std::uint32_t> words) {
  if (Status status = validate(shape); !status.ok()) return status;
  if (Status status = check_words(shape, words); !status.ok()) return status;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    for (std::int64_t t = 0; t < shape.tiles(); ++t) {
      if (Status status = validate(tile_row(shape, words.data(), row, t)); !status.ok()) {
        return status;
      }
    }
  }
  return {};
}

Status twell_union(const TwellShape& shape, std::span<const std::uint32_t> words,
                   std::int64_t first_row, std::int64_t row_count, std::span<std::uint32_t> mask) {
  if (Status status = validate(shape); !status.ok()) return status;
  if (Status status = check_words(shape, words); !status.ok()) return status;
  if (Status status =
          check_size("mask", mask.size(), (shape.columns + 31) / 32, "ceil(columns / 32)");
      !status.ok()) {
    return status;
  }
  if (first_row < 0 || row_count < 0 || first_row > shape.rows ||
      row_count > shape.rows - first_row) {
    return {StatusCode::kInvalidArgument, "first_row, row_count are " + std::to_string(first_row) +
                                              ", " + std::to_string(row_count) +
                                              "; permitted: a range of the " +
                                              std::to_string(shape.rows) + " rows"};
  }
  const std::int64_t end_row = first_row + row_count;
  if (Status status = check_complete(shape, words, first_row, end_row); !status.ok()) return status;
  std::fill(mask.begin(), mask.end(), 0u);
  for_each_word(shape, words, first_row, end_row, [&](std::int64_t, std::uint32_t word) {
    mask[column_of(word) / 32] |= 1u << column_of(word) % 32;
  });
  return {};
}

}  // namespace twell
