// The sparse FFN forward on the CPU, chunk by chunk of tokens; in each chunk four phases:
//
//   1. prepare  x as a panel; tokens with NaN or infinity marked
//   2. gate     per block of neurons, over all tokens of the chunk, so that G is read once; each
//               row of the product is packed while it is in cache. A (tile, block) is a segment of
//               the workspace with room for the worst case, so nothing can overflow and no thread
//               waits for another
//   3. up       tile after tile, so that a tile's x stays in cache: neurons with many active
//               tokens (heavy) by dense products, the others (light) one by one
//   4. down     per (tile, block of hidden columns): the heavy neurons by dense products, the light
//               ones token by token
//
// Every sum has a fixed order that does not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/ffn.h"
#include "cpu/kernels.h"
#include "cpu/saved.h"
#include "cpu/scalar.h"

namespace twell::cpu {
namespace {

constexpr std::int64_t kUpRows = 64;        // heavy neurons per dense up product
constexpr std::int64_t kDownColumns = 256;  // hidden columns per unit of down work
constexpr std::int64_t kHeavyGroup = 512;   // neurons per dense down product (a panel in L2)

// One (tile, block of neurons): what phase 2 found, and its place among the tile's segments.
struct Segment {
  std::int32_t entries;
  std::int32_t values;
  std::int32_t heavy;
  double l1;  // of the light entries
  std::int64_t first_entry;
  std::int64_t first_value;
  std::int64_t first_heavy;
};

// Where a heavy neuron of a tile was found.
struct HeavyEntry {
  std::int32_t block;
  std::int32_t entry;
};

// Of one tile.
struct Totals {
  std::int64_t heavy;
  std::int64_t light;
  double l1;
};

// Sizes that follow from the plan.
struct Sizes {
  explicit Sizes(const FfnPlan& plan)
      : hidden(plan.problem.hidden),
        neurons(plan.problem.neurons),
        tile_tokens(plan.tile_tokens),
        chunk_tokens(plan.chunk_tokens),
        tiles((chunk_tokens + tile_tokens - 1) / tile_tokens),
        block_neurons(plan.block_neurons),
        blocks((neurons + block_neurons - 1) / block_neurons),
        heavy_stride(padded(neurons)),
        heavy_groups((neurons + kUpRows - 1) / kUpRows),
        use_heavy(plan.heavy_tokens <= plan.tile_tokens),
        light_capacity(neurons * std::min<std::int64_t>(plan.heavy_tokens - 1, tile_tokens)) {}

  std::int64_t segment_values() const { return block_neurons * tile_tokens + kPackSlack; }

  std::int64_t hidden, neurons, tile_tokens, chunk_tokens, tiles, block_neurons, blocks;
  std::int64_t heavy_stride;
  std::int64_t heavy_groups;  // at most
  bool use_heavy;
  std::int64_t light_capacity;
};

// What one thread needs for itself.
template <class T>
struct Scratch {
  Acc<T>* product = nullptr;  // [max(block_neurons, kUpRows), padded(chunk_tokens)]
  T* panel = nullptr;         // [kHeavyGroup, kDownColumns]
  T* light_down = nullptr;    // [neurons, kDownColumns] rows of D
  Acc<T>* y = nullptr;        // [tile_tokens, kDownColumns]
};

template <class T>
struct Workspace {
  T* panel = nullptr;                     // xᵀ of the chunk
  TokenMask* forced = nullptr;            // [tiles] tokens with a NaN or an infinity
  Segment* segments = nullptr;            // [tiles, blocks]
  Entry* entries = nullptr;               // [tiles, blocks, block_neurons]
  T* values = nullptr;                    // [tiles, blocks, segment_values]: g, later light h
  Totals* totals = nullptr;               // [tiles]
  HeavyEntry* heavy_entries = nullptr;    // [tiles, heavy_stride]
  std::int32_t* heavy_neurons = nullptr;  // [tiles, heavy_stride]
  T* heavy_h = nullptr;                   // [tiles, tile_tokens, heavy_stride]
  double* heavy_l1 = nullptr;             // [tiles, heavy_groups]
  std::int32_t* light_neurons = nullptr;  // [tiles, neurons]
  std::int64_t* light_start = nullptr;    // [tiles, tile_tokens + 1] into the next two
  std::int32_t* light_index = nullptr;    // [tiles, light_capacity] into light_neurons, by token
  T* light_h = nullptr;                   // likewise
  Scratch<T>* scratch = nullptr;          // [threads]; its arrays follow

