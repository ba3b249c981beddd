#pragma once
// What the CPU forward keeps for the backward in FfnPlan::saved_bytes: per token tile, the active
// neurons with their tokens, and g and u at the active places only. The capacity is the worst case
// (100% active), but only what is filled is ever touched.

#include <cstddef>
#include <cstdint>

#include "cpu/carver.h"
#include "cpu/kernels.h"
#include "twell/ffn.h"

namespace twell::cpu {

// A neuron of a tile with at least one active token. Its values are consecutive, one per active
// token, tokens ascending, from `first_value` relative to the tile's own first value.
struct Entry {
  std::int32_t neuron;
  std::uint32_t first_value;
  TokenMask tokens;  // bit t: token first_token_of_tile + t
};

// Neurons ascend within a tile.
struct SavedTile {
  std::int64_t first_entry;
  std::int64_t entries;
  std::int64_t first_value;
  std::int64_t values;
};

constexpr std::int64_t tile_count(const FfnPlan& plan) {
  return (plan.problem.tokens + plan.tile_tokens - 1) / plan.tile_tokens;
}

template <class T>
struct Saved {
  SavedTile* tiles = nullptr;  // [tile_count]
  Entry* entries = nullptr;    // all tiles' entries, consecutive
  T* gate = nullptr;           // g (plain: h); all tiles' values, consecutive
  T* up = nullptr;             // u rounded to T; null for a plain block

  // Lays the arrays out in `base` (null: only to measure).
  static Saved carve(const FfnPlan& plan, Carver& carver) {
    const std::int64_t tiles = tile_count(plan);
    const std::int64_t entries = tiles * plan.problem.neurons;
    const std::int64_t values = plan.problem.tokens * plan.problem.neurons;
    Saved saved;
    saved.tiles = carver.take<SavedTile>(tiles);
    saved.entries = carver.take<Entry>(entries);
    saved.gate = carver.take<T>(values);
    if (plan.problem.kind == FfnKind::kGated) saved.up = carver.take<T>(values);
    return saved;
  }
};

}  // namespace twell::cpu
