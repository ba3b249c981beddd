#include "twell/format.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace twell {
namespace {

using Words = std::vector<std::uint32_t>;
using Values = std::vector<bf16>;

constexpr std::uint32_t kPoison = 0xdeadbeef;

Words poisoned_words(const TwellShape& shape) {
  return Words(static_cast<std::size_t>(shape.words()), kPoison);
}

Values poisoned_values(const TwellShape& shape) {
  return Values(static_cast<std::size_t>(shape.rows * shape.columns), bf16{0x7fc1});
}

// The definition, read literally from the header: collect the entries of a tile row, then lay them
// out.
Words oracle_encode(const TwellShape& shape, const Values& values, std::int64_t* overflow) {
  Words words;
  *overflow = 0;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    for (std::int64_t first = 0; first < shape.columns; first += 256) {
      Words entries;
      for (std::int64_t c = first; c < first + 256 && c < shape.columns; ++c) {
        const bf16 value = values[row * shape.columns + c];
        if (to_float(value) > 0 || std::isnan(to_float(value))) {
          entries.push_back(value.bits * 65536u + static_cast<std::uint32_t>(c));
        }
      }
      words.push_back(static_cast<std::uint32_t>(entries.size()));
      *overflow += static_cast<int>(entries.size()) > shape.slots - 1;
      entries.resize(shape.slots - 1, 0);
      words.insert(words.end(), entries.begin(), entries.end());
    }
  }
  return words;
}

// relu of the values, as decode gives it back: negative values and -0 become +0.
Values relu(const Values& values) {
  Values result = values;
  for (bf16& value : result) {
    if (!(to_float(value) > 0 || std::isnan(to_float(value)))) value = {0};
  }
  return result;
}

Values random_values(const TwellShape& shape, double density, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform(0, 1);
  std::uniform_int_distribution<int> positive(1, 0x7f80), rest(0x8000, 0xff80);
  Values values(static_cast<std::size_t>(shape.rows * shape.columns));
  for (bf16& value : values) {
    if (uniform(random) < density) {
      value = {static_cast<std::uint16_t>(positive(random))};
    } else {
      value = {static_cast<std::uint16_t>(uniform(random) < 0.5 ? 0 : rest(random))};
    }
  }
  return values;
}

void expect_same_bits(const Values& a, const Values& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i].bits, b[i].bits) << "element " << i;
}

void expect_refused(const Status& status, StatusCode code, const std::string& text) {
  EXPECT_EQ(status.code(), code) << status.message();
  EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
}

void expect_round_trip(const TwellShape& shape, const Values& values) {
  SCOPED_TRACE("rows " + std::to_string(shape.rows) + ", columns " + std::to_string(shape.columns) +
               ", slots " + std::to_string(shape.slots));
  std::int64_t wanted_overflow;
  const Words wanted = oracle_encode(shape, values, &wanted_overflow);
  Words words = poisoned_words(shape);
  const auto overflow = twell_encode(shape, values, words);
  ASSERT_TRUE(overflow.ok()) << overflow.status().message();
  EXPECT_EQ(overflow->tile_rows, wanted_overflow);
  ASSERT_EQ(words, wanted);
  EXPECT_TRUE(twell_validate(shape, words).ok());

  Values decoded = poisoned_values(shape);
  Words mask((shape.columns + 31) / 32, kPoison);
  const Status decode = twell_decode(shape, words, decoded);
  const Status unite = twell_union(shape, words, 0, shape.rows, mask);
  if (wanted_overflow > 0) {
    expect_refused(decode, StatusCode::kUnsupported, "overflow");
    expect_refused(unite, StatusCode::kUnsupported, "overflow");
    return;
  }
  ASSERT_TRUE(decode.ok()) << decode.message();
  const Values wanted_values = relu(values);
  expect_same_bits(decoded, wanted_values);
  ASSERT_TRUE(unite.ok()) << unite.message();
  for (std::int64_t c = 0; c < static_cast<std::int64_t>(mask.size()) * 32; ++c) {
    bool active = false;
    for (std::int64_t row = 0; c < shape.columns && row < shape.rows; ++row) {
      active |= wanted_values[row * shape.columns + c].bits != 0;
    }
    ASSERT_EQ((mask[c / 32] >> (c % 32)) & 1, active) << "column " << c;
  }
}