  static Workspace carve(const FfnPlan& plan, Carver& carver) {
    const Sizes size(plan);
    const std::int64_t segments = size.tiles * size.blocks;
    Workspace w;
    w.panel = carver.take<T>(panel_elements(size.hidden, size.chunk_tokens));
    w.forced = carver.take<TokenMask>(size.tiles);
    w.segments = carver.take<Segment>(segments);
    w.entries = carver.take<Entry>(segments * size.block_neurons);
    w.values = carver.take<T>(segments * size.segment_values());
    w.totals = carver.take<Totals>(size.tiles);
    if (size.use_heavy) {
      w.heavy_entries = carver.take<HeavyEntry>(size.tiles * size.heavy_stride);
      w.heavy_neurons = carver.take<std::int32_t>(size.tiles * size.heavy_stride);
      w.heavy_h = carver.take<T>(size.tiles * size.tile_tokens * size.heavy_stride);
      w.heavy_l1 = carver.take<double>(size.tiles * size.heavy_groups);
    }
    w.light_neurons = carver.take<std::int32_t>(size.tiles * size.neurons);
    w.light_start = carver.take<std::int64_t>(size.tiles * (size.tile_tokens + 1));
    w.light_index = carver.take<std::int32_t>(size.tiles * size.light_capacity);
    w.light_h = carver.take<T>(size.tiles * size.light_capacity);
    w.scratch = carver.take<Scratch<T>>(plan.device.threads);
    for (int thread = 0; thread < plan.device.threads; ++thread) {
      Scratch<T> s;
      s.product =
          carver.take<Acc<T>>(std::max(size.block_neurons, kUpRows) * padded(size.chunk_tokens));
      s.panel = carver.take<T>(panel_elements(kHeavyGroup, kDownColumns));
      s.light_down = carver.take<T>(size.light_capacity > 0 ? size.neurons * kDownColumns : 0);
      s.y = carver.take<Acc<T>>(size.tile_tokens * kDownColumns);
      if (w.scratch) w.scratch[thread] = s;
    }
    return w;
  }
};

template <class T>
class Forward {
 public:
  Forward(const FfnPlan& plan, const FfnForwardArgs& args)
      : plan_(plan),
        size_(plan),
        kernels_(kernels<T>(plan.device.isa)),
        x_(static_cast<const T*>(args.x)),
        gated_(plan.problem.kind == FfnKind::kGated),
        // The plain block's only input projection takes the gate's place.
        gate_(static_cast<const T*>(gated_ ? args.weights.gate : args.weights.up)),
        up_(static_cast<const T*>(args.weights.up)),
        down_(static_cast<const T*>(args.weights.down)),
        y_(static_cast<T*>(args.y)),
        stats_(args.stats) {
    Carver carver(args.workspace);
    work_ = Workspace<T>::carve(plan, carver);
    if (args.saved) {
      Carver saved_carver(args.saved);
      saved_ = Saved<T>::carve(plan, saved_carver);
    }
  }

  void run() {
    if (stats_.activity) std::fill_n(stats_.activity, size_.neurons, 0);
    for (first_ = 0; first_ < plan_.problem.tokens; first_ += size_.chunk_tokens) {
      tokens_ = std::min(size_.chunk_tokens, plan_.problem.tokens - first_);
      tiles_ = (tokens_ + size_.tile_tokens - 1) / size_.tile_tokens;
      run_chunk();
    }
    if (stats_.l0) *stats_.l0 = l0_;
    if (stats_.l1) *static_cast<Acc<T>*>(stats_.l1) = static_cast<Acc<T>>(l1_);
  }

 private:
  // Few tokens: the product is bound by reading the weights, and a panel is not worth packing.
  bool use_dots() const { return plan_.problem.tokens <= kMaxDotTokens; }

