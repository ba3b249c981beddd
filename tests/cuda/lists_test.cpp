// The kernels between the products, on random columns: unions and schedule, spread, counts, words.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/forward.h"
#include "support.h"
#include "twell/format.h"

namespace twell::cuda {
namespace {

constexpr bf16 kPoison = {0xFFFF};

// What a gate projection leaves: g [tokens, neurons], positive at about `density` of the places of
// every third block of neurons and at half as many elsewhere.
struct Columns {
  int tokens, neurons;
  int tiles, blocks, capacity;
  std::vector<bf16> g;
  std::vector<std::uint32_t> masks;
  std::vector<bf16> columns;

  Columns(int m, int n, double density)
      : tokens(m),
        neurons(n),
        tiles(ceil_div(m, kTileTokens)),
        blocks(ceil_div(n, kBlockNeurons)),
        capacity(ceil_div(n, kUnionStep) * kUnionStep),
        g(static_cast<std::size_t>(m) * n),
        masks(2 * tiles * blocks * kMaskWords),
        columns(2 * tiles * blocks * kBlockNeurons * kHalfTokens, kPoison) {
    std::mt19937 random(m + n);
    std::uniform_real_distribution<double> uniform;
    for (std::size_t i = 0; i < g.size(); ++i) {
      const double here = i % n / kBlockNeurons % 3 == 0 ? density : density / 2;
      if (uniform(random) < here) g[i] = to_bf16(static_cast<float>(uniform(random)) + 0.01f);
    }
    for (int half = 0; half < 2 * tiles; ++half) {
      for (int block = 0; block < blocks; ++block) {
        const std::size_t place = static_cast<std::size_t>(half) * blocks + block;
        int stored = 0;
        for (int i = 0; i < kBlockNeurons && block * kBlockNeurons + i < neurons; ++i) {
          std::array<bf16, kHalfTokens> column;
          bool used = false;
          for (int t = 0; t < kHalfTokens; ++t) {
            const bf16 value = at(half * kHalfTokens + t, block * kBlockNeurons + i);
            column[element_of(t)] = value;
            used |= value.bits != 0;
          }
          if (!used) continue;
          masks[place * kMaskWords + i / 32] |= 1u << (i % 32);
          std::copy(column.begin(), column.end(),
                    &columns[(place * kBlockNeurons + stored++) * kHalfTokens]);
        }
      }
    }
  }

  // Where a column holds token t of its half: in accumulator order (forward.h).
  static int element_of(int t) { return t / 16 * 16 + t % 8 * 2 + t % 16 / 8; }

  bf16 at(int token, int neuron) const {
    return token < tokens ? g[static_cast<std::size_t>(token) * neurons + neuron] : bf16{0};
  }
  bool used(int half, int neuron) const {
    for (int t = half * kHalfTokens; t < (half + 1) * kHalfTokens; ++t) {
      if (at(t, neuron).bits != 0) return true;
    }
    return false;
  }
  std::vector<int> union_of(int tile) const {
    std::vector<int> out;
    for (int n = 0; n < neurons; ++n) {
      if (used(2 * tile, n) || used(2 * tile + 1, n)) out.push_back(n);
    }
    return out;
  }
};

// What the kernel of the unions reads and writes, but for the schedules.
struct UnionBuffers {
  DeviceBuffer masks, unions, counts, order, first_positions;

  explicit UnionBuffers(const Columns& host)
      : masks(host.masks),
        unions(host.tiles * host.capacity * sizeof(UnionEntry)),
        counts(host.tiles * 4),
        order(host.tiles * 4),
        first_positions(host.tiles * 4) {}

  // With room for the columns of all tiles at once.
  ForwardChunk chunk(const Columns& host) const {
    ForwardChunk chunk = {};
    chunk.tokens = host.tokens;
    chunk.tiles = host.tiles;
    chunk.neurons = host.neurons;
    chunk.blocks = host.blocks;
    chunk.capacity = host.capacity;
    chunk.masks = masks.as<std::uint32_t>();
    chunk.unions = unions.as<UnionEntry>();
    chunk.counts = counts.as<std::int32_t>();
    chunk.first_positions = first_positions.as<std::int32_t>();
    chunk.positions = host.tiles * host.capacity;
    chunk.rounds = 1;
    chunk.order = order.as<std::int32_t>();
    return chunk;
  }

