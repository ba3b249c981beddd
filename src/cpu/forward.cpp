// The sparse FFN forward on the CPU, chunk by chunk of tokens; in each chunk five phases:
//
//   1. prepare  x as a panel; tokens with NaN or infinity marked
//   2. gate     per block of neurons, over all tokens of the chunk, so that G is read once; each
//               row of the product is packed while it is in cache. A (tile, block) is a segment of
//               the workspace with room for the worst case, so nothing can overflow and no thread
//               waits for another
//   3. up       per segment, tile after tile, so that a tile's x stays in cache
//   4. gather   per tile: the rows of the union that go to the dense product (heavy) and, per
//               token, the list of those that do not (light); what the backward needs
//   5. down     per (tile, block of hidden columns)
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

constexpr std::int64_t kUpRows = 32;        // heavy neurons per dense up product
constexpr std::int64_t kDownColumns = 256;  // hidden columns per unit of down work
constexpr std::int64_t kHeavyGroup = 512;   // neurons per dense down product (a panel in L2)

// One (tile, block of neurons): what phase 2 found, and where phase 3 puts it.
struct Segment {
  std::int32_t entries;
  std::int32_t values;
  std::int32_t heavy;
  double l1;
  std::int64_t first_entry;  // from here on: relative to the tile
  std::int64_t first_value;
  std::int64_t first_heavy;
};

// Neurons of a tile, by kind.
struct TileLists {
  std::int64_t heavy;
  std::int64_t light;
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
        use_heavy(plan.heavy_tokens <= plan.tile_tokens),
        light_capacity(neurons * std::min<std::int64_t>(plan.heavy_tokens - 1, tile_tokens)) {}

  std::int64_t segment_values() const { return block_neurons * tile_tokens + kPackSlack; }

  std::int64_t hidden, neurons, tile_tokens, chunk_tokens, tiles, block_neurons, blocks;
  std::int64_t heavy_stride;
  bool use_heavy;
  std::int64_t light_capacity;
};

// What one thread needs for itself.
template <class T>
struct Scratch {
  Acc<T>* product = nullptr;      // [max(block_neurons, kUpRows), padded(chunk_tokens)]
  std::int32_t* rows = nullptr;   // [block_neurons] heavy neurons of a segment
  std::int32_t* entry = nullptr;  // [block_neurons] their entries
  T* panel = nullptr;             // [kHeavyGroup, kDownColumns]
  T* light_down = nullptr;        // [neurons, kDownColumns] rows of D
  Acc<T>* y = nullptr;            // [tile_tokens, kDownColumns]
};

template <class T>
struct Workspace {
  T* panel = nullptr;           // xᵀ of the chunk; null where dots are used
  TokenMask* forced = nullptr;  // [tiles] tokens with a NaN or an infinity
  Segment* segments = nullptr;  // [tiles, blocks]
  Entry* entries = nullptr;     // [tiles, blocks, block_neurons]
  T* gate = nullptr;            // [tiles, blocks, segment_values]
  T* up = nullptr;              // likewise; training a gated block only
  T* h = nullptr;               // likewise; the same array as gate unless that is still needed
  TileLists* lists = nullptr;   // [tiles]
  std::int32_t* heavy_neurons = nullptr;  // [tiles, heavy_stride]
  T* heavy_h = nullptr;                   // [tiles, tile_tokens, heavy_stride]
  std::int32_t* light_neurons = nullptr;  // [tiles, neurons]
  std::int64_t* light_start = nullptr;    // [tiles, tile_tokens + 1] into the next two
  std::int32_t* light_index = nullptr;    // [tiles, light_capacity] into light_neurons, by token
  T* light_h = nullptr;                   // likewise
  Scratch<T>* scratch = nullptr;          // [threads]; its arrays follow