  std::int64_t tile_size(std::int64_t tile) const {
    return std::min(size_.tile_tokens, tokens_ - tile * size_.tile_tokens);
  }
  Segment& segment(std::int64_t tile, std::int64_t block) {
    return work_.segments[tile * size_.blocks + block];
  }
  Entry* entries(std::int64_t tile, std::int64_t block) {
    return work_.entries + (tile * size_.blocks + block) * size_.block_neurons;
  }
  T* values(std::int64_t tile, std::int64_t block) {
    return work_.values + (tile * size_.blocks + block) * size_.segment_values();
  }
  // The active tokens of entry e of a segment.
  std::int32_t count(std::int64_t tile, std::int64_t block, std::int32_t e) {
    const Segment& s = segment(tile, block);
    const Entry* list = entries(tile, block);
    const auto end =
        e + 1 < s.entries ? list[e + 1].first_value : static_cast<std::uint32_t>(s.values);
    return static_cast<std::int32_t>(end - list[e].first_value);
  }
  // Where the backward will look for u; null if it will not.
  T* saved_up(std::int64_t tile, std::int64_t block) {
    if (!saved_.up) return nullptr;
    return saved_.up + saved_tile(tile).first_value + segment(tile, block).first_value;
  }
  SavedTile& saved_tile(std::int64_t tile) {
    return saved_.tiles[first_ / size_.tile_tokens + tile];
  }
  Scratch<T>& scratch() { return work_.scratch[omp_get_thread_num()]; }
  Rows<T> chunk_x() const { return {x_ + first_ * size_.hidden, size_.hidden}; }

  void run_chunk() {
    const std::int64_t strips = padded(tokens_) / kPanelColumns;
#pragma omp parallel num_threads(plan_.device.threads)
    {
#pragma omp for schedule(static)
      for (std::int64_t strip = 0; strip < strips; ++strip) pack_strip(strip);
#pragma omp for schedule(static)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) mark_forced(tile);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t block = 0; block < size_.blocks; ++block) gate(block);
#pragma omp single
      place_segments();
      if (saved_.tiles || heavy_groups_ > 0) {
#pragma omp for schedule(static) collapse(2)
        for (std::int64_t tile = 0; tile < tiles_; ++tile) {
          for (std::int64_t block = 0; block < size_.blocks; ++block) {
            if (saved_.tiles) save_segment(tile, block);
            if (heavy_groups_ > 0) list_heavy(tile, block);
          }
        }
      }
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        for (std::int64_t unit = 0; unit < heavy_groups_ + size_.blocks; ++unit) {
          if (unit < heavy_groups_) {
            heavy_up(tile, unit);
          } else {
            light_up(tile, unit - heavy_groups_);
          }
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) list_light(tile);
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (std::int64_t column = 0; column < size_.hidden; column += kDownColumns) {
        for (std::int64_t tile = 0; tile < tiles_; ++tile) down(tile, column);
      }
    }
    for (std::int64_t tile = 0; tile < tiles_; ++tile) l1_ += work_.totals[tile].l1;
  }

  // ---- 1. prepare

  void pack_strip(std::int64_t strip) {
    if (use_dots()) return;
    const std::int64_t first = strip * kPanelColumns;
    kernels_.pack_transposed(chunk_x().from(first), std::min(kPanelColumns, tokens_ - first),
                             size_.hidden, work_.panel + first * padded(size_.hidden));
  }

  void mark_forced(std::int64_t tile) {
    TokenMask forced = {};
    for (std::int64_t t = 0; t < tile_size(tile); ++t) {
      if (!kernels_.all_finite(chunk_x()[tile * size_.tile_tokens + t], size_.hidden)) {
        forced.word[t / 64] |= std::uint64_t{1} << t % 64;
      }
    }
    work_.forced[tile] = forced;
  }

  // ---- 2. gate

  void gate(std::int64_t block) {
    for (std::int64_t tile = 0; tile < tiles_; ++tile) segment(tile, block) = {};
    const std::int64_t first = block * size_.block_neurons;
    const std::int64_t rows = std::min(size_.block_neurons, size_.neurons - first);
    const std::int64_t ldc = padded(tokens_);
    const Rows<T> weights{gate_ + first * size_.hidden, size_.hidden};
    Acc<T>* product = scratch().product;
    if (use_dots()) {
      kernels_.dots(weights, rows, chunk_x(), tokens_, size_.hidden, product, ldc);
    } else {
      const bool more = first + 2 * rows <= size_.neurons;
      kernels_.multiply(weights, rows, size_.hidden, work_.panel, tokens_, product, ldc, false,
                        more ? weights[rows] : nullptr);
    }
    for (std::int64_t r = 0; r < rows; ++r) pack_neuron(block, first + r, product + r * ldc);
  }

