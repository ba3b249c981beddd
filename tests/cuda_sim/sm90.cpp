// Hopper's own kernels are not simulated. The products of all other GPUs stand in for its products
// over unions, and plain loops for its gradients of the weights, so that all that lies between them
// is tested: the rounds, the lists, and when a pass is dense.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/sm80/products.h"
#include "cuda/sm90/products.h"
#include "twell/ffn.h"

namespace twell::cuda::sm90 {
namespace {

constexpr int kStep = 64;  // tokens of a stage of the kernel

// A gradient [neurons, hidden], what its coefficients go with, and which they are: dg, du, h.
struct Matrix {
  std::uint16_t* grad;
  std::uint8_t* low;
  const bf16* source;
  int coefficient;
  std::uint32_t nans;
};

std::vector<Matrix> matrices_of(const BackwardChunk& chunk, const WeightGradients& gradients,
                                const void* x, const void* dy) {
  const auto matrix = [&](void* grad, int low, const void* source, int coefficient,
                          std::uint32_t nans) {
    return Matrix{static_cast<std::uint16_t*>(grad), gradients.low[low],
                  static_cast<const bf16*>(source), coefficient, nans};
  };
  const Matrix down = matrix(gradients.down, 2, dy, 2, TokenLists::kNanH);
  if (!chunk.du) return {matrix(gradients.up, 1, x, 0, 0), down};
  return {matrix(gradients.gate, 0, x, 0, 0), matrix(gradients.up, 1, x, 1, TokenLists::kNanDu),
          down};
}

float value_of(std::uint32_t bits) { return to_float(bf16{static_cast<std::uint16_t>(bits)}); }

// What a stage holds: coefficients by token and neuron, and the tokens; negative: zeros.
struct Stage {
  float coefficients[3][kStep][kRowNeurons] = {};
  std::int64_t tokens[kStep];
};

// sums [64, hidden] += coefficientsᵀ source.
void multiply(std::vector<float>& sums, const Stage& stage, const Matrix& matrix, int hidden) {
  for (int t = 0; t < kStep; ++t) {
    if (stage.tokens[t] < 0) continue;
    const bf16* source = matrix.source + stage.tokens[t] * hidden;
    for (int n = 0; n < kRowNeurons; ++n) {
      const float coefficient = stage.coefficients[matrix.coefficient][t][n];
      for (int k = 0; k < hidden; ++k) sums[n * hidden + k] += coefficient * to_float(source[k]);
    }
  }
}

// From a pass's sums of a block.
template <class Make>
void for_each_element(const TokenLists& lists, int block, int hidden, Make&& make) {
  for (int n = 0; n < kRowNeurons; ++n) {
    const int neuron = lists.neurons[block * kRowNeurons + n];
    for (int k = 0; neuron >= 0 && k < hidden; ++k) {
      make(n * hidden + k, static_cast<std::int64_t>(neuron) * hidden + k, neuron);
    }
  }
}

// What a sum is added to: the sums kept so far, or what the gradient holds.
float start(const Matrix& matrix, std::int64_t at, bool has_kept, bool accumulate) {
  if (!has_kept && !accumulate) return 0;
  std::uint32_t bits = static_cast<std::uint32_t>(matrix.grad[at]) << 16;
  if (has_kept) bits |= static_cast<std::uint32_t>(matrix.low[at]) << 8;
  return __builtin_bit_cast(float, bits);
}

Stage stage_of(const TokenLists& lists, const ListRow* rows) {
  constexpr int kWarpRows = 16;  // whose entries lie side by side
  Stage stage;
  for (int t = 0; t < kStep; ++t) {
    const std::uint32_t token = rows[t].token;
    stage.tokens[t] = token == ListRow::kNoToken ? -1 : std::int64_t{token};
  }
  for (int first = 0; first < kStep; first += kWarpRows) {
    const int end = rows[first + kWarpRows - 1].end();
    if (end > lists.entry_capacity) std::abort();
    for (int i = rows[first].first(); i < end; ++i) {
      const ListEntry entry = lists.entries[i];
      const auto row = static_cast<int>(entry.row());
      if (row < first || row >= first + kWarpRows) std::abort();
      stage.coefficients[0][row][entry.neuron()] = value_of(entry.place_dg >> 16);
      stage.coefficients[1][row][entry.neuron()] = value_of(entry.du_h & 0xffffu);
      stage.coefficients[2][row][entry.neuron()] = value_of(entry.du_h >> 16);
    }
  }
  return stage;
}

Stage stage_of(const BackwardChunk& chunk, const TokenLists& lists, int block, int half_tile) {
  const std::uint32_t* const columns[3] = {chunk.dg, chunk.du, chunk.h};
  const std::int32_t* positions =
      lists.positions + (half_tile / 2 * lists.blocks + block) * kRowNeurons;
  const HalfColumns half = chunk.forward.halves[half_tile];
  Stage stage;
  for (int t = 0; t < kHalfTokens; ++t) {
    const int token = half_tile * kHalfTokens + t;
    stage.tokens[t] = token < chunk.forward.tokens ? token : -1;
    for (int n = 0; n < kRowNeurons; ++n) {
      if (!half.has(positions[n])) continue;
      const std::int64_t column = half.base + positions[n];
      for (int c = 0; c < 3; ++c) {
        if (!columns[c]) continue;
        const std::uint32_t word = columns[c][column * kColumnWords + t / 16 * 8 + t % 8];
        stage.coefficients[c][t][n] = value_of(t % 16 < 8 ? word & 0xffffu : word >> 16);
      }
    }
  }
  return stage;
}

// The columns of all positions of the unions for both halves, which the stand-ins work on, where
// Hopper's kernels have those of each half's steps only. What these do not have begins as 0.
class AllColumns {
 public:
  AllColumns(const ForwardChunk& chunk, int first_tile, int tiles)
      : own_(chunk.halves, chunk.halves + 2 * chunk.tiles), all_(own_) {
    for (int half = 2 * first_tile; half < 2 * (first_tile + tiles); ++half) {
      const int steps = ceil_div(chunk.counts[half / 2], kUnionStep);
      all_[half] = {static_cast<std::int32_t>(words_ / kColumnWords), 0,
                    static_cast<std::uint16_t>(steps)};
      words_ += static_cast<std::size_t>(steps) * kUnionStep * kColumnWords;
      halves_.push_back(half);
    }
  }