TEST(Format, KnownWords) {
  const TwellShape shape{.rows = 1, .columns = 300, .slots = 8};
  Values values(300, bf16{0});
  values[0] = to_bf16(1.0f);    // 0x3f80
  values[2] = to_bf16(-1.0f);   // dropped
  values[3] = bf16{0x8000};     // -0: dropped
  values[255] = to_bf16(2.0f);  // 0x4000
  values[256] = to_bf16(0.5f);  // 0x3f00
  values[299] = bf16{0x0001};   // the smallest subnormal
  Words words(16, kPoison);
  const auto overflow = twell_encode(shape, values, words);
  ASSERT_TRUE(overflow.ok());
  EXPECT_EQ(overflow->tile_rows, 0);
  EXPECT_EQ(words, (Words{2, 0x3f800000, 0x400000ff, 0, 0, 0, 0, 0,  //
                          2, 0x3f000100, 0x0001012b, 0, 0, 0, 0, 0}));
}

TEST(Format, KeepsNanAndInfinity) {
  const TwellShape shape{.rows = 1, .columns = 5, .slots = 8};
  const Values values{{0x7fc0}, {0xffc1}, {0x7f80}, {0xff80}, {0x7f81}};
  Words words(8, kPoison);
  ASSERT_TRUE(twell_encode(shape, values, words).ok());
  EXPECT_EQ(words, (Words{4, 0x7fc00000, 0xffc10001, 0x7f800002, 0x7f810004, 0, 0, 0}));
  Values decoded = poisoned_values(shape);
  ASSERT_TRUE(twell_decode(shape, words, decoded).ok());
  expect_same_bits(decoded, {{0x7fc0}, {0xffc1}, {0x7f80}, {0}, {0x7f81}});
}

TEST(Format, OverflowKeepsTrueCountAndFirstEntries) {
  const TwellShape shape{.rows = 2, .columns = 512, .slots = 8};
  Values values(1024, bf16{0});
  for (int c = 256; c < 263; ++c) values[c] = to_bf16(1.0f);        // row 0, tile 1: 7 fit exactly
  for (int c = 0; c < 256; ++c) values[512 + c] = to_bf16(1.0f);    // row 1, tile 0: all 256
  for (int c = 300; c < 308; ++c) values[512 + c] = to_bf16(1.0f);  // row 1, tile 1: one too many
  Words words(32, kPoison);
  const auto overflow = twell_encode(shape, values, words);
  ASSERT_TRUE(overflow.ok());
  EXPECT_EQ(overflow->tile_rows, 2);
  EXPECT_EQ(words, (Words{0,          0,          0,          0,
                          0,          0,          0,          0,  //
                          7,          0x3f800100, 0x3f800101, 0x3f800102,
                          0x3f800103, 0x3f800104, 0x3f800105,
                          0x3f800106,  //
                          256,        0x3f800000, 0x3f800001, 0x3f800002,
                          0x3f800003, 0x3f800004, 0x3f800005, 0x3f800006,  //
                          8,          0x3f80012c, 0x3f80012d, 0x3f80012e,
                          0x3f80012f, 0x3f800130, 0x3f800131, 0x3f800132}));
  EXPECT_TRUE(twell_validate(shape, words).ok());
  Values decoded(1024, bf16{0x7fc1});
  expect_refused(twell_decode(shape, words, decoded), StatusCode::kUnsupported,
                 "row 1, tile 0, slot 0: count 256 overflows the 7 value slots");
  expect_same_bits(decoded, Values(1024, bf16{0x7fc1}));  // untouched
  Words mask(16);
  EXPECT_TRUE(twell_union(shape, words, 0, 1, mask).ok());
  expect_refused(twell_union(shape, words, 1, 1, mask), StatusCode::kUnsupported, "row 1, tile 0");
}