  // One row of the gate product: an entry in each tile where the neuron is active.
  void pack_neuron(std::int64_t block, std::int64_t neuron, const Acc<T>* product) {
    std::int32_t activity = 0;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      Segment& s = segment(tile, block);
      Entry& entry = entries(tile, block)[s.entries];
      const int count =
          kernels_.relu_pack(product + tile * size_.tile_tokens, static_cast<int>(tile_size(tile)),
                             work_.forced[tile], &entry.tokens, values(tile, block) + s.values);
      if (count == 0) continue;
      entry.neuron = static_cast<std::int32_t>(neuron);
      entry.first_value = static_cast<std::uint32_t>(s.values);
      s.entries += 1;
      s.values += count;
      s.heavy += count >= plan_.heavy_tokens;
      activity += count;
    }
    if (stats_.activity) stats_.activity[neuron] += activity;
  }

  // Fixes the order of what the segments hold.
  void place_segments() {
    heavy_groups_ = 0;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      std::int64_t entries = 0, values = 0, heavy = 0;
      for (std::int64_t block = 0; block < size_.blocks; ++block) {
        Segment& s = segment(tile, block);
        s.first_entry = entries;
        s.first_value = values;
        s.first_heavy = heavy;
        entries += s.entries;
        values += s.values;
        heavy += s.heavy;
      }
      l0_ += values;
      work_.totals[tile] = {heavy, 0, 0};
      heavy_groups_ = std::max(heavy_groups_, (heavy + kUpRows - 1) / kUpRows);
      if (saved_.tiles) {
        saved_tile(tile) = {saved_entries_, entries, saved_values_, values};
        saved_entries_ += entries;
        saved_values_ += values;
      }
    }
  }

  void save_segment(std::int64_t tile, std::int64_t block) {
    const Segment& s = segment(tile, block);
    const SavedTile& to = saved_tile(tile);
    Entry* entry = saved_.entries + to.first_entry + s.first_entry;
    const Entry* list = entries(tile, block);
    for (std::int32_t e = 0; e < s.entries; ++e) {
      entry[e] = list[e];
      entry[e].first_value += static_cast<std::uint32_t>(s.first_value);
    }
    std::copy_n(values(tile, block), s.values, saved_.gate + to.first_value + s.first_value);
  }

  void list_heavy(std::int64_t tile, std::int64_t block) {
    const Segment& s = segment(tile, block);
    if (s.heavy == 0) return;
    const Entry* list = entries(tile, block);
    std::int64_t place = tile * size_.heavy_stride + s.first_heavy;
    for (std::int32_t e = 0; e < s.entries; ++e) {
      if (count(tile, block, e) < plan_.heavy_tokens) continue;
      work_.heavy_entries[place] = {static_cast<std::int32_t>(block), e};
      work_.heavy_neurons[place++] = list[e].neuron;
    }
  }

  // ---- 3. up

  // h of kUpRows heavy neurons, as columns of heavy_h.
  void heavy_up(std::int64_t tile, std::int64_t group) {
    const std::int64_t first = group * kUpRows;
    const std::int64_t rows = std::min(kUpRows, work_.totals[tile].heavy - first);
    if (rows <= 0) return;
    const std::int64_t tokens = tile_size(tile);
    const std::int64_t place = tile * size_.heavy_stride + first;
    const Acc<T>* u = scratch().product;
    const std::int64_t ldc = padded(size_.tile_tokens);
    if (gated_) {
      const T* panel = work_.panel + tile * size_.tile_tokens * padded(size_.hidden);
      kernels_.multiply({up_, size_.hidden, work_.heavy_neurons + place}, rows, size_.hidden, panel,
                        tokens, scratch().product, ldc, false, nullptr);
    }
    alignas(64) T h[kUpRows][kMaxTileTokens];
    double l1 = 0;
    for (std::int64_t r = 0; r < rows; ++r, u += ldc) {
      const auto [block, e] = work_.heavy_entries[place + r];
      const Entry& entry = entries(tile, block)[e];
      kernels_.expand(values(tile, block) + entry.first_value, entry.tokens,
                      static_cast<int>(tokens), h[r]);
      if (gated_) kernels_.scale(h[r], u, tokens, h[r]);
      if (T* saved = saved_up(tile, block)) {
        saved += entry.first_value;
        entry.tokens.for_each([&](int t) { *saved++ = narrow<T>(u[t]); });
      }
      l1 += kernels_.abs_sum(h[r], tokens);
    }
    work_.heavy_l1[tile * size_.heavy_groups + group] = l1;
    const std::int64_t width = std::min(kUpRows, rows + rows % 2);  // panels take pairs of neurons
    if (width > rows) std::fill_n(h[rows], tokens, T{});
    T* out = work_.heavy_h + tile * size_.tile_tokens * size_.heavy_stride + first;
    for (std::int64_t t = 0; t < tokens; ++t, out += size_.heavy_stride) {
      for (std::int64_t r = 0; r < width; ++r) out[r] = h[r][t];
    }
  }

