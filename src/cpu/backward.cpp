// The sparse FFN backward on the CPU. At the active places only, with dh = dy Dᵀ plus the gradient
// of the L1 term,
//
//   gated:  dg = dh u where g > 0   du = dh g   dx = dg G + du U   dG = dgᵀ x   dU = duᵀ x
//   plain:  dg = dh where h > 0                 dx = dg U          dU = dgᵀ x
//   both:   dD = hᵀ dy
//
// It goes chunk by chunk of tokens; in each chunk:
//
//   1. prepare       dy as a panel; the forward's entries, completed where dy is not finite
//   2. coefficients  dh, hence dg, du and h, per (tile, block of entries)
//   3. gather        dg and du turned from neuron by neuron to token by token
//   4. dx            per (tile, block of hidden columns)
//   5. weights       per block of neurons, over all tokens of the chunk
//
// Where many tokens share a neuron (heavy), rows go through the dense product, otherwise one by
// one (light). Every sum has a fixed order that does not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/backward_workspace.h"
#include "cpu/ffn.h"
#include "cpu/kernels.h"
#include "cpu/saved.h"
#include "cpu/scalar.h"

namespace twell::cpu {
namespace {

using namespace backward_detail;

template <class T>
class Backward {
 public:
  Backward(const FfnPlan& plan, const FfnBackwardArgs& args)
      : plan_(plan),
        size_(plan),
        kernels_(kernels<T>(plan.device.isa)),
        x_(static_cast<const T*>(args.x)),
        dy_(static_cast<const T*>(args.grad_y)),
        down_(static_cast<const T*>(args.weights.down)),
        dx_(static_cast<T*>(args.grad_x)),
        accumulate_(args.accumulate) {
    if (args.grad_l1) grad_l1_ = *static_cast<const Acc<T>*>(args.grad_l1);
    Carver carver(args.workspace);
    work_ = Workspace<T>::carve(plan, carver);
    Carver saved_carver(args.saved);
    saved_ = Saved<T>::carve(plan, saved_carver);

    const auto want = [&](const T* coefficients, Source source, const T* panel, void* grad) {
      if (!grad) return;
      Acc<T>* totals =
          work_.totals ? work_.totals + products_ * size_.neurons * size_.hidden : nullptr;
      product_[products_++] = {coefficients, source, panel, static_cast<T*>(grad), totals};
    };
    // The plain block's only input projection takes the gate's place, as in the forward.
    const void* gate = size_.gated ? args.weights.gate : args.weights.up;
    weights_[0] = static_cast<const T*>(gate);
    weights_[1] = static_cast<const T*>(args.weights.up);
    const Coefficients<T>* p = work_.projection;
    want(p[0].values, kX, work_.x_rows, size_.gated ? args.grad_gate : args.grad_up);
    if (size_.gated) want(p[1].values, kX, work_.x_rows, args.grad_up);
    want(work_.h, kDy, work_.dy_rows, args.grad_down);
  }

  void run() {
    if (plan_.problem.tokens == 0 && !accumulate_) {
      for (int p = 0; p < products_; ++p) {
        std::fill_n(product_[p].grad, size_.neurons * size_.hidden, T{});
      }
    }
    for (first_ = 0; first_ < plan_.problem.tokens; first_ += size_.chunk_tokens) {
      tokens_ = std::min(size_.chunk_tokens, plan_.problem.tokens - first_);
      tiles_ = divide_up(tokens_, size_.tile_tokens);
      run_chunk();
    }
  }

 private:
  enum Source { kX, kDy, kSources };  // by name: both may be the same memory

  // One weight gradient: Σ_t coefficients[t] source[t] for every neuron.
  struct Product {
    const T* coefficients;  // dg, du or h, as Coefficients::values
    Source source;
    const T* panel;  // of the source, over the chunk's tokens
    T* grad;
    Acc<T>* totals;  // [neurons, hidden] over several chunks
  };

  std::int64_t tile_size(std::int64_t tile) const {
    return std::min(size_.tile_tokens, tokens_ - tile * size_.tile_tokens);
  }
  Scratch<T>& scratch() { return work_.scratch[omp_get_thread_num()]; }
  Rows<T> chunk_rows(const T* matrix) const {
    return {matrix + first_ * size_.hidden, size_.hidden};
  }
  bool heavy(const Entry& entry) const { return entry.tokens.count() >= plan_.heavy_tokens; }

