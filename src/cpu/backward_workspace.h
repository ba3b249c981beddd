#pragma once
// What the backward (backward.cpp) works in: the sizes that follow from the plan, and the arrays
// that it cuts out of the caller's workspace. Their capacity is the worst case (100% active), but
// only what is filled is ever touched.

#include <algorithm>
#include <cstdint>

#include "cpu/carver.h"
#include "cpu/kernels.h"
#include "cpu/saved.h"
#include "twell/ffn.h"

namespace twell::cpu::backward_detail {

inline constexpr std::int64_t kMaxChunkTokens = 4096;  // whose coefficients are alive at once
inline constexpr std::int64_t kEntryBlock = 128;       // entries per unit of work of phases 2 and 3
inline constexpr std::int64_t kProductRows = 32;       // rows per call of multiply
inline constexpr std::int64_t kDxColumns = 256;        // hidden columns per unit of dx work
inline constexpr std::int64_t kHeavyGroup = 512;     // neurons per dense dx product (a panel in L2)
inline constexpr std::int64_t kWeightColumns = 512;  // hidden columns per heavy weight product
// Of x or dy, copied for light neurons. Smaller slabs stay in L2, but then rows of the gradients
// are written in more, shorter pieces: with 2048 tokens of 115 active neurons, 512 KB take 25%
// longer than 2 MB (docs/kernels/cpu_ffn.md).
inline constexpr std::int64_t kSlabBytes = 2 << 20;

constexpr std::int64_t divide_up(std::int64_t n, std::int64_t unit) {
  return (n + unit - 1) / unit;
}

// Sizes that follow from the plan.
struct Sizes {
  explicit Sizes(const FfnPlan& plan)
      : gated(plan.problem.kind == FfnKind::kGated),
        projections(gated ? 2 : 1),
        hidden(plan.problem.hidden),
        neurons(plan.problem.neurons),
        tile_tokens(plan.tile_tokens),
        chunks(divide_up(plan.problem.tokens, kMaxChunkTokens)),
        tiles(chunks == 0 ? 0 : divide_up(divide_up(plan.problem.tokens, chunks), tile_tokens)),
        chunk_tokens(tiles * tile_tokens),
        blocks(divide_up(neurons, kEntryBlock)),
        // An odd number of cache lines, so that a column's rows fall into different cache sets.
        heavy_stride(padded(neurons) + ((padded(neurons) / 32) % 2 == 0 ? 32 : 0)),
        use_heavy(plan.heavy_tokens <= plan.tile_tokens),
        light_capacity(neurons * std::min<std::int64_t>(plan.heavy_tokens - 1, tile_tokens)),
        chunk_light(
            std::min(divide_up(plan.heavy_tokens * chunk_tokens, tile_tokens), chunk_tokens)),
        slab_columns(std::clamp<std::int64_t>(
            kSlabBytes / static_cast<std::int64_t>(size_of(plan.problem.dtype)) /
                std::max<std::int64_t>(chunk_tokens, 1) / 32 * 32,
            32, kWeightColumns)) {}

  std::int64_t tile_values() const { return tile_tokens * neurons; }
  std::int64_t chunk_stride() const { return padded(chunk_tokens) + 32; }

  bool gated;
  int projections;
  std::int64_t hidden, neurons, tile_tokens, chunks, tiles, chunk_tokens, blocks, heavy_stride;
  bool use_heavy;
  std::int64_t light_capacity;  // light places of a tile
  std::int64_t chunk_light;     // tokens of a chunk for which a light neuron may be active
  std::int64_t slab_columns;    // hidden columns per unit of light weight work
};

// The entries of a tile: the forward's, or a completed copy.
template <class T>
struct TileView {
  const Entry* entries;
  std::int64_t count;
  const T* gate;
  const T* up;
  std::int64_t heavy;
  std::int64_t light;
};

// dg or du of a chunk, in the three orders it is needed in.
template <class T>
struct Coefficients {
  T* values = nullptr;  // [tiles, tile_values], as the entries say
  T* heavy = nullptr;   // [tiles, tile_tokens, heavy_stride]
  T* light = nullptr;   // [tiles, light_capacity], token by token