TEST(Format, RoundTripAtEverySizeAndDensity) {
  std::mt19937 random(1);
  for (const std::int64_t rows : {0, 1, 3}) {
    for (const std::int64_t columns : {1, 2, 31, 32, 33, 255, 256, 257, 600, 1000, 2048}) {
      for (const int slots : {8, 16, 32, 64, 128}) {
        for (const double density : {0.0, 0.01, 0.05, 0.5, 1.0}) {
          const TwellShape shape{rows, columns, slots};
          expect_round_trip(shape, random_values(shape, density, random));
        }
      }
    }
  }
}

TEST(Format, WidestMatrix) {
  std::mt19937 random(2);
  const TwellShape shape{.rows = 2, .columns = 65536, .slots = 64};
  Values values = random_values(shape, 0.01, random);
  values[65535] = values[2 * 65536 - 1] = to_bf16(3.0f);
  expect_round_trip(shape, values);
}

TEST(Format, RandomShapesAndValues) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> uniform(0, 1);
  for (int trial = 0; trial < 500; ++trial) {
    const TwellShape shape{static_cast<std::int64_t>(random() % 9),
                           static_cast<std::int64_t>(1 + random() % 1500), 8 << random() % 5};
    expect_round_trip(shape, random_values(shape, std::pow(uniform(random), 4), random));
  }
}

TEST(Format, EveryBitPattern) {
  const TwellShape shape{.rows = 1024, .columns = 64, .slots = 128};
  Values values(65536);
  for (int i = 0; i < 65536; ++i) values[i] = {static_cast<std::uint16_t>(i)};
  expect_round_trip(shape, values);
}

TEST(Format, UnionOfRowRanges) {
  const TwellShape shape{.rows = 4, .columns = 70, .slots = 8};
  Values values(280, bf16{0});
  for (const int i : {0 * 70 + 5, 1 * 70 + 69, 2 * 70 + 5, 2 * 70 + 32, 3 * 70 + 31}) {
    values[i] = to_bf16(1.0f);
  }
  Words words = poisoned_words(shape);
  ASSERT_TRUE(twell_encode(shape, values, words).ok());
  const auto united = [&](std::int64_t first, std::int64_t count) {
    Words mask(3, kPoison);
    const Status status = twell_union(shape, words, first, count, mask);
    EXPECT_TRUE(status.ok()) << status.message();
    return mask;
  };
  EXPECT_EQ(united(0, 1), (Words{1u << 5, 0, 0}));
  EXPECT_EQ(united(0, 2), (Words{1u << 5, 0, 1u << 5}));
  EXPECT_EQ(united(1, 2), (Words{1u << 5, 1, 1u << 5}));
  EXPECT_EQ(united(3, 1), (Words{1u << 31, 0, 0}));
  EXPECT_EQ(united(0, 4), (Words{1u << 5 | 1u << 31, 1, 1u << 5}));
  EXPECT_EQ(united(2, 0), (Words{0, 0, 0}));
  EXPECT_EQ(united(4, 0), (Words{0, 0, 0}));
  Words mask(3);
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  for (const auto& [first, count] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {-1, 1}, {0, -1}, {0, 5}, {4, 1}, {5, 0}, {1, huge}, {huge, 1}}) {
    expect_refused(twell_union(shape, words, first, count, mask), StatusCode::kInvalidArgument,
                   "first_row, row_count are " + std::to_string(first));
  }
}