  void run_chunk() {
    const std::int64_t weight_blocks = divide_up(size_.neurons, kProductRows);
    const std::int64_t weight_columns = divide_up(size_.hidden, kWeightColumns);
#pragma omp parallel num_threads(plan_.device.threads)
    {
#pragma omp for schedule(static)
      for (std::int64_t t = 0; t < tokens_; t += kPanelColumns) pack_tokens(t);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) view_tile(tile);
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        for (std::int64_t block = 0; block < size_.blocks; ++block) coefficients(tile, block);
      }
      if (dx_) {
#pragma omp single
        place_heavy();
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (std::int64_t tile = 0; tile < tiles_; ++tile) {
          for (std::int64_t block = 0; block < size_.blocks; ++block) gather_heavy(tile, block);
        }
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t tile = 0; tile < tiles_; ++tile) list_light(tile);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (std::int64_t column = 0; column < size_.hidden; column += kDxColumns) {
          for (std::int64_t tile = 0; tile < tiles_; ++tile) dx(tile, column);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t block = 0; block < weight_blocks; ++block) list_neurons(block);
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (int source = kX; source < kSources; ++source) {
        for (std::int64_t column = 0; column < size_.hidden; column += size_.slab_columns) {
          light_weights(static_cast<Source>(source), column);
        }
      }
#pragma omp single
      list_chunk_heavy();
#pragma omp for schedule(static)
      for (std::int64_t column = 0; column < size_.hidden; column += kPanelColumns) {
        pack_columns(column);
      }
#pragma omp for schedule(dynamic, 1) collapse(3)
      for (std::int64_t n = 0; n < chunk_heavy_; n += kProductRows) {
        for (int p = 0; p < products_; ++p) {
          for (std::int64_t column = 0; column < weight_columns; ++column) {
            heavy_weights(product_[p], n, column * kWeightColumns);
          }
        }
      }
    }
  }

  // ---- 1. prepare

  void pack_tokens(std::int64_t first) {
    if (!size_.use_heavy) return;
    kernels_.pack_transposed(chunk_rows(dy_).from(first), std::min(kPanelColumns, tokens_ - first),
                             size_.hidden, work_.dy_panel + first * padded(size_.hidden));
  }

  void view_tile(std::int64_t tile) {
    const SavedTile& saved = saved_.tiles[first_ / size_.tile_tokens + tile];
    work_.views[tile] = {saved_.entries + saved.first_entry,
                         saved.entries,
                         saved_.gate + saved.first_value,
                         saved_.up ? saved_.up + saved.first_value : nullptr,
                         0,
                         0};
    TokenMask forced = {};
    for (std::int64_t t = 0; t < tile_size(tile); ++t) {
      const T* dy = chunk_rows(dy_)[tile * size_.tile_tokens + t];
      if (!kernels_.all_finite(dy, size_.hidden) || !std::isfinite(grad_l1_)) {
        forced.word[t / 64] |= std::uint64_t{1} << t % 64;
      }
    }
    if (forced.any()) complete(tile, forced);
  }

  // A NaN or an infinity in dy, or in the gradient of the L1 term, reaches every neuron, active or
  // not: 0 · inf is NaN. So the tile's entries are completed with g = u = 0 for those tokens. g and
  // u lie where dg and du will be written.
  void complete(std::int64_t tile, TokenMask forced) {
    TileView<T>& view = work_.views[tile];
    const TileView<T> saved = view;
    Entry* entries = work_.completed + tile * size_.neurons;
    T* gate = tile_values(work_.projection[0].values, tile);
    T* up = size_.gated ? tile_values(work_.projection[1].values, tile) : nullptr;
    view = {entries, size_.neurons, gate, up, 0, 0};
    const Entry* from = saved.entries;
    std::uint32_t to = 0;
    for (std::int32_t n = 0; n < size_.neurons; ++n) {
      const bool known = from != saved.entries + saved.count && from->neuron == n;
      const TokenMask active = known ? from->tokens : TokenMask{};
      entries[n] = {n, to, {{active.word[0] | forced.word[0], active.word[1] | forced.word[1]}}};
      std::uint32_t value = known ? from->first_value : 0;
      entries[n].tokens.for_each([&](int t) {
        gate[to] = active[t] ? saved.gate[value] : T{};
        if (up) up[to] = active[t] ? saved.up[value] : T{};
        value += active[t];
        ++to;
      });
      from += known;
    }
  }