  void expect_guards_intact() const {
    for (const DeviceBuffer* buffer : {&unions, &counts, &order, &first_positions}) {
      EXPECT_TRUE(buffer->guard_intact());
    }
  }
};

class CudaLists : public GpuTest, public ::testing::WithParamInterface<std::tuple<int, double>> {
 protected:
  int padded_count(int tile) const {
    return ceil_div(static_cast<int>(host.union_of(tile).size()), kUnionStep) * kUnionStep;
  }

  std::size_t schedule_words() const {
    return kScheduleHeader / 4 + host.tiles * host.capacity / kUnionStep;
  }

  const Columns host{300, std::get<0>(GetParam()), std::get<1>(GetParam())};
};

INSTANTIATE_TEST_SUITE_P(NeuronsAndDensity, CudaLists,
                         ::testing::Combine(::testing::Values(8, 264, 1000, 2504),
                                            ::testing::Values(0.0, 0.002, 0.1, 1.0)));

TEST_P(CudaLists, MatchTheColumns) {
  const std::size_t halves = 2 * host.tiles;
  const UnionBuffers buffers(host);
  const DeviceBuffer columns(host.columns);
  const DeviceBuffer schedule(std::vector<std::int32_t>(schedule_words(), 0));
  const DeviceBuffer h(halves * host.capacity * kHalfTokens * sizeof(bf16));
  const DeviceBuffer activity(std::vector<std::int32_t>(host.neurons, 0));
  const DeviceBuffer partial_l1(host.tiles * kStatsParts * 4), l0(8), l1(4);
  ForwardChunk chunk = buffers.chunk(host);
  chunk.columns = columns.as<std::uint32_t>();
  chunk.schedule = schedule.as<Schedule>();
  chunk.h = h.as<std::uint32_t>();
  for (const Status& status :
       {launch_unions(chunk, nullptr), launch_spread(chunk, nullptr),
        launch_stats(chunk, activity.as<std::int32_t>(), partial_l1.as<float>(), nullptr),
        launch_stats_total(activity.as<std::int32_t>(), host.neurons, partial_l1.as<float>(),
                           host.tiles * kStatsParts, l0.as<std::int64_t>(), l1.as<float>(),
                           nullptr)}) {
    ASSERT_TRUE(status.ok()) << status.message();
  }
  require_cuda(cudaDeviceSynchronize());
  buffers.expect_guards_intact();
  for (const DeviceBuffer* buffer : {&schedule, &h, &activity}) {
    EXPECT_TRUE(buffer->guard_intact());
  }

  const auto got_unions = buffers.unions.download<UnionEntry>();
  const auto got_counts = buffers.counts.download<std::int32_t>();
  const auto got_h = h.download<bf16>();
  using Item = std::tuple<int, int, int>;  // tile, first, steps
  std::vector<Item> want_items;
  int position = 0;  // the tile's first in h
  for (int tile = 0; tile < host.tiles; position += padded_count(tile++)) {
    const std::vector<int> want = host.union_of(tile);
    const int count = static_cast<int>(want.size());
    ASSERT_EQ(got_counts[tile], count);
    const int steps = ceil_div(count, kUnionStep);
    for (int step = 0; step < steps; step += 4) {
      want_items.emplace_back(tile, step, std::min(steps - step, 4) - 1);
    }
    for (int i = 0; i < steps * kUnionStep; ++i) {
      const UnionEntry entry = got_unions[tile * host.capacity + i];
      EXPECT_EQ(entry.in_use(), i < count);
      for (int half = 0; half < 2; ++half) {
        const bool used = i < count && host.used(2 * tile + half, want[i]);
        EXPECT_EQ(entry.in_half(half), used);
        for (int t = 0; t < kHalfTokens; ++t) {
          const int token = tile * kTileTokens + half * kHalfTokens + t;
          const std::size_t column = 2 * position + half * steps * kUnionStep + i;
          ASSERT_EQ(got_h[column * kHalfTokens + Columns::element_of(t)].bits,
                    used ? host.at(token, want[i]).bits : 0)
              << "tile " << tile << " position " << i << " token " << t;
        }
      }
      if (i < count) {
        EXPECT_EQ(entry.row(), static_cast<std::uint32_t>(want[i]));
      }
    }
  }

  // The work: every piece of every union once, longest first.
  const auto words = schedule.download<std::int32_t>();
  ASSERT_EQ(words[0], static_cast<int>(want_items.size()));
  std::vector<Item> items;
  for (int i = 0; i < words[0]; ++i) {
    const auto word = static_cast<std::uint32_t>(words[kScheduleHeader / 4 + i]);
    items.emplace_back(word & 0xffffu, word >> 16 & 0xfffu, word >> 28);
    if (i > 0) {
      EXPECT_LE(std::get<2>(items[i]), std::get<2>(items[i - 1]));
    }
  }
  std::sort(items.begin(), items.end());
  EXPECT_EQ(items, want_items);
  const auto got_order = buffers.order.download<std::int32_t>();
  std::vector<int> tiles(host.tiles);
  for (int i = 0; i < host.tiles; ++i) tiles[i] = i;
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](int a, int b) { return got_counts[a] > got_counts[b]; });
  EXPECT_EQ(got_order, tiles);

