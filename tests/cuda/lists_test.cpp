// The kernels between the products, on random columns: unions and schedule, spread, counts, words.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
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

// Of a tile, and which of its steps of 64 each half uses.
struct Union {
  std::vector<int> neurons;
  int first[2] = {0, 0}, end[2] = {0, 0};

  int steps() const { return ceil_div(static_cast<int>(neurons.size()), kUnionStep); }
  int columns(int half) const { return (end[half] - first[half]) * kUnionStep; }
  int columns() const { return columns(0) + columns(1); }
};

// Which neurons each half tile uses: none.
struct Masks {
  int tokens, neurons;
  int tiles, blocks, capacity;
  std::vector<std::uint32_t> masks;

  Masks(int m, int n)
      : tokens(m),
        neurons(n),
        tiles(ceil_div(m, kTileTokens)),
        blocks(ceil_div(n, kBlockNeurons)),
        capacity(ceil_div(n, kUnionStep) * kUnionStep),
        masks(2 * tiles * blocks * kMaskWords) {}

  int words() const { return blocks * kMaskWords; }  // of a half tile
};

// What a gate projection leaves: g [tokens, neurons], positive at about `density` of the places of
// every third block of neurons and at half as many elsewhere.
struct Columns : Masks {
  std::vector<bf16> g;
  std::vector<bf16> columns;

  Columns(int m, int n, double density)
      : Masks(m, n),
        g(static_cast<std::size_t>(m) * n),
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
  // Of a tile, in ascending order or by half: of the first alone, of both, of the second alone.
  Union union_of(int tile, bool by_half) const {
    std::vector<int> classes[3];
    for (int n = 0; n < neurons; ++n) {
      const bool first = used(2 * tile, n), second = used(2 * tile + 1, n);
      if (first || second) classes[!by_half || (first && second) ? 1 : first ? 0 : 2].push_back(n);
    }
    Union out;
    for (const auto& some : classes)
      out.neurons.insert(out.neurons.end(), some.begin(), some.end());
    const int alone = static_cast<int>(classes[0].size());
    const int shared = static_cast<int>(classes[1].size());
    const int all = static_cast<int>(out.neurons.size());
    if (alone + shared > 0) out.end[0] = ceil_div(alone + shared, kUnionStep);
    if (all > alone) {
      out.first[1] = alone / kUnionStep;
      out.end[1] = ceil_div(all, kUnionStep);
    }
    return out;
  }
};

// What the kernel of the unions reads and writes, but for the schedules.
struct UnionBuffers {
  DeviceBuffer masks, unions, counts, halves, order;

  explicit UnionBuffers(const Masks& host)
      : masks(host.masks),
        unions(host.tiles * host.capacity * sizeof(UnionEntry)),
        counts(host.tiles * 4),
        halves(2 * host.tiles * sizeof(HalfColumns)),
        order(host.tiles * 4) {}

  // With room for the columns of all tiles at once.
  ForwardChunk chunk(const Masks& host, bool by_half) const {
    ForwardChunk chunk = {};
    chunk.tokens = host.tokens;
    chunk.tiles = host.tiles;
    chunk.neurons = host.neurons;
    chunk.blocks = host.blocks;
    chunk.capacity = host.capacity;
    chunk.masks = masks.as<std::uint32_t>();
    chunk.unions = unions.as<UnionEntry>();
    chunk.counts = counts.as<std::int32_t>();
    chunk.halves = halves.as<HalfColumns>();
    chunk.by_half = by_half;
    chunk.room = 2 * host.tiles * host.capacity;
    chunk.rounds = 1;
    chunk.order = order.as<std::int32_t>();
    return chunk;
  }

  void expect_guards_intact() const {
    for (const DeviceBuffer* buffer : {&unions, &counts, &halves, &order}) {
      EXPECT_TRUE(buffer->guard_intact());
    }
  }
};

// Of a schedule as words.
UnionItem item_at(const std::int32_t* schedule, int index) {
  return std::bit_cast<UnionItem>(schedule[kScheduleHeader / 4 + index]);
}

