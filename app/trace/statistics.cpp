#include "app/trace/statistics.h"

#include <algorithm>
#include <bit>
#include <iterator>

#include "twell/format.h"

namespace twell::app {
namespace {

// The mean over tiles of `tile_tokens` tokens of the number of neurons active in the tile.
double mean_union(const Trace& trace, std::int64_t tile_tokens) {
  tile_tokens = std::min(tile_tokens, trace.tokens());
  if (tile_tokens == 0) return 0;
  const std::int64_t tiles = trace.tokens() / tile_tokens;
  std::vector<std::int64_t> last_tile(trace.neurons, -1);  // the last tile that saw the neuron
  std::int64_t sum = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    for (std::int64_t token = tile * tile_tokens; token < (tile + 1) * tile_tokens; ++token) {
      for (const std::uint16_t neuron : trace.row(token)) {
        sum += last_tile[neuron] != tile;
        last_tile[neuron] = tile;
      }
    }
  }
  return static_cast<double>(sum) / static_cast<double>(tiles);
}

}  // namespace

TraceStatistics trace_statistics(const Trace& trace) {
  TraceStatistics s;
  for (const int slots : kSlotChoices) s.overflow_by_slots[slots] = 0;
  const std::int64_t tiles = (trace.neurons + kTwellTileColumns - 1) / kTwellTileColumns;
  s.tile_rows = trace.tokens() * tiles;

  std::vector<std::int64_t> counts(trace.tokens());
  std::vector<std::int64_t> in_tile(tiles);
  for (std::int64_t token = 0; token < trace.tokens(); ++token) {
    const auto row = trace.row(token);
    counts[token] = static_cast<std::int64_t>(row.size());
    const std::size_t bucket = std::bit_width(row.size());
    s.active_histogram.resize(std::max(s.active_histogram.size(), bucket + 1));
    ++s.active_histogram[bucket];
    std::fill(in_tile.begin(), in_tile.end(), 0);
    for (const std::uint16_t neuron : row) ++in_tile[neuron / kTwellTileColumns];
    for (const std::int64_t count : in_tile) {
      s.max_in_tile = std::max(s.max_in_tile, count);
      for (const int slots : kSlotChoices) s.overflow_by_slots[slots] += count > slots - 1;
    }
  }
  if (!counts.empty()) {
    std::sort(counts.begin(), counts.end());
    s.mean_active = static_cast<double>(trace.cols.size()) / static_cast<double>(counts.size());
    s.p99_active = counts[(counts.size() - 1) * 99 / 100];
    s.max_active = counts.back();
  }
  for (const int tokens : kUnionTokens) s.union_by_tokens[tokens] = mean_union(trace, tokens);

  s.rate_histogram.resize(std::size(kRateEdges) + 2);
  for (const float rate : trace.rate) {
    const auto edge = std::upper_bound(std::begin(kRateEdges), std::end(kRateEdges), rate);
    ++s.rate_histogram[rate == 0 ? 0 : edge - std::begin(kRateEdges) + 1];
  }
  s.silent = s.rate_histogram[0];
  return s;
}

}  // namespace twell::app