  std::vector<std::int32_t> want_activity(host.neurons, 0);
  std::int64_t pairs = 0;
  double sum = 0;
  for (std::size_t i = 0; i < host.g.size(); ++i) {
    want_activity[i % host.neurons] += host.g[i].bits != 0;
    pairs += host.g[i].bits != 0;
    sum += to_float(host.g[i]);
  }
  EXPECT_EQ(activity.download<std::int32_t>(), want_activity);
  EXPECT_EQ(l0.download<std::int64_t>()[0], pairs);
  EXPECT_NEAR(l1.download<float>()[0], sum, 1e-5 * sum);
}

// Two chunks, the second of the same tiles as the first, with room for all or for some.
TEST_P(CudaLists, KeepColumnsWhereThereIsRoom) {
  int padded = 0;  // of all tiles
  for (int tile = 0; tile < host.tiles; ++tile) padded += padded_count(tile);
  for (const int positions : {2 * padded, padded + padded_count(0), padded / 2, 0}) {
    SCOPED_TRACE(std::to_string(positions) + " positions");
    const UnionBuffers buffers(host);
    const DeviceBuffer columns(host.columns);
    const DeviceBuffer h(2 * host.tiles * host.capacity * kHalfTokens * sizeof(bf16));
    const DeviceBuffer kept(2 * positions * kHalfTokens * sizeof(bf16));
    const DeviceBuffer places(2 * host.tiles * 4), taken(4), active(8);
    ForwardChunk chunk = buffers.chunk(host);
    chunk.columns = columns.as<std::uint32_t>();
    chunk.h = h.as<std::uint32_t>();
    chunk.saved.g = kept.as<std::uint32_t>();
    chunk.saved.taken = taken.as<std::int32_t>();
    chunk.saved.active = active.as<unsigned long long>();
    chunk.saved.positions = positions;
    for (const int pass : {0, 1}) {
      const DeviceBuffer schedule(std::vector<std::int32_t>(schedule_words(), 0));
      chunk.schedule = schedule.as<Schedule>();
      chunk.saved.places = places.as<std::int32_t>() + pass * host.tiles;
      chunk.saved.first = pass == 0;
      ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
      ASSERT_TRUE(launch_spread(chunk, nullptr).ok());
      require_cuda(cudaDeviceSynchronize());
    }
    for (const DeviceBuffer* buffer : {&places, &taken, &active, &kept}) {
      EXPECT_TRUE(buffer->guard_intact());
    }
    const auto got_places = places.download<std::int32_t>();
    const auto got_kept = kept.download<bf16>();
    const auto got_h = h.download<bf16>();
    const auto is_active = [](bf16 value) { return value.bits != 0; };
    EXPECT_EQ(active.download<std::int64_t>()[0],
              2 * std::count_if(host.g.begin(), host.g.end(), is_active));
    const auto first_positions = buffers.first_positions.download<std::int32_t>();
    int next = 0;
    for (int i = 0; i < 2 * host.tiles; ++i) {
      const int tile = i % host.tiles;
      const int count = padded_count(tile);
      ASSERT_EQ(got_places[i], next + count <= positions ? next : -1) << i;
      for (int half = 0; got_places[i] >= 0 && half < 2; ++half) {
        const std::size_t column = 2 * next + half * count;
        const std::size_t source = 2 * first_positions[tile] + half * count;
        for (int e = 0; e < count * kHalfTokens; ++e) {
          ASSERT_EQ(got_kept[column * kHalfTokens + e].bits, got_h[source * kHalfTokens + e].bits)
              << "tile " << i << " half " << half << " element " << e;
        }
      }
      next = std::min(next + count, positions);
    }
  }
}