class CudaLists : public GpuTest,
                  public ::testing::WithParamInterface<std::tuple<int, double, bool>> {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    for (int tile = 0; tile < host.tiles; ++tile) {
      unions.push_back(host.union_of(tile, std::get<2>(GetParam())));
    }
  }
  ForwardChunk chunk_of(const UnionBuffers& buffers) const {
    return buffers.chunk(host, std::get<2>(GetParam()));
  }
  int items_of(int tile) const { return ceil_div(unions[tile].steps(), kUnionItem / kUnionStep); }

  std::size_t schedule_words() const {
    return kScheduleHeader / 4 + host.tiles * host.capacity / kUnionStep;
  }

  const Columns host{300, std::get<0>(GetParam()), std::get<1>(GetParam())};
  std::vector<Union> unions;
};

INSTANTIATE_TEST_SUITE_P(NeuronsDensityAndOrder, CudaLists,
                         // 20,000 neurons' words take the kernel of the unions three passes.
                         ::testing::Combine(::testing::Values(8, 264, 1000, 20000),
                                            ::testing::Values(0.0, 0.002, 0.01, 0.1, 1.0),
                                            ::testing::Bool()));

TEST_P(CudaLists, MatchTheColumns) {
  const std::size_t halves = 2 * host.tiles;
  const UnionBuffers buffers(host);
  const DeviceBuffer columns(host.columns);
  const DeviceBuffer schedule(std::vector<std::int32_t>(schedule_words(), 0));
  const DeviceBuffer h(halves * host.capacity * kHalfTokens * sizeof(bf16));
  const DeviceBuffer activity(std::vector<std::int32_t>(host.neurons, 0));
  const DeviceBuffer partial_l1(host.tiles * kStatsParts * 4), l0(8), l1(4);
  ForwardChunk chunk = chunk_of(buffers);
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
  const auto got_halves = buffers.halves.download<HalfColumns>();
  const auto got_h = h.download<bf16>();
  using Item = std::tuple<int, int, int>;  // tile, first, steps
  std::vector<Item> want_items;
  int next = 0;  // column of h
  for (int tile = 0; tile < host.tiles; ++tile) {
    const Union& want = unions[tile];
    const int count = static_cast<int>(want.neurons.size());
    ASSERT_EQ(got_counts[tile], count);
    for (int step = 0; step < want.steps(); step += 4) {
      want_items.emplace_back(tile, step, std::min(want.steps() - step, 4));
    }
    for (int i = 0; i < want.steps() * kUnionStep; ++i) {
      const UnionEntry entry = got_unions[tile * host.capacity + i];
      EXPECT_EQ(entry.in_use(), i < count);
      if (i < count) {
        EXPECT_EQ(entry.row(), static_cast<std::uint32_t>(want.neurons[i]));
      }
    }
    for (int half = 0; half < 2; next += want.columns(half++)) {
      const HalfColumns got = got_halves[2 * tile + half];
      ASSERT_EQ(got.first, want.first[half]);
      ASSERT_EQ(got.end, want.end[half]);
      if (want.columns(half) > 0) {
        ASSERT_EQ(got.base + want.first[half] * kUnionStep, next);
      }
      for (int i = 0; i < want.steps() * kUnionStep; ++i) {
        const bool used = i < count && host.used(2 * tile + half, want.neurons[i]);
        EXPECT_EQ(got_unions[tile * host.capacity + i].in_half(half), used);
        if (!got.has(i)) {
          EXPECT_FALSE(used);
          continue;
        }
        for (int t = 0; t < kHalfTokens; ++t) {
          const int token = tile * kTileTokens + half * kHalfTokens + t;
          const std::size_t column = got.base + i;
          ASSERT_EQ(got_h[column * kHalfTokens + Columns::element_of(t)].bits,
                    used ? host.at(token, want.neurons[i]).bits : 0)
              << "tile " << tile << " position " << i << " token " << t;
        }
      }
    }
  }

  // The work: every piece of every union once, longest first.
  const auto words = schedule.download<std::int32_t>();
  ASSERT_EQ(words[0], static_cast<int>(want_items.size()));
  std::vector<Item> items;
  for (int i = 0; i < words[0]; ++i) {
    const UnionItem item = item_at(words.data(), i);
    items.emplace_back(item.tile(), item.first(), item.steps());
    for (int half = 0; half < 2; ++half) {
      const UnionItem::Part part = item.part(half);
      const Union& want = unions[item.tile()];
      for (int step = 0; step < item.steps(); ++step) {
        const int of_union = item.first() + step;
        EXPECT_EQ(part.has(step), of_union >= want.first[half] && of_union < want.end[half]);
      }
    }
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
  int all = 0;
  for (const Union& tile : unions) all += tile.columns();
  for (const int room : {2 * all, all + unions[0].columns(), all / 2, 0}) {
    SCOPED_TRACE(std::to_string(room) + " columns");
    const UnionBuffers buffers(host);
    const DeviceBuffer columns(host.columns);
    const DeviceBuffer h(2 * host.tiles * host.capacity * kHalfTokens * sizeof(bf16));
    const DeviceBuffer kept(room * kHalfTokens * sizeof(bf16));
    const DeviceBuffer places(2 * host.tiles * 4), taken(4), active(8);
    ForwardChunk chunk = chunk_of(buffers);
    chunk.columns = columns.as<std::uint32_t>();
    chunk.h = h.as<std::uint32_t>();
    chunk.saved.g = kept.as<std::uint32_t>();
    chunk.saved.taken = taken.as<std::int32_t>();
    chunk.saved.active = active.as<unsigned long long>();
    chunk.saved.room = room;
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
    const auto halves = buffers.halves.download<HalfColumns>();
    int next = 0;
    for (int i = 0; i < 2 * host.tiles; ++i) {
      const int tile = i % host.tiles;
      const int count = unions[tile].columns();
      ASSERT_EQ(got_places[i], next + count <= room ? next : -1) << i;
      const std::size_t source = halves[2 * tile].base;
      for (int e = 0; got_places[i] >= 0 && e < count * kHalfTokens; ++e) {
        ASSERT_EQ(got_kept[next * kHalfTokens + e].bits, got_h[source * kHalfTokens + e].bits)
            << "tile " << i << " element " << e;
      }
      next = std::min(next + count, room);
    }
  }
}

// Of a backward: tiles of which a half has no place come first.
TEST_P(CudaLists, ScheduleWhatIsMadeAnewFirst) {
  const UnionBuffers buffers(host);
  const DeviceBuffer schedule(std::vector<std::int32_t>(schedule_words(), 0));
  const DeviceBuffer half_places(std::vector<std::int32_t>{0, 0, 64, -1, -1, 64});
  ForwardChunk chunk = chunk_of(buffers);
  chunk.schedule = schedule.as<Schedule>();
  chunk.half_places = half_places.as<std::int32_t>();
  ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
  require_cuda(cudaDeviceSynchronize());
  EXPECT_TRUE(schedule.guard_intact());

  ASSERT_EQ(host.tiles, 3);
  const int anew = items_of(1) + items_of(2);
  const auto words = schedule.download<std::int32_t>();
  ASSERT_EQ(words[0], anew + items_of(0));
  EXPECT_EQ(words[2], anew);
  for (int i = 0; i < words[0]; ++i) {
    EXPECT_EQ(item_at(words.data(), i).tile() != 0, i < anew) << i;
  }
}

// Whatever the number of multiprocessors, every piece once; and smaller ones than need be only if
// there are too few for all.
TEST_P(CudaLists, CutTheWorkForAllMultiprocessors) {
  const UnionBuffers buffers(host);
  ForwardChunk chunk = chunk_of(buffers);
  int all_steps = 0, fewest = 0;
  for (int tile = 0; tile < host.tiles; ++tile) {
    all_steps += unions[tile].steps();
    fewest += items_of(tile);
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
    int steps = kUnionItem / kUnionStep;
    for (int i = 0; i < words[0]; ++i) {
      const UnionItem item = item_at(words.data(), i);
      EXPECT_LE(item.steps(), steps);
      steps = item.steps();
      ASSERT_LT(item.tile(), host.tiles);
      for (int step = item.first(); step < item.first() + steps; ++step) {
        EXPECT_LT(step, unions[item.tile()].steps());
        EXPECT_TRUE(pieces.emplace(item.tile(), step).second);
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
// rounds left over take none. A schedule has room for as many items as its round has room for steps
// of one half, and with so many multiprocessors each step is an item.
TEST_P(CudaLists, CutTheTilesIntoRounds) {
  const UnionBuffers buffers(host);
  int most = kUnionStep, all = 0;
  for (const Union& tile : unions) {
    most = std::max(most, tile.columns());
    all += tile.columns();
  }
  for (const int room : {most, most + unions[0].columns(), 2 * host.tiles * host.capacity}) {
    SCOPED_TRACE(std::to_string(room) + " columns");
    const int rounds = host.tiles + 1;
    const int share = all > 0 ? ceil_div(all, ceil_div(all, room)) : 0;
    const std::size_t words = kScheduleHeader / 4 + room / kUnionStep;
    const DeviceBuffer schedules(std::vector<std::int32_t>(rounds * words, 0));
    ForwardChunk chunk = chunk_of(buffers);
    chunk.multiprocessors = 2 * host.tiles * host.capacity / kUnionStep;
    chunk.room = room;
    chunk.rounds = rounds;
    chunk.schedule = schedules.as<Schedule>();
    chunk.schedule_bytes = static_cast<int>(words * 4);
    ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
    require_cuda(cudaDeviceSynchronize());
    buffers.expect_guards_intact();
    EXPECT_TRUE(schedules.guard_intact());

    const auto got = schedules.download<std::int32_t>();
    const auto halves = buffers.halves.download<HalfColumns>();
    const auto order = buffers.order.download<std::int32_t>();
    int tile = 0;
    for (int round = 0; round < rounds; ++round) {
      const std::int32_t* schedule = got.data() + round * words;
      EXPECT_EQ(schedule[3], tile);
      int items = 0, taken = 0;
      std::set<int> tiles;
      while (tile < host.tiles && taken <= share && taken + unions[tile].columns() <= room) {
        EXPECT_EQ(halves[2 * tile].base, taken);
        tiles.insert(tile);
        taken += unions[tile].columns();
        items += unions[tile].steps();
        ++tile;
      }
      ASSERT_EQ(schedule[4], static_cast<int>(tiles.size()));
      ASSERT_EQ(schedule[0], items);
      EXPECT_EQ(schedule[2], 0);
      for (int i = 0; i < items; ++i) {
        EXPECT_TRUE(tiles.contains(item_at(schedule, i).tile()));
      }
      EXPECT_EQ(std::set<int>(&order[schedule[3]], &order[schedule[3]] + tiles.size()), tiles);
    }
    EXPECT_EQ(tile, host.tiles);
  }
}

// Unions of given numbers of neurons of the first half alone, of both and of the second alone, with
// empty halves, steps that several of these share, and all neurons that there can be.
using CudaUnions = GpuTest;

TEST_F(CudaUnions, PlaceUnevenHalves) {
  using Sizes = std::array<int, UsedNeurons::kClasses>;
  const std::vector<Sizes> few = {{0, 0, 0},    {1, 0, 0},  {0, 1, 0},    {0, 0, 1},   {1, 0, 1},
                                  {64, 0, 0},   {0, 64, 0}, {0, 0, 64},   {64, 0, 64}, {63, 1, 64},
                                  {64, 64, 64}, {1, 62, 1}, {65, 1, 127}, {5, 0, 300}, {300, 0, 5},
                                  {2, 998, 0},  {0, 998, 2}};
  const std::vector<Sizes> all = {
      {0, 65536, 0}, {65536, 0, 0}, {0, 0, 65536}, {30000, 5536, 30000}, {1, 65534, 1}};
  for (const auto& [neurons, tiles] : {std::pair(1000, few), std::pair(65536, all)}) {
    Masks host(static_cast<int>(tiles.size()) * kTileTokens, neurons);
    std::mt19937 random(neurons);
    std::vector<int> shuffled(neurons);
    for (int n = 0; n < neurons; ++n) shuffled[n] = n;
    for (int tile = 0; tile < host.tiles; ++tile) {
      std::shuffle(shuffled.begin(), shuffled.end(), random);
      const auto [first, both, second] = tiles[tile];
      for (int i = 0; i < first + both + second; ++i) {
        const int word = shuffled[i] / 32;
        std::uint32_t* masks = &host.masks[2 * tile * host.words() + word];
        if (i < first + both) masks[0] |= 1u << (shuffled[i] % 32);
        if (i >= first) masks[host.words()] |= 1u << (shuffled[i] % 32);
      }
    }

    const UnionBuffers buffers(host);
    const DeviceBuffer words(host.tiles * host.words() * sizeof(WordPositions));
    const DeviceBuffer schedule(std::vector<std::int32_t>(
        kScheduleHeader / 4 + host.tiles * host.capacity / kUnionStep, 0));
    ForwardChunk chunk = buffers.chunk(host, true);
    chunk.words = words.as<WordPositions>();
    chunk.schedule = schedule.as<Schedule>();
    ASSERT_TRUE(launch_unions(chunk, nullptr).ok());
    require_cuda(cudaDeviceSynchronize());
    buffers.expect_guards_intact();
    EXPECT_TRUE(words.guard_intact());
    EXPECT_TRUE(schedule.guard_intact());

    const auto got_counts = buffers.counts.download<std::int32_t>();
    const auto got_halves = buffers.halves.download<HalfColumns>();
    const auto got_unions = buffers.unions.download<UnionEntry>();
    const auto got_words = words.download<WordPositions>();
    const auto got_schedule = schedule.download<std::int32_t>();
    int next = 0;  // column
    for (int tile = 0; tile < host.tiles; ++tile) {
      const auto [first, both, second] = tiles[tile];
      SCOPED_TRACE(std::to_string(first) + ", " + std::to_string(both) + ", " +
                   std::to_string(second) + " of " + std::to_string(neurons));
      const int total = first + both + second;
      ASSERT_EQ(got_counts[tile], total);
      const int begins[2] = {0, first}, ends[2] = {first + both, total};  // positions
      for (int half = 0; half < 2; ++half) {
        const HalfColumns got = got_halves[2 * tile + half];
        const bool empty = begins[half] == ends[half];
        ASSERT_EQ(got.first, empty ? 0 : begins[half] / kUnionStep);
        ASSERT_EQ(got.end, empty ? 0 : ceil_div(ends[half], kUnionStep));
        if (!empty) {
          ASSERT_EQ(got.base + got.first * kUnionStep, next);
        }
        next += got.steps() * kUnionStep;
      }
      const std::uint32_t* masks = &host.masks[2 * tile * host.words()];
      for (int i = 0; i < total; ++i) {
        const UnionEntry entry = got_unions[static_cast<std::size_t>(tile) * host.capacity + i];
        const int kind = i < first ? 0 : i < first + both ? 1 : 2;
        ASSERT_EQ(entry.in_half(0), kind != 2);
        ASSERT_EQ(entry.in_half(1), kind != 0);
        if (i > 0 && i != first && i != first + both) {
          const UnionEntry before =
              got_unions[static_cast<std::size_t>(tile) * host.capacity + i - 1];
          ASSERT_LT(before.row(), entry.row());
        }
        const auto word = static_cast<int>(entry.row() / 32);
        const std::uint32_t bit = 1u << (entry.row() % 32);
        const UsedNeurons used(masks[word], masks[host.words() + word]);
        ASSERT_NE(used.classes[kind] & bit, 0u);
        ASSERT_EQ(got_words[tile * host.words() + word].first[kind] +
                      std::popcount(used.classes[kind] & (bit - 1)),
                  i);
      }
    }
    for (int i = 0; i < got_schedule[0]; ++i) {
      const UnionItem item = item_at(got_schedule.data(), i);
      for (int step = 0; step < item.steps(); ++step) {
        for (int half = 0; half < 2; ++half) {
          EXPECT_EQ(item.part(half).has(step),
                    got_halves[2 * item.tile() + half].has((item.first() + step) * kUnionStep));
        }
      }
    }
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
    EXPECT_TRUE(overflow.guard_intact());
    EXPECT_EQ(overflow.download<std::int64_t>()[0], encoded->tile_rows);
  }
}

}  // namespace
}  // namespace twell::cuda