  static Workspace carve(const FfnPlan& plan, Carver& carver) {
    const Sizes size(plan);
    const std::int64_t segments = size.tiles * size.blocks;
    const bool gated = plan.problem.kind == FfnKind::kGated;
    Workspace w;
    w.panel = carver.take<T>(panel_elements(size.hidden, size.chunk_tokens));
    w.forced = carver.take<TokenMask>(size.tiles);
    w.segments = carver.take<Segment>(segments);
    w.entries = carver.take<Entry>(segments * size.block_neurons);
    w.gate = carver.take<T>(segments * size.segment_values());
    w.h = w.gate;
    if (gated && plan.training) {
      w.up = carver.take<T>(segments * size.segment_values());
      w.h = carver.take<T>(segments * size.segment_values());
    }
    w.lists = carver.take<TileLists>(size.tiles);
    if (size.use_heavy) {
      w.heavy_neurons = carver.take<std::int32_t>(size.tiles * size.heavy_stride);
      w.heavy_h = carver.take<T>(size.tiles * size.tile_tokens * size.heavy_stride);
    }
    w.light_start = carver.take<std::int64_t>(size.tiles * (size.tile_tokens + 1));
    w.light_neurons = carver.take<std::int32_t>(size.tiles * size.neurons);
    w.light_index = carver.take<std::int32_t>(size.tiles * size.light_capacity);
    w.light_h = carver.take<T>(size.tiles * size.light_capacity);
    w.scratch = carver.take<Scratch<T>>(plan.device.threads);
    for (int thread = 0; thread < plan.device.threads; ++thread) {
      Scratch<T> s;
      s.product =
          carver.take<Acc<T>>(std::max(size.block_neurons, kUpRows) * padded(size.chunk_tokens));
      s.rows = carver.take<std::int32_t>(size.block_neurons);
      s.entry = carver.take<std::int32_t>(size.block_neurons);
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
  T* values(T* array, std::int64_t tile, std::int64_t block) {
    return array + (tile * size_.blocks + block) * size_.segment_values();
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
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        for (std::int64_t block = 0; block < size_.blocks; ++block) {
          if (gated_) up(tile, block);
          sum_segment(tile, block);
        }
      }
#pragma omp single
      place_segments();
      if (size_.use_heavy || saved_.tiles) {
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (std::int64_t tile = 0; tile < tiles_; ++tile) {
          for (std::int64_t block = 0; block < size_.blocks; ++block) gather_segment(tile, block);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) list_light(tile);
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (std::int64_t column = 0; column < size_.hidden; column += kDownColumns) {
        for (std::int64_t tile = 0; tile < tiles_; ++tile) down(tile, column);
      }
    }
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
      const int count = kernels_.relu_pack(
          product + tile * size_.tile_tokens, static_cast<int>(tile_size(tile)), work_.forced[tile],
          &entry.tokens, values(work_.gate, tile, block) + s.values);
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

  // ---- 3. up

  void up(std::int64_t tile, std::int64_t block) {
    const Segment& s = segment(tile, block);
    const Entry* list = entries(tile, block);
    Scratch<T>& own = scratch();
    std::int64_t heavy = 0;
    for (std::int32_t e = 0; e < s.entries; ++e) {
      const int count = list[e].tokens.count();
      if (e + 1 < s.entries) prefetch_row(up_ + list[e + 1].neuron * size_.hidden);
      if (count >= plan_.heavy_tokens) {
        own.rows[heavy] = list[e].neuron;
        own.entry[heavy++] = e;
      } else {
        light_up(tile, block, list[e], count);
      }
    }
    const Rows<T> weights{up_, size_.hidden, own.rows};
    const T* panel = work_.panel + tile * size_.tile_tokens * padded(size_.hidden);
    const std::int64_t ldc = padded(size_.tile_tokens);
    for (std::int64_t first = 0; first < heavy; first += kUpRows) {
      const std::int64_t rows = std::min(kUpRows, heavy - first);
      kernels_.multiply(weights.from(first), rows, size_.hidden, panel, tile_size(tile),
                        own.product, ldc, false, nullptr);
      for (std::int64_t r = 0; r < rows; ++r) {
        const Entry& entry = list[own.entry[first + r]];
        const Acc<T>* u = own.product + r * ldc;
        std::int64_t v = entry.first_value;
        entry.tokens.for_each([&](int t) { apply_up(tile, block, v++, u[t]); });
      }
    }
  }

  void prefetch_row(const T* row) const {
    constexpr std::int64_t line = 64 / sizeof(T);
    for (std::int64_t k = 0; k < size_.hidden; k += line) __builtin_prefetch(row + k, 0, 2);
  }

  void light_up(std::int64_t tile, std::int64_t block, const Entry& entry, int count) {
    std::int32_t tokens[kMaxTileTokens];
    Acc<T> u[kMaxTileTokens];
    std::int32_t* token = tokens;
    entry.tokens.for_each([&](int t) { *token++ = t; });
    const Rows<T> tile_x{chunk_x()[tile * size_.tile_tokens], size_.hidden, tokens};
    const Rows<T> weight{up_ + entry.neuron * size_.hidden, size_.hidden};
    kernels_.dots(weight, 1, tile_x, count, size_.hidden, u, kMaxTileTokens);
    for (int i = 0; i < count; ++i) apply_up(tile, block, entry.first_value + i, u[i]);
  }

  void apply_up(std::int64_t tile, std::int64_t block, std::int64_t value, Acc<T> u) {
    const T g = values(work_.gate, tile, block)[value];
    if (work_.up) values(work_.up, tile, block)[value] = narrow<T>(u);
    values(work_.h, tile, block)[value] = narrow<T>(widen(g) * u);
  }

  void sum_segment(std::int64_t tile, std::int64_t block) {
    Segment& s = segment(tile, block);
    const T* h = values(work_.h, tile, block);
    double sum = 0;
    for (std::int32_t v = 0; v < s.values; ++v) sum += std::abs(widen(h[v]));
    s.l1 = sum;
  }

  // ---- 4. gather

  void place_segments() {
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
        l1_ += s.l1;
      }
      l0_ += values;
      work_.lists[tile].heavy = heavy;
      if (heavy % 2 != 0) {  // a bf16 panel takes neurons in pairs
        T* h = work_.heavy_h + tile * size_.tile_tokens * size_.heavy_stride + heavy;
        for (std::int64_t t = 0; t < tile_size(tile); ++t) h[t * size_.heavy_stride] = T{};
      }
      if (saved_.tiles) {
        saved_.tiles[first_ / size_.tile_tokens + tile] = {saved_entries_, entries, saved_values_,
                                                           values};
        saved_entries_ += entries;
        saved_values_ += values;
      }
    }
  }