// Of a backward: tiles of which a half has no place come first.
TEST_P(CudaLists, ScheduleWhatIsMadeAnewFirst) {
  const UnionBuffers buffers(host);
  const DeviceBuffer schedule(std::vector<std::int32_t>(schedule_words(), 0));
  const DeviceBuffer half_places(std::vector<std::int32_t>{0, 0, 64, -1, -1, 64});
  ForwardChunk chunk = buffers.chunk(host);
  chunk.schedule = schedule.as<Schedule>();
  chunk.half_places = half_places.as<std::int32_t>();
  ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
  require_cuda(cudaDeviceSynchronize());
  EXPECT_TRUE(schedule.guard_intact());

  ASSERT_EQ(host.tiles, 3);
  const auto items_of = [&](int tile) { return ceil_div(padded_count(tile), kUnionItem); };
  const int anew = items_of(1) + items_of(2);
  const auto words = schedule.download<std::int32_t>();
  ASSERT_EQ(words[0], anew + items_of(0));
  EXPECT_EQ(words[2], anew);
  for (int i = 0; i < words[0]; ++i) {
    EXPECT_EQ((words[kScheduleHeader / 4 + i] & 0xffff) != 0, i < anew) << i;
  }
}

// Whatever the number of multiprocessors, every piece once; and smaller ones than need be only if
// there are too few for all.
TEST_P(CudaLists, CutTheWorkForAllMultiprocessors) {
  const UnionBuffers buffers(host);
  ForwardChunk chunk = buffers.chunk(host);
  int all_steps = 0, fewest = 0;
  for (int tile = 0; tile < host.tiles; ++tile) {
    all_steps += padded_count(tile) / kUnionStep;
    fewest += ceil_div(padded_count(tile), kUnionItem);
  }
  for (const int multiprocessors : {1, 4, 16, 132}) {
    SCOPED_TRACE(multiprocessors);
    const DeviceBuffer schedule(std::vector<std::int32_t>(schedule_words(), 0));
    chunk.schedule = schedule.as<Schedule>();
    chunk.multiprocessors = multiprocessors;
    ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
    require_cuda(cudaDeviceSynchronize());
    EXPECT_TRUE(schedule.guard_intact());
    const auto words = schedule.download<std::int32_t>();
    std::set<std::pair<int, int>> pieces;  // tile, step
    std::uint32_t steps = 4;
    for (int i = 0; i < words[0]; ++i) {
      const auto word = static_cast<std::uint32_t>(words[kScheduleHeader / 4 + i]);
      EXPECT_LE((word >> 28) + 1, steps);
      steps = (word >> 28) + 1;
      for (std::uint32_t step = 0; step < steps; ++step) {
        const int tile = word & 0xffffu, first = word >> 16 & 0xfffu;
        ASSERT_LT(tile, host.tiles);
        EXPECT_LT(first + step, padded_count(tile) / kUnionStep);
        EXPECT_TRUE(pieces.emplace(tile, first + step).second);
      }
    }
    EXPECT_EQ(static_cast<int>(pieces.size()), all_steps);
    if (multiprocessors == 1) {
      EXPECT_EQ(words[0], fewest);
    }
    if (multiprocessors >= all_steps) {
      EXPECT_EQ(words[0], all_steps);
    }
  }
}