TEST(Format, RefusesBadShapesByName) {
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  expect_refused(validate({-1, 8, 8}), StatusCode::kInvalidArgument, "rows is -1");
  expect_refused(validate({huge, 8, 8}), StatusCode::kInvalidArgument, "rows is");
  expect_refused(validate({1, 0, 8}), StatusCode::kInvalidArgument, "columns is 0");
  expect_refused(validate({1, -3, 8}), StatusCode::kInvalidArgument, "columns is -3");
  expect_refused(validate({1, 65537, 8}), StatusCode::kInvalidArgument, "columns is 65537");
  for (const int slots : {-8, 0, 1, 7, 9, 12, 24, 100, 256}) {
    expect_refused(validate({1, 8, slots}), StatusCode::kInvalidArgument,
                   "slots is " + std::to_string(slots) + "; permitted: 8, 16, 32, 64, 128");
  }
  // Every function checks the shape before anything else.
  const TwellShape bad{1, 8, 24};
  Values values(8);
  Words words(24), mask(1);
  EXPECT_FALSE(twell_encode(bad, values, words).ok());
  EXPECT_FALSE(twell_decode(bad, words, values).ok());
  EXPECT_FALSE(twell_validate(bad, words).ok());
  EXPECT_FALSE(twell_union(bad, words, 0, 1, mask).ok());
}

TEST(Format, RefusesBuffersOfTheWrongSize) {
  const TwellShape shape{2, 300, 8};
  Values values(600), short_values(599), long_values(601);
  Words words(32), short_words(31), long_words(33), mask(10), short_mask(9), long_mask(11);
  const auto invalid = StatusCode::kInvalidArgument;
  expect_refused(twell_encode(shape, short_values, words).status(), invalid, "values has 599");
  expect_refused(twell_encode(shape, long_values, words).status(), invalid, "values has 601");
  expect_refused(twell_encode(shape, values, short_words).status(), invalid, "words has 31");
  expect_refused(twell_encode(shape, values, long_words).status(), invalid, "= 32");
  expect_refused(twell_decode(shape, short_words, values), invalid, "words has 31");
  expect_refused(twell_decode(shape, words, short_values), invalid, "values has 599");
  expect_refused(twell_validate(shape, long_words), invalid, "words has 33");
  expect_refused(twell_union(shape, short_words, 0, 2, mask), invalid, "words has 31");
  expect_refused(twell_union(shape, words, 0, 2, short_mask), invalid, "mask has 9");
  expect_refused(twell_union(shape, words, 0, 2, long_mask), invalid, "mask has 11");
}