  HalfColumns* halves() { return all_.data(); }
  std::vector<std::uint32_t> make() const { return std::vector<std::uint32_t>(words_); }
  void take(std::vector<std::uint32_t>& all, const std::uint32_t* own) const {
    for_each([&](std::int64_t to, std::int64_t from) { all[to] = own[from]; });
  }
  void give(const std::vector<std::uint32_t>& all, std::uint32_t* own) const {
    for_each([&](std::int64_t from, std::int64_t to) { own[to] = all[from]; });
  }
  // Of kept columns, of the tiles that have a place, from which half 0's lie as in h.
  template <class Place, class Move>
  void for_each_kept(Place&& place, Move&& move) const {
    for (const int half : halves_) {
      const int first = place(half / 2);
      if (first < 0) continue;
      const std::int64_t kept = first + own_[half].base - own_[half / 2 * 2].base;
      words_of(half, kept, move);
    }
  }

 private:
  template <class Move>
  void for_each(Move&& move) const {
    for (const int half : halves_) words_of(half, own_[half].base, move);
  }
  template <class Move>
  void words_of(int half, std::int64_t base, Move&& move) const {
    for (int i = own_[half].first * kUnionStep; i < own_[half].end * kUnionStep; ++i) {
      for (int w = 0; w < kColumnWords; ++w) {
        move((all_[half].base + i) * std::int64_t{kColumnWords} + w, (base + i) * kColumnWords + w);
      }
    }
  }