  // g of a segment's light entries becomes h.
  void light_up(std::int64_t tile, std::int64_t block) {
    Segment& s = segment(tile, block);
    const Entry* list = entries(tile, block);
    const Rows<T> tile_x = chunk_x().from(tile * size_.tile_tokens);
    double l1 = 0;
    for (std::int32_t e = 0; e < s.entries; ++e) {
      const std::int32_t active = count(tile, block, e);
      if (active >= plan_.heavy_tokens) continue;
      T* h = values(tile, block) + list[e].first_value;
      if (gated_) {
        if (e + 1 < s.entries) prefetch_row(up_ + list[e + 1].neuron * size_.hidden);
        std::int32_t tokens[kMaxTileTokens];
        Acc<T> u[kMaxTileTokens];
        std::int32_t* token = tokens;
        list[e].tokens.for_each([&](int t) { *token++ = t; });
        kernels_.dots({up_ + list[e].neuron * size_.hidden, size_.hidden}, 1,
                      {tile_x.data, tile_x.stride, tokens}, active, size_.hidden, u,
                      kMaxTileTokens);
        kernels_.scale(h, u, active, h);
        if (T* saved = saved_up(tile, block)) {
          kernels_.round(u, active, saved + list[e].first_value);
        }
      }
      l1 += kernels_.abs_sum(h, active);
    }
    s.l1 = l1;
  }

  void prefetch_row(const T* row) const {
    constexpr std::int64_t line = 64 / sizeof(T);
    for (std::int64_t k = 0; k < size_.hidden; k += line) __builtin_prefetch(row + k, 0, 2);
  }

  // ---- 4. down

  // The light entries of a tile, turned from neuron by neuron to token by token.
  void list_light(std::int64_t tile) {
    std::int64_t* start = work_.light_start + tile * (size_.tile_tokens + 1);
    std::int32_t* neurons = work_.light_neurons + tile * size_.neurons;
    std::int32_t* index = work_.light_index + tile * size_.light_capacity;
    T* weights = work_.light_h + tile * size_.light_capacity;
    std::fill_n(start, size_.tile_tokens + 1, 0);
    std::int32_t light = 0;
    for_each_light(tile, [&](const Entry& entry, const T*) {
      entry.tokens.for_each([&](int t) { ++start[t + 1]; });
      neurons[light++] = entry.neuron;
    });
    work_.totals[tile].light = light;
    work_.totals[tile].l1 = sum_l1(tile);
    std::int64_t next[kMaxTileTokens];
    for (std::int64_t t = 0; t < size_.tile_tokens; ++t) {
      next[t] = start[t];
      start[t + 1] += start[t];
    }
    light = 0;
    for_each_light(tile, [&](const Entry& entry, const T* h) {
      entry.tokens.for_each([&](int t) {
        index[next[t]] = light;
        weights[next[t]++] = *h++;
      });
      ++light;
    });
  }

  template <class Visit>
  void for_each_light(std::int64_t tile, Visit&& visit) {
    for (std::int64_t block = 0; block < size_.blocks; ++block) {
      const Entry* list = entries(tile, block);
      for (std::int32_t e = 0; e < segment(tile, block).entries; ++e) {
        if (count(tile, block, e) < plan_.heavy_tokens) {
          visit(list[e], values(tile, block) + list[e].first_value);
        }
      }
    }
  }

