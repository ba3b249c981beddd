#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "app/trace/trace.h"

namespace twell::app {

// Where a layer is sparse. "Active" is the number of active neurons of one token.
struct TraceStatistics {
  double mean_active = 0;
  std::int64_t p99_active = 0;  // element ⌊0.99 (tokens - 1)⌋ of the sorted counts
  std::int64_t max_active = 0;
  std::int64_t silent = 0;       // neurons whose rate is 0
  std::int64_t tile_rows = 0;    // (token, tile of 256 neurons) pairs
  std::int64_t max_in_tile = 0;  // active neurons of one such pair

  // Tile rows with more active neurons than a TwELL tile of `slots` words can hold.
  std::map<int, std::int64_t> overflow_by_slots;
  // Mean number of distinct active neurons in consecutive tiles of so many tokens (whole tiles
  // only; of all tokens, if there are fewer).
  std::map<int, double> union_by_tokens;
  // Tokens by active neurons: bucket b counts those with 2^(b-1) ≤ active < 2^b; bucket 0 those
  // with none.
  std::vector<std::int64_t> active_histogram;
  // Neurons by firing rate: silent, below 1e-4, 1e-3, 1e-2, 1e-1, 0.5, and up to 1.
  std::vector<std::int64_t> rate_histogram;

  std::int64_t overflow(int slots) const { return overflow_by_slots.at(slots); }
  double mean_union(int tokens) const { return union_by_tokens.at(tokens); }
};

inline constexpr int kSlotChoices[] = {8, 16, 32, 64, 128};
inline constexpr int kUnionTokens[] = {64, 128, 256};
inline constexpr double kRateEdges[] = {1e-4, 1e-3, 1e-2, 1e-1, 0.5};

TraceStatistics trace_statistics(const Trace& trace);

}  // namespace twell::app