TEST(Format, RefusesCorruptBuffersWithTheirPlace) {
  const TwellShape shape{.rows = 2, .columns = 300, .slots = 8};
  Values values(600, bf16{0});
  for (const int c : {10, 20, 30, 256, 299}) values[300 + c] = to_bf16(1.0f);
  Words good = poisoned_words(shape);
  ASSERT_TRUE(twell_encode(shape, values, good).ok());
  const int tile0 = 16, tile1 = 24;  // of row 1
  const auto expect_corrupt = [&](int index, std::uint32_t word, const std::string& text) {
    SCOPED_TRACE(text);
    Words words = good;
    words[index] = word;
    expect_refused(twell_validate(shape, words), StatusCode::kCorrupt, text);
    Values decoded(600, bf16{0x7fc1});
    expect_refused(twell_decode(shape, words, decoded), StatusCode::kCorrupt, text);
    Words mask(10);
    expect_refused(twell_union(shape, words, 1, 1, mask), StatusCode::kCorrupt, text);
    EXPECT_TRUE(twell_union(shape, words, 0, 1, mask).ok());
  };
  expect_corrupt(tile0, 257, "row 1, tile 0, slot 0: count 257 exceeds the 256 columns");
  expect_corrupt(tile0, 0xffffffff, "row 1, tile 0, slot 0: count 4294967295");
  expect_corrupt(tile1, 45, "row 1, tile 1, slot 0: count 45 exceeds the 44 columns");
  expect_corrupt(tile0, 4, "row 1, tile 0, slot 4");  // an unused slot holds no entry
  expect_corrupt(tile0 + 1, 0x3f800100, "row 1, tile 0, slot 1: column 256 lies outside");
  expect_corrupt(tile1 + 1, 0x3f8000ff, "row 1, tile 1, slot 1: column 255 lies outside");
  expect_corrupt(tile1 + 2, 0x3f80012c, "row 1, tile 1, slot 2: column 300 lies outside");
  expect_corrupt(tile1 + 2, 0x3f80ffff, "row 1, tile 1, slot 2: column 65535 lies outside");
  expect_corrupt(tile0 + 2, 0x3f80000a, "row 1, tile 0, slot 2: column 10 does not ascend from 10");
  expect_corrupt(tile0 + 3, 0x3f800013, "row 1, tile 0, slot 3: column 19 does not ascend from 20");
  expect_corrupt(tile0 + 1, 0x0000000a, "row 1, tile 0, slot 1: value 0.0");
  expect_corrupt(tile0 + 1, 0x8000000a, "row 1, tile 0, slot 1: value -0.0");
  expect_corrupt(tile0 + 1, 0xbf80000a, "row 1, tile 0, slot 1: value -1.0");
  expect_corrupt(tile0 + 1, 0xff80000a, "row 1, tile 0, slot 1: value -inf");
  // Corruption is reported before an earlier overflow.
  Words words = good;
  for (int i = 0; i < 7; ++i) words[1 + i] = 0x3f800000 + i;
  words[0] = 8;
  EXPECT_TRUE(twell_validate(shape, words).ok());
  words[tile1] = 45;
  Values decoded(600);
  expect_refused(twell_decode(shape, words, decoded), StatusCode::kCorrupt, "row 1, tile 1");
}

// Random words, biased towards plausible ones: whatever validate accepts must survive
// decode → encode unchanged in its used slots, and nothing may touch memory outside the buffers
// (seen by the sanitizer build, whose heap buffers have exactly these sizes).
TEST(Format, RandomBuffersAreRefusedOrMeaningful) {
  std::mt19937 random(4);
  int accepted = 0, refused = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const TwellShape shape{static_cast<std::int64_t>(random() % 3),
                           static_cast<std::int64_t>(1 + random() % 600), 8 << random() % 5};
    Words words = poisoned_words(shape);
    const std::uint32_t wildness = random() % 32;  // of 1024 words, how many are arbitrary
    for (std::int64_t i = 0; i < shape.words(); ++i) {
      const std::int64_t slot = i % shape.slots, tile = i / shape.slots % shape.tiles();
      words[i] =
          slot == 0 ? random() % 6 : 0x3f800000 + static_cast<std::uint32_t>(tile * 256 + slot * 2);
      if (random() % 1024 < wildness) words[i] = random();
    }
    Values decoded = poisoned_values(shape);
    Words mask((shape.columns + 31) / 32);
    const Status status = twell_validate(shape, words);
    const Status decode = twell_decode(shape, words, decoded);
    const Status unite = twell_union(shape, words, 0, shape.rows, mask);
    EXPECT_EQ(decode.code(), unite.code());
    if (!status.ok()) {
      ++refused;
      EXPECT_EQ(status.code(), StatusCode::kCorrupt);
      EXPECT_EQ(decode.code(), StatusCode::kCorrupt);
      EXPECT_EQ(decode.message(), status.message());
      continue;
    }
    if (!decode.ok()) {
      EXPECT_EQ(decode.code(), StatusCode::kUnsupported);
      continue;
    }
    ++accepted;
    Words again = poisoned_words(shape);
    ASSERT_TRUE(twell_encode(shape, decoded, again).ok());
    for (std::int64_t i = 0; i < shape.words(); ++i) {
      const std::uint32_t slot = static_cast<std::uint32_t>(i % shape.slots);
      const std::uint32_t count = words[i - slot];
      ASSERT_EQ(again[i], slot <= count ? words[i] : 0);
    }
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace twell