  double sum_l1(std::int64_t tile) {
    double sum = 0;
    for (std::int64_t block = 0; block < size_.blocks; ++block) sum += segment(tile, block).l1;
    const std::int64_t groups = (work_.totals[tile].heavy + kUpRows - 1) / kUpRows;
    for (std::int64_t group = 0; group < groups; ++group) {
      sum += work_.heavy_l1[tile * size_.heavy_groups + group];
    }
    return sum;
  }

  void down(std::int64_t tile, std::int64_t column) {
    const std::int64_t columns = std::min(kDownColumns, size_.hidden - column);
    const std::int64_t tokens = tile_size(tile);
    Scratch<T>& own = scratch();
    std::fill_n(own.y, tokens * kDownColumns, Acc<T>(0));

    const T* h = work_.heavy_h + tile * size_.tile_tokens * size_.heavy_stride;
    for (std::int64_t n = 0; n < work_.totals[tile].heavy; n += kHeavyGroup) {
      const std::int64_t group = std::min(kHeavyGroup, work_.totals[tile].heavy - n);
      const Rows<T> rows{down_ + column, size_.hidden,
                         work_.heavy_neurons + tile * size_.heavy_stride + n};
      kernels_.pack(rows, group, columns, own.panel);
      kernels_.multiply({h + n, size_.heavy_stride}, tokens, group, own.panel, columns, own.y,
                        kDownColumns, true, nullptr);
    }

    // Copied side by side: rows of D a power of two apart would share a few sets of the cache.
    const std::int32_t* neurons = work_.light_neurons + tile * size_.neurons;
    constexpr std::int64_t line = 64 / sizeof(T), ahead = 8;
    for (std::int64_t i = 0; i < work_.totals[tile].light; ++i) {
      if (i + ahead < work_.totals[tile].light) {
        const T* later = down_ + neurons[i + ahead] * size_.hidden + column;
        for (std::int64_t k = 0; k < columns; k += line) __builtin_prefetch(later + k);
      }
      std::memcpy(own.light_down + i * kDownColumns, down_ + neurons[i] * size_.hidden + column,
                  static_cast<std::size_t>(columns) * sizeof(T));
    }
    const std::int64_t* start = work_.light_start + tile * (size_.tile_tokens + 1);
    const std::int32_t* index = work_.light_index + tile * size_.light_capacity;
    const T* weights = work_.light_h + tile * size_.light_capacity;
    T* y = y_ + (first_ + tile * size_.tile_tokens) * size_.hidden + column;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Rows<T> rows{own.light_down, kDownColumns, index + start[t]};
      kernels_.weighted_sum(rows, weights + start[t], start[t + 1] - start[t], columns,
                            own.y + t * kDownColumns);
      kernels_.round(own.y + t * kDownColumns, columns, y + t * size_.hidden);
    }
  }

  const FfnPlan& plan_;
  const Sizes size_;
  const Kernels<T>& kernels_;
  const T* x_;
  const bool gated_;
  const T* gate_;
  const T* up_;
  const T* down_;
  T* y_;
  FfnStats stats_;
  Workspace<T> work_;
  Saved<T> saved_;

  // The chunk in hand.
  std::int64_t first_ = 0;
  std::int64_t tokens_ = 0;
  std::int64_t tiles_ = 0;
  std::int64_t heavy_groups_ = 0;  // of the tile with the most

  // Running totals.
  std::int64_t l0_ = 0;
  double l1_ = 0;
  std::int64_t saved_entries_ = 0;
  std::int64_t saved_values_ = 0;
};

template <class T>
std::size_t workspace_bytes(const FfnPlan& plan) {
  Carver carver;
  Workspace<T>::carve(plan, carver);
  return carver.used();
}

template <class T>
std::size_t saved_bytes(const FfnPlan& plan) {
  Carver carver;
  Saved<T>::carve(plan, carver);
  return carver.used();
}

}  // namespace

std::size_t forward_workspace_bytes(const FfnPlan& plan) {
  return with_type(plan.problem.dtype, [&]<class T>() { return workspace_bytes<T>(plan); });
}

std::size_t saved_bytes(const FfnPlan& plan) {
  return with_type(plan.problem.dtype, [&]<class T>() { return saved_bytes<T>(plan); });
}

Status forward(const FfnPlan& plan, const FfnForwardArgs& args) {
  with_type(plan.problem.dtype, [&]<class T>() { Forward<T>(plan, args).run(); });
  return {};
}

}  // namespace twell::cpu