  template <class V>
  V* tile_values(V* array, std::int64_t tile) const {
    return array + tile * size_.tile_values();
  }

  // ---- 2. coefficients

  // Calls visit(entry) for each entry of a block of a tile.
  template <class Visit>
  void for_each_entry(std::int64_t tile, std::int64_t block, Visit&& visit) {
    const TileView<T>& view = work_.views[tile];
    const std::int64_t last = std::min((block + 1) * kEntryBlock, view.count);
    for (std::int64_t e = block * kEntryBlock; e < last; ++e) visit(view.entries[e]);
  }

  void coefficients(std::int64_t tile, std::int64_t block) {
    Scratch<T>& own = scratch();
    const TileView<T>& view = work_.views[tile];
    std::int64_t heavies = 0;
    for_each_entry(tile, block, [&](const Entry& entry) {
      if (heavy(entry)) {
        own.rows[heavies] = entry.neuron;
        own.entry[heavies++] = &entry - view.entries;
      } else {
        light_coefficients(tile, entry);
      }
    });
    work_.heavy_before[tile * size_.blocks + block] = heavies;

    const Rows<T> weights{down_, size_.hidden, own.rows};
    const T* panel = work_.dy_panel + tile * size_.tile_tokens * padded(size_.hidden);
    for (std::int64_t first = 0; first < heavies; first += kProductRows) {
      const std::int64_t rows = std::min(kProductRows, heavies - first);
      kernels_.multiply(weights.from(first), rows, size_.hidden, panel, tile_size(tile),
                        own.product, kMaxTileTokens, false, nullptr);
      for (std::int64_t r = 0; r < rows; ++r) {
        const Entry& entry = view.entries[own.entry[first + r]];
        const Acc<T>* dh = own.product + r * kMaxTileTokens;
        std::int64_t value = entry.first_value;
        entry.tokens.for_each([&](int t) { set_coefficients(tile, value++, dh[t]); });
      }
    }
  }

  void light_coefficients(std::int64_t tile, const Entry& entry) {
    std::int32_t tokens[kMaxTileTokens];
    Acc<T> dh[kMaxTileTokens];
    int count = 0;
    entry.tokens.for_each([&](int t) { tokens[count++] = t; });
    const Rows<T> dy{chunk_rows(dy_)[tile * size_.tile_tokens], size_.hidden, tokens};
    const Rows<T> weight{down_ + entry.neuron * size_.hidden, size_.hidden};
    kernels_.dots(weight, 1, dy, count, size_.hidden, dh, kMaxTileTokens);
    for (int i = 0; i < count; ++i) set_coefficients(tile, entry.first_value + i, dh[i]);
  }

  void set_coefficients(std::int64_t tile, std::int64_t value, Acc<T> dh) {
    const TileView<T>& view = work_.views[tile];
    const Acc<T> g = widen(view.gate[value]);
    const Acc<T> u = size_.gated ? widen(view.up[value]) : Acc<T>(1);
    const T h = narrow<T>(g * u);
    dh += grad_l1_ * static_cast<Acc<T>>((widen(h) > 0) - (widen(h) < 0));
    tile_values(work_.h, tile)[value] = h;
    tile_values(work_.projection[0].values, tile)[value] = g <= 0 ? T{} : narrow<T>(dh * u);
    if (size_.gated) tile_values(work_.projection[1].values, tile)[value] = narrow<T>(dh * g);
  }

  // ---- 3. gather