// Each round takes the tiles for which there is room, down to that for one, until it has its share;
// rounds left over take none.
TEST_P(CudaLists, CutTheTilesIntoRounds) {
  const UnionBuffers buffers(host);
  int most = kUnionStep, all = 0;
  for (int tile = 0; tile < host.tiles; ++tile) {
    most = std::max(most, padded_count(tile));
    all += padded_count(tile);
  }
  for (const int positions : {most, most + padded_count(0), host.tiles * host.capacity}) {
    SCOPED_TRACE(std::to_string(positions) + " positions");
    const int rounds = host.tiles + 1;
    const int share = all > 0 ? ceil_div(all, ceil_div(all, positions)) : 0;
    const std::size_t words = schedule_words() + 2;
    const DeviceBuffer schedules(std::vector<std::int32_t>(rounds * words, 0));
    ForwardChunk chunk = buffers.chunk(host);
    chunk.positions = positions;
    chunk.rounds = rounds;
    chunk.schedule = schedules.as<Schedule>();
    chunk.schedule_bytes = static_cast<int>(words * 4);
    ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
    require_cuda(cudaDeviceSynchronize());
    buffers.expect_guards_intact();
    EXPECT_TRUE(schedules.guard_intact());

    const auto got = schedules.download<std::int32_t>();
    const auto first_positions = buffers.first_positions.download<std::int32_t>();
    const auto order = buffers.order.download<std::int32_t>();
    int tile = 0;
    for (int round = 0; round < rounds; ++round) {
      const std::int32_t* schedule = got.data() + round * words;
      EXPECT_EQ(schedule[3], tile);
      int items = 0, taken = 0;
      std::set<int> tiles;
      while (tile < host.tiles && taken <= share && taken + padded_count(tile) <= positions) {
        EXPECT_EQ(first_positions[tile], taken);
        tiles.insert(tile);
        taken += padded_count(tile);
        items += ceil_div(padded_count(tile), kUnionItem);
        ++tile;
      }
      ASSERT_EQ(schedule[4], static_cast<int>(tiles.size()));
      ASSERT_EQ(schedule[0], items);
      EXPECT_EQ(schedule[2], 0);
      for (int i = 0; i < items; ++i) {
        EXPECT_TRUE(tiles.contains(schedule[kScheduleHeader / 4 + i] & 0xffff));
      }
      EXPECT_EQ(std::set<int>(&order[schedule[3]], &order[schedule[3]] + tiles.size()), tiles);
    }
    EXPECT_EQ(tile, host.tiles);
  }
}

TEST_P(CudaLists, WordsMatchTheEncoder) {
  for (const int slots : {8, 32, 128}) {
    SCOPED_TRACE(slots);
    const TwellShape shape{host.tokens, host.neurons, slots};
    const DeviceBuffer masks(host.masks), columns(host.columns);
    const DeviceBuffer words(shape.words() * 4), overflow(std::vector<std::int64_t>{0});
    ForwardChunk chunk = {};
    chunk.tokens = host.tokens;
    chunk.tiles = host.tiles;
    chunk.neurons = host.neurons;
    chunk.blocks = host.blocks;
    chunk.masks = masks.as<std::uint32_t>();
    chunk.columns = columns.as<std::uint32_t>();
    const Status status =
        launch_words(chunk, words.as<std::uint32_t>(), slots, overflow.as<std::int64_t>(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    std::vector<std::uint32_t> want(shape.words());
    const Result<TwellOverflow> encoded = twell_encode(shape, host.g, want);
    ASSERT_TRUE(encoded.ok());
    EXPECT_EQ(words.download<std::uint32_t>(), want);
    EXPECT_TRUE(words.guard_intact());
    EXPECT_EQ(overflow.download<std::int64_t>()[0], encoded->tile_rows);
  }
}

}  // namespace
}  // namespace twell::cuda