  static Coefficients carve(const Sizes& size, Carver& carver) {
    Coefficients c;
    c.values = carver.take<T>(size.tiles * size.tile_values());
    if (size.use_heavy) c.heavy = carver.take<T>(size.chunk_tokens * size.heavy_stride);
    c.light = carver.take<T>(size.tiles * size.light_capacity);
    return c;
  }
};

// Where a neuron's tokens and coefficients over a chunk lie, if it is light there.
struct NeuronList {
  std::int64_t first;
  std::int32_t count;
  bool heavy;
};

// What one thread needs for itself.
template <class T>
struct Scratch {
  Acc<T>* product = nullptr;       // [kProductRows, kMaxTileTokens]
  std::int32_t* rows = nullptr;    // [kEntryBlock] heavy neurons of a block of entries
  std::int64_t* entry = nullptr;   // [kEntryBlock] their entries
  T* panel = nullptr;              // [kHeavyGroup, kDxColumns]
  T* light_rows = nullptr;         // [neurons, kDxColumns] of a tile's light neurons
  Acc<T>* dx = nullptr;            // [tile_tokens, kDxColumns]
  std::int64_t* cursor = nullptr;  // [tiles]
  T* slab = nullptr;               // [chunk_tokens, slab_columns] of x or dy
  T* dense = nullptr;              // [kProductRows, chunk_stride] coefficients of heavy neurons
  Acc<T>* sums = nullptr;          // [kProductRows, kWeightColumns]
};

template <class T>
struct Workspace {
  T* dy_panel = nullptr;                  // dyᵀ of the chunk: hidden × tokens
  T* x_rows = nullptr;                    // x of the chunk as a panel: tokens × hidden
  T* dy_rows = nullptr;                   // dy likewise
  TileView<T>* views = nullptr;           // [tiles]
  Entry* completed = nullptr;             // [tiles, neurons]; touched only if a dy is not finite
  Coefficients<T> projection[2];          // dg, du
  T* h = nullptr;                         // [tiles, tile_values]
  std::int64_t* heavy_before = nullptr;   // [tiles, blocks] heavy entries, then those before
  std::int32_t* heavy_neurons = nullptr;  // [tiles, heavy_stride]
  std::int64_t* light_start = nullptr;    // [tiles, tile_tokens + 1]
  std::int32_t* light_neurons = nullptr;  // [tiles, neurons]
  std::int32_t* light_index = nullptr;    // [tiles, light_capacity] into light_neurons, by token
  NeuronList* lists = nullptr;            // [neurons] over the chunk, into the next two
  std::int32_t* tokens = nullptr;         // [neurons, chunk_light] where light neurons are active
  T* weights[3] = {};                     // likewise: their coefficients in each product
  std::int32_t* chunk_heavy = nullptr;    // [neurons] those heavy over the chunk
  Acc<T>* totals = nullptr;               // [projections + 1, neurons, hidden] if several chunks
  Scratch<T>* scratch = nullptr;          // [threads]; its arrays follow

  static Workspace carve(const FfnPlan& plan, Carver& carver) {
    const Sizes size(plan);
    Workspace w;
    if (size.use_heavy) {
      w.dy_panel = carver.take<T>(panel_elements(size.hidden, size.chunk_tokens));
      w.x_rows = carver.take<T>(panel_elements(size.chunk_tokens, size.hidden));
      w.dy_rows = carver.take<T>(panel_elements(size.chunk_tokens, size.hidden));
      w.heavy_neurons = carver.take<std::int32_t>(size.tiles * size.heavy_stride);
    }
    w.views = carver.take<TileView<T>>(size.tiles);
    w.completed = carver.take<Entry>(size.tiles * size.neurons);
    for (int p = 0; p < size.projections; ++p) {
      w.projection[p] = Coefficients<T>::carve(size, carver);
    }
    w.h = carver.take<T>(size.tiles * size.tile_values());
    w.heavy_before = carver.take<std::int64_t>(size.tiles * size.blocks);
    w.light_start = carver.take<std::int64_t>(size.tiles * (size.tile_tokens + 1));
    w.light_neurons = carver.take<std::int32_t>(size.tiles * size.neurons);
    w.light_index = carver.take<std::int32_t>(size.tiles * size.light_capacity);
    w.lists = carver.take<NeuronList>(size.neurons);
    w.tokens = carver.take<std::int32_t>(size.neurons * size.chunk_light);
    for (int p = 0; p <= size.projections; ++p) {
      w.weights[p] = carver.take<T>(size.neurons * size.chunk_light);
    }
    w.chunk_heavy = carver.take<std::int32_t>(size.neurons);
    if (size.chunks > 1) {
      w.totals = carver.take<Acc<T>>((size.projections + 1) * size.neurons * size.hidden);
    }
    w.scratch = carver.take<Scratch<T>>(plan.device.threads);
    for (int thread = 0; thread < plan.device.threads; ++thread) {
      Scratch<T> s;
      s.product = carver.take<Acc<T>>(kProductRows * kMaxTileTokens);
      s.rows = carver.take<std::int32_t>(kEntryBlock);
      s.entry = carver.take<std::int64_t>(kEntryBlock);
      s.panel = carver.take<T>(panel_elements(kHeavyGroup, kDxColumns));
      s.light_rows = carver.take<T>(size.light_capacity > 0 ? size.neurons * kDxColumns : 0);
      s.dx = carver.take<Acc<T>>(size.tile_tokens * kDxColumns);
      s.cursor = carver.take<std::int64_t>(size.tiles);
      s.slab = carver.take<T>(size.chunk_tokens * size.slab_columns);
      s.dense = carver.take<T>(kProductRows * size.chunk_stride());
      s.sums = carver.take<Acc<T>>(kProductRows * kWeightColumns);
      if (w.scratch) w.scratch[thread] = s;
    }
    return w;
  }
};

}  // namespace twell::cpu::backward_detail