  void place_heavy() {
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      std::int64_t heavies = 0;
      for (std::int64_t block = 0; block < size_.blocks; ++block) {
        std::int64_t& before = work_.heavy_before[tile * size_.blocks + block];
        heavies += std::exchange(before, heavies);
      }
      work_.views[tile].heavy = heavies;
      if (heavies % 2 == 0) continue;
      for (int p = 0; p < size_.projections; ++p) {  // a bf16 panel takes neurons in pairs
        T* row = heavy_rows(p, tile) + heavies;
        for (std::int64_t t = 0; t < tile_size(tile); ++t) row[t * size_.heavy_stride] = T{};
      }
    }
  }

  T* heavy_rows(int projection, std::int64_t tile) const {
    return work_.projection[projection].heavy + tile * size_.tile_tokens * size_.heavy_stride;
  }

  void gather_heavy(std::int64_t tile, std::int64_t block) {
    std::int64_t column = work_.heavy_before[tile * size_.blocks + block];
    for_each_entry(tile, block, [&](const Entry& entry) {
      if (!heavy(entry)) return;
      work_.heavy_neurons[tile * size_.heavy_stride + column] = entry.neuron;
      for (int p = 0; p < size_.projections; ++p) {
        const T* value = tile_values(work_.projection[p].values, tile) + entry.first_value;
        T* out = heavy_rows(p, tile) + column;
        for (std::int64_t t = 0; t < tile_size(tile); ++t, out += size_.heavy_stride) {
          *out = entry.tokens[static_cast<int>(t)] ? *value++ : T{};
        }
      }
      ++column;
    });
  }

  // The light entries of a tile, token by token.
  void list_light(std::int64_t tile) {
    std::int64_t* start = work_.light_start + tile * (size_.tile_tokens + 1);
    std::int32_t* neurons = work_.light_neurons + tile * size_.neurons;
    std::int32_t* index = work_.light_index + tile * size_.light_capacity;
    std::fill_n(start, size_.tile_tokens + 1, 0);
    std::int32_t light = 0;
    for_each_light(tile, [&](const Entry& entry) {
      entry.tokens.for_each([&](int t) { ++start[t + 1]; });
      neurons[light++] = entry.neuron;
    });
    work_.views[tile].light = light;
    std::int64_t next[kMaxTileTokens];
    for (std::int64_t t = 0; t < size_.tile_tokens; ++t) {
      next[t] = start[t];
      start[t + 1] += start[t];
    }
    light = 0;
    for_each_light(tile, [&](const Entry& entry) {
      std::int64_t value = entry.first_value;
      entry.tokens.for_each([&](int t) {
        const std::int64_t to = next[t]++;
        index[to] = light;
        for (int p = 0; p < size_.projections; ++p) {
          const Coefficients<T>& c = work_.projection[p];
          c.light[tile * size_.light_capacity + to] = tile_values(c.values, tile)[value];
        }
        ++value;
      });
      ++light;
    });
  }

  template <class Visit>
  void for_each_light(std::int64_t tile, Visit&& visit) {
    for (std::int64_t block = 0; block < size_.blocks; ++block) {
      for_each_entry(tile, block, [&](const Entry& entry) {
        if (!heavy(entry)) visit(entry);
      });
    }
  }

  // ---- 4. dx

  void dx(std::int64_t tile, std::int64_t column) {
    const std::int64_t columns = std::min(kDxColumns, size_.hidden - column);
    const std::int64_t tokens = tile_size(tile);
    Scratch<T>& own = scratch();
    std::fill_n(own.dx, tokens * kDxColumns, Acc<T>(0));

    const std::int64_t heavies = work_.views[tile].heavy;
    for (int p = 0; p < size_.projections; ++p) {
      for (std::int64_t n = 0; n < heavies; n += kHeavyGroup) {
        const std::int64_t group = std::min(kHeavyGroup, heavies - n);
        const Rows<T> rows{weights_[p] + column, size_.hidden,
                           work_.heavy_neurons + tile * size_.heavy_stride + n};
        kernels_.pack(rows, group, columns, own.panel);
        kernels_.multiply({heavy_rows(p, tile) + n, size_.heavy_stride}, tokens, group, own.panel,
                          columns, own.dx, kDxColumns, true, nullptr);
      }
    }

    const std::int64_t* start = work_.light_start + tile * (size_.tile_tokens + 1);
    const std::int64_t light = tile * size_.light_capacity;
    for (int p = 0; p < size_.projections; ++p) {
      const Rows<T> rows{weights_[p] + column, size_.hidden,
                         work_.light_neurons + tile * size_.neurons};
      copy_rows(rows, work_.views[tile].light, columns, own.light_rows, kDxColumns);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const Rows<T> copied{own.light_rows, kDxColumns, work_.light_index + light + start[t]};
        kernels_.weighted_sum(copied, work_.projection[p].light + light + start[t],
                              start[t + 1] - start[t], columns, own.dx + t * kDxColumns);
      }
    }
    T* out = dx_ + (first_ + tile * size_.tile_tokens) * size_.hidden + column;
    for (std::int64_t t = 0; t < tokens; ++t) {
      kernels_.round(own.dx + t * kDxColumns, columns, out + t * size_.hidden);
    }
  }

  // Copies rows side by side: rows a power of two apart would share a few sets of the cache.
  static void copy_rows(Rows<T> rows, std::int64_t count, std::int64_t columns, T* to,
                        std::int64_t stride) {
    constexpr std::int64_t line = 64 / sizeof(T), ahead = 8;
    for (std::int64_t i = 0; i < count; ++i) {
      if (i + ahead < count) {
        const T* later = rows[i + ahead];
        for (std::int64_t k = 0; k < columns; k += line) __builtin_prefetch(later + k);
      }
      std::copy_n(rows[i], columns, to + i * stride);
    }
  }

  // ---- 5. weights

  // A neuron's share of the chunk's tokens is compared as its share of a tile's is.
  bool heavy_over_chunk(std::int64_t active) const {
    return active * size_.tile_tokens >= plan_.heavy_tokens * tokens_;
  }

  // The first entry of a tile with this neuron or a later one.
  std::int64_t find(std::int64_t tile, std::int64_t neuron) const {
    const TileView<T>& view = work_.views[tile];
    return std::lower_bound(view.entries, view.entries + view.count, neuron,
                            [](const Entry& e, std::int64_t n) { return e.neuron < n; }) -
           view.entries;
  }

  // The chunk's tokens for which each neuron of a block is active, and its coefficients in each
  // product, unless it is heavy.
  void list_neurons(std::int64_t block) {
    std::int64_t* cursor = scratch().cursor;  // per tile: the first entry not before the neuron
    const std::int64_t first = block * kProductRows;
    const std::int64_t last = std::min(first + kProductRows, size_.neurons);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) cursor[tile] = find(tile, first);
    std::int64_t to = first * size_.chunk_light;
    for (std::int64_t n = first; n < last; ++n) {
      NeuronList& list = work_.lists[n];
      list = {to, 0, false};
      for_each_tile_of(
          n, cursor, [&](std::int64_t, const Entry& entry) { list.count += entry.tokens.count(); });
      list.heavy = heavy_over_chunk(list.count);
      for_each_tile_of(n, cursor, [&](std::int64_t tile, const Entry& entry) {
        ++cursor[tile];
        if (list.heavy) return;
        for (int p = 0; p < products_; ++p) {
          std::copy_n(tile_values(product_[p].coefficients, tile) + entry.first_value,
                      entry.tokens.count(), work_.weights[p] + to);
        }
        entry.tokens.for_each([&](int t) {
          work_.tokens[to++] = static_cast<std::int32_t>(tile * size_.tile_tokens + t);
        });
      });
    }
  }

  template <class Visit>
  void for_each_tile_of(std::int64_t neuron, const std::int64_t* cursor, Visit&& visit) {
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      const TileView<T>& view = work_.views[tile];
      const Entry* entry = view.entries + cursor[tile];
      if (cursor[tile] != view.count && entry->neuron == neuron) visit(tile, *entry);
    }
  }

  // The gradients of all light neurons that come from `source`, for a few hidden columns.
  void light_weights(Source source, std::int64_t column) {
    Scratch<T>& own = scratch();
    const std::int64_t columns = std::min(size_.slab_columns, size_.hidden - column);
    const T* matrix = source == kX ? x_ : dy_;
    const Rows<T> rows{chunk_rows(matrix)[0] + column, size_.hidden};
    copy_rows(rows, tokens_, columns, own.slab, size_.slab_columns);
    for (std::int64_t n = 0; n < size_.neurons; ++n) {
      const NeuronList& list = work_.lists[n];
      if (list.heavy) continue;
      for (int p = 0; p < products_; ++p) {
        if (product_[p].source != source) continue;
        std::fill_n(own.sums, columns, Acc<T>(0));
        kernels_.weighted_sum({own.slab, size_.slab_columns, work_.tokens + list.first},
                              work_.weights[p] + list.first, list.count, columns, own.sums);
        finish(product_[p], n, column, columns, own.sums);
      }
    }
  }

  void list_chunk_heavy() {
    chunk_heavy_ = 0;
    for (std::int32_t n = 0; n < size_.neurons; ++n) {
      if (work_.lists[n].heavy) work_.chunk_heavy[chunk_heavy_++] = n;
    }
  }

  void pack_columns(std::int64_t column) {
    if (chunk_heavy_ == 0) return;
    const std::int64_t columns = std::min(kPanelColumns, size_.hidden - column);
    const auto pack = [&](const T* matrix, T* panel) {
      kernels_.pack({chunk_rows(matrix)[0] + column, size_.hidden}, tokens_, columns,
                    panel + column * padded(tokens_));
    };
    pack(x_, work_.x_rows);
    pack(dy_, work_.dy_rows);
  }

  void heavy_weights(const Product& product, std::int64_t group, std::int64_t column) {
    Scratch<T>& own = scratch();
    const std::int64_t rows = std::min(kProductRows, chunk_heavy_ - group);
    const std::int64_t columns = std::min(kWeightColumns, size_.hidden - column);
    const std::int64_t stride = size_.chunk_stride();
    const std::int32_t* neurons = work_.chunk_heavy + group;
    std::fill_n(own.dense, rows * stride, T{});
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      const TileView<T>& view = work_.views[tile];
      const T* values = tile_values(product.coefficients, tile);
      std::int64_t e = find(tile, neurons[0]);
      for (std::int64_t r = 0; r < rows; ++r) {
        while (e < view.count && view.entries[e].neuron < neurons[r]) ++e;
        if (e == view.count || view.entries[e].neuron != neurons[r]) continue;
        const T* value = values + view.entries[e].first_value;
        T* out = own.dense + r * stride + tile * size_.tile_tokens;
        view.entries[e].tokens.for_each([&](int t) { out[t] = *value++; });
      }
    }
    kernels_.multiply({own.dense, stride}, rows, tokens_, product.panel + column * padded(tokens_),
                      columns, own.sums, kWeightColumns, false, nullptr);
    for (std::int64_t r = 0; r < rows; ++r) {
      finish(product, neurons[r], column, columns, own.sums + r * kWeightColumns);
    }
  }

  // A chunk's share of a weight gradient's row.
  void finish(const Product& product, std::int64_t neuron, std::int64_t column,
              std::int64_t columns, Acc<T>* sums) {
    const std::int64_t at = neuron * size_.hidden + column;
    if (product.totals) {
      Acc<T>* total = product.totals + at;
      for (std::int64_t k = 0; k < columns; ++k)
        total[k] = first_ == 0 ? sums[k] : total[k] + sums[k];
      sums = total;
      if (first_ + tokens_ < plan_.problem.tokens) return;
    }
    T* grad = product.grad + at;
    if (accumulate_) {
      for (std::int64_t k = 0; k < columns; ++k) sums[k] += widen(grad[k]);
    }
    kernels_.round(sums, columns, grad);
  }

  const FfnPlan& plan_;
  const Sizes size_;
  const Kernels<T>& kernels_;
  const T* x_;
  const T* dy_;
  const T* down_;
  const T* weights_[2];  // of the projections that dg and du belong to
  T* dx_;
  const bool accumulate_;
  Acc<T> grad_l1_ = 0;
  Product product_[3];
  int products_ = 0;
  Workspace<T> work_;
  Saved<T> saved_;

  // The chunk in hand.
  std::int64_t first_ = 0;
  std::int64_t tokens_ = 0;
  std::int64_t tiles_ = 0;
  std::int64_t chunk_heavy_ = 0;
};

}  // namespace

std::size_t backward_workspace_bytes(const FfnPlan& plan) {
  return with_type(plan.problem.dtype, [&]<class T>() {
    Carver carver;
    Workspace<T>::carve(plan, carver);
    return carver.used();
  });
}

Status backward(const FfnPlan& plan, const FfnBackwardArgs& args) {
  with_type(plan.problem.dtype, [&]<class T>() { Backward<T>(plan, args).run(); });
  return {};
}

}  // namespace twell::cpu