  void gather_segment(std::int64_t tile, std::int64_t block) {
    const Segment& s = segment(tile, block);
    if (s.heavy > 0) gather_heavy(tile, block);
    if (saved_.tiles) save_segment(tile, block);
  }

  void gather_heavy(std::int64_t tile, std::int64_t block) {
    const Segment& s = segment(tile, block);
    const Entry* list = entries(tile, block);
    const T* h = values(work_.h, tile, block);
    T* out = work_.heavy_h + tile * size_.tile_tokens * size_.heavy_stride + s.first_heavy;
    std::int32_t* neuron = work_.heavy_neurons + tile * size_.heavy_stride + s.first_heavy;
    for (std::int64_t t = 0; t < tile_size(tile); ++t) {
      std::fill_n(out + t * size_.heavy_stride, s.heavy, T{});
    }
    for (std::int32_t e = 0; e < s.entries; ++e) {
      if (list[e].tokens.count() < plan_.heavy_tokens) continue;
      const T* value = h + list[e].first_value;
      list[e].tokens.for_each([&](int t) { out[t * size_.heavy_stride] = *value++; });
      *neuron++ = list[e].neuron;
      ++out;
    }
  }

  void save_segment(std::int64_t tile, std::int64_t block) {
    const Segment& s = segment(tile, block);
    const SavedTile& to = saved_.tiles[first_ / size_.tile_tokens + tile];
    Entry* entry = saved_.entries + to.first_entry + s.first_entry;
    const Entry* list = entries(tile, block);
    for (std::int32_t e = 0; e < s.entries; ++e) {
      entry[e] = list[e];
      entry[e].first_value += static_cast<std::uint32_t>(s.first_value);
    }
    const std::int64_t value = to.first_value + s.first_value;
    std::copy_n(values(work_.gate, tile, block), s.values, saved_.gate + value);
    if (saved_.up) std::copy_n(values(work_.up, tile, block), s.values, saved_.up + value);
  }

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
    work_.lists[tile].light = light;
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
      const T* h = values(work_.h, tile, block);
      for (std::int32_t e = 0; e < segment(tile, block).entries; ++e) {
        if (list[e].tokens.count() < plan_.heavy_tokens) visit(list[e], h + list[e].first_value);
      }
    }
  }

  // ---- 5. down

  void down(std::int64_t tile, std::int64_t column) {
    const std::int64_t columns = std::min(kDownColumns, size_.hidden - column);
    const std::int64_t tokens = tile_size(tile);
    Scratch<T>& own = scratch();
    std::fill_n(own.y, tokens * kDownColumns, Acc<T>(0));

    const T* h = work_.heavy_h + tile * size_.tile_tokens * size_.heavy_stride;
    for (std::int64_t n = 0; n < work_.lists[tile].heavy; n += kHeavyGroup) {
      const std::int64_t group = std::min(kHeavyGroup, work_.lists[tile].heavy - n);
      const Rows<T> rows{down_ + column, size_.hidden,
                         work_.heavy_neurons + tile * size_.heavy_stride + n};
      kernels_.pack(rows, group, columns, own.panel);
      kernels_.multiply({h + n, size_.heavy_stride}, tokens, group, own.panel, columns, own.y,
                        kDownColumns, true, nullptr);
    }

    // Copied side by side: rows of D a power of two apart would share a few sets of the cache.
    const std::int32_t* neurons = work_.light_neurons + tile * size_.neurons;
    constexpr std::int64_t line = 64 / sizeof(T), ahead = 8;
    for (std::int64_t i = 0; i < work_.lists[tile].light; ++i) {
      if (i + ahead < work_.lists[tile].light) {
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