  const std::vector<HalfColumns> own_;
  std::vector<HalfColumns> all_;
  std::vector<int> halves_;
  std::size_t words_ = 0;
};

AllColumns all_columns(const ForwardChunk& chunk) {
  return {chunk, chunk.schedule->first_tile, chunk.schedule->tiles};
}

// Moves the columns of each block's second region, which lie behind the first one's, to their
// place.
void part_regions(const ForwardChunk& chunk) {
  for (int place = 0; place < 2 * chunk.tiles * chunk.blocks; ++place) {
    int counts[2] = {};
    for (int word = 0; word < kMaskWords; ++word) {
      counts[word / (kSmallRegion / 32)] += std::popcount(chunk.masks[place * kMaskWords + word]);
    }
    std::uint32_t* second =
        chunk.columns + (std::int64_t{place} * kBlockNeurons + counts[0]) * kColumnWords;
    std::memmove(second + (kSmallRegion - counts[0]) * kColumnWords, second,
                 counts[1] * kColumnWords * sizeof(std::uint32_t));
  }
}

}  // namespace

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream) {
  Status status = sm80::launch_gate(chunk, x, gate, multiprocessors, stream);
  if (status.ok() && chunk.region == kSmallRegion) part_regions(chunk);
  return status;
}

Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream) {
  AllColumns all = all_columns(chunk);
  std::vector<std::uint32_t> h = all.make(), g = all.make(), u = all.make();
  std::vector<std::int32_t> places(chunk.tiles);
  for (int tile = 0; tile < chunk.tiles; ++tile) {
    places[tile] = chunk.place(tile) < 0 ? -1 : all.halves()[2 * tile].base;
  }
  ForwardChunk with_all = chunk;
  with_all.halves = all.halves();
  with_all.h = h.data();
  with_all.saved.g = g.data();
  with_all.saved.u = u.data();
  if (chunk.saved.places) with_all.saved.places = places.data();
  Status status = sm80::launch_up(with_all, x, up, multiprocessors, stream);
  all.give(h, chunk.h);
  all.for_each_kept([&](int tile) { return chunk.place(tile); },
                    [&](std::int64_t from, std::int64_t to) {
                      chunk.saved.g[to] = g[from];
                      chunk.saved.u[to] = u[from];
                    });
  if (!status.ok() || !chunk.saved.active) return status;
  for (int tile = 0; tile < chunk.tiles; ++tile) {
    for (int i = 0; i < chunk.counts[tile]; ++i) {
      const UnionEntry entry = chunk.unions[static_cast<std::int64_t>(tile) * chunk.capacity + i];
      for (const int half : {0, 1}) {
        if (!entry.in_half(half)) continue;
        const std::int64_t region = (2 * tile + half) * std::int64_t{chunk.blocks} * kBlockNeurons;
        const std::uint32_t* column = chunk.columns + (region + entry.source(half)) * kColumnWords;
        for (int w = 0; w < kColumnWords; ++w) {
          *chunk.saved.active += ((column[w] & 0x7fffu) != 0) + (column[w] >> 16 != 0);
        }
      }
    }
  }
  return status;
}

Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                   cudaStream_t stream) {
  AllColumns all = all_columns(chunk);
  std::vector<std::uint32_t> h = all.make();
  all.take(h, chunk.h);
  ForwardChunk with_all = chunk;
  with_all.halves = all.halves();
  with_all.h = h.data();
  return sm80::launch_down(with_all, down, y, multiprocessors, stream);
}

// The stand-in for the coefficients makes g and u anew itself.
Status launch_remake(const BackwardChunk&, const FfnWeights&, int, cudaStream_t) { return {}; }

// From the coefficients that the stand-in makes.
Status launch_coefficients(const BackwardChunk& chunk, const TokenLists& lists,
                           const FfnWeights& weights, int multiprocessors, cudaStream_t stream) {
  const ForwardChunk& forward = chunk.forward;
  const Schedule& round = *forward.schedule;
  AllColumns all = all_columns(forward);
  std::vector<std::uint32_t> dg = all.make(), du = all.make(), h = all.make();
  std::vector<std::uint32_t> g = all.make(), u = all.make();
  std::vector<std::int32_t> places(forward.half_places, forward.half_places + 2 * forward.tiles);
  for (int tile = round.first_tile; tile < round.first_tile + round.tiles; ++tile) {
    if (forward.kept_place(tile) < 0) continue;
    places[2 * tile] = places[2 * tile + 1] = all.halves()[2 * tile].base;
  }
  all.for_each_kept([&](int tile) { return forward.kept_place(tile); },
                    [&](std::int64_t to, std::int64_t from) {
                      g[to] = chunk.saved_g[from];
                      if (chunk.saved_u) u[to] = chunk.saved_u[from];
                    });
  BackwardChunk with_all = chunk;
  with_all.forward.halves = all.halves();
  with_all.forward.half_places = places.data();
  with_all.saved_g = g.data();
  with_all.saved_u = u.data();
  with_all.dg = dg.data();
  with_all.du = chunk.du ? du.data() : nullptr;
  with_all.h = h.data();
  Status status = sm80::launch_coefficients(with_all, lists, weights, multiprocessors, stream);
  all.give(dg, chunk.dg);
  if (chunk.du) all.give(du, chunk.du);
  all.give(h, chunk.h);
  for (int half = 2 * round.first_tile; half < 2 * (round.first_tile + round.tiles); ++half) {
    const int tile = half / 2;
    const HalfColumns own = forward.halves[half];
    const int end = std::min(forward.counts[tile], own.end * kUnionStep);
    for (int i = own.first * kUnionStep; i < end; ++i) {
      const std::int64_t column = own.base + i;
      const std::int64_t entry = static_cast<std::int64_t>(tile) * forward.capacity + i;
      ActiveTokens& active = lists.active[column] = {};
      for (int t = 0; t < kHalfTokens && half * kHalfTokens + t < forward.tokens; ++t) {
        const auto value = [&](const std::uint32_t* columns) {
          if (!columns) return 0.0f;
          const std::uint32_t word = columns[column * kColumnWords + t / 16 * 8 + t % 8];
          return value_of(t % 16 < 8 ? word & 0xffffu : word >> 16);
        };
        const float dg = value(chunk.dg), du = value(chunk.du), h = value(chunk.h);
        if (dg != 0 || (du != 0 && !std::isnan(du)) || (h != 0 && !std::isnan(h))) {
          active.words[t % 16 / 8] |= 1u << (t / 16 * 8 + t % 8);
          continue;
        }
        std::uint32_t& nans = lists.silent_nans[forward.unions[entry].row()];
        if (std::isnan(du)) nans |= TokenLists::kNanDu;
        if (std::isnan(h)) nans |= TokenLists::kNanH;
      }
    }
  }
  return status;
}

Status launch_input_gradient(const BackwardChunk& chunk, const FfnWeights& weights, void* dx,
                             int multiprocessors, cudaStream_t stream) {
  AllColumns all = all_columns(chunk.forward);
  std::vector<std::uint32_t> dg = all.make(), du = all.make();
  all.take(dg, chunk.dg);
  if (chunk.du) all.take(du, chunk.du);
  BackwardChunk with_all = chunk;
  with_all.forward.halves = all.halves();
  with_all.dg = dg.data();
  with_all.du = chunk.du ? du.data() : nullptr;
  return sm80::launch_input_gradient(with_all, weights, dx, multiprocessors, stream);
}

Status launch_dense_gradients(const BackwardChunk& chunk, const TokenLists& lists,
                              const WeightGradients& gradients, int, cudaStream_t) {
  const Schedule& round = *chunk.forward.schedule;
  if (!lists.dense() || round.tiles == 0) return {};
  const int hidden = chunk.forward.hidden;
  for (const Matrix& matrix : matrices_of(chunk, gradients, chunk.x, chunk.dy)) {
    for (int block = 0; matrix.grad && block < lists.blocks; ++block) {
      std::vector<float> sums(kRowNeurons * hidden);
      for (int half = 2 * round.first_tile; half < 2 * (round.first_tile + round.tiles); ++half) {
        const ListPart& part = lists.parts[block * 2 * chunk.forward.tiles + half];
        if ((part.tokens.words[0] | part.tokens.words[1]) == 0) continue;
        multiply(sums, stage_of(chunk, lists, block, half), matrix, hidden);
      }
      for_each_element(lists, block, hidden, [&](int i, std::int64_t at, int) {
        const float sum = sums[i] + start(matrix, at, !chunk.first, gradients.accumulate);
        auto bits = __builtin_bit_cast(std::uint32_t, sum);
        if (!std::isnan(sum)) bits += 0x7fu + (bits >> 8 & 1u);
        matrix.grad[at] = static_cast<std::uint16_t>(bits >> 16);
        matrix.low[at] = static_cast<std::uint8_t>(bits >> 8);
      });
    }
  }
  return {};
}

Status launch_list_gradients(const BackwardChunk& chunk, const TokenLists& lists, const void* x,
                             const void* dy, const WeightGradients& gradients, int, cudaStream_t) {
  const int hidden = chunk.forward.hidden;
  for (const Matrix& matrix : matrices_of(chunk, gradients, x, dy)) {
    for (int rank = 0; matrix.grad && rank < lists.blocks; ++rank) {
      const int block = lists.order[rank];
      const ListRow* rows = lists.rows + static_cast<std::int64_t>(block) * lists.capacity;
      std::vector<float> sums(kRowNeurons * hidden);
      for (int row = 0; row < lists.counts[block]; row += kStep) {
        multiply(sums, stage_of(lists, rows + row), matrix, hidden);
      }
      for_each_element(lists, block, hidden, [&](int i, std::int64_t at, int neuron) {
        float sum = sums[i] + start(matrix, at, lists.dense(), gradients.accumulate);
        if (lists.silent_nans[neuron] & matrix.nans) sum = __builtin_nanf("");
        matrix.grad[at] = to_bf16(sum).bits;
      });
    }
  }
  return {};
}

}  // namespace twell::cuda::sm90
