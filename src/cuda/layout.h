#pragma once
// How the CUDA kernels cut their work, and how large its intermediates are. Host code without a
// CUDA header, shared by the planner and the kernels.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "twell/ffn.h"

namespace twell::cuda {

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline constexpr int kTileTokens = 128;    // tokens that share one union
inline constexpr int kHalfTokens = 64;     // tokens of one warpgroup's products
inline constexpr int kBlockNeurons = 256;  // neurons of one piece of gate work
inline constexpr int kMaskWords = kBlockNeurons / 32;
inline constexpr int kColumnWords = kHalfTokens / 2;
inline constexpr int kUnionStep = 64;         // unions are padded to a multiple of this
inline constexpr int kUnionItem = 256;        // union positions of the largest piece of up work
inline constexpr int kDownOutputs = 256;      // of the largest piece of down work
inline constexpr int kMaxForwardTiles = 272;  // of a chunk: the more, the less its last waves cost
inline constexpr int kScheduleHeader = 20;    // bytes before the pieces of up work
inline constexpr int kStatsParts = 4;         // of a tile, whose Σ |h| are summed apart

// Of the backward. A chunk's masks and unions are made at once; its columns of dg, du and h in
// rounds, each of as many tiles as there is room for. With every neuron in their unions that is
// kArenaShare of the chunk's tiles, and at least kMinRoundTiles; of the traces' layers 4 to 46% of
// the neurons are.
inline constexpr int kMaxBackwardTiles = 256;
inline constexpr int kMaxChunkTiles = std::max(kMaxForwardTiles, kMaxBackwardTiles);
inline constexpr int kMaxRowTiles = 64;  // where tokens of lists have rows (NeuronRows)
inline constexpr double kArenaShare = 0.26;
inline constexpr std::int64_t kMinRoundTiles = 32;
inline constexpr int kRowNeurons = 64;   // neurons that share a list of tokens
inline constexpr int kGroupBlocks = 32;  // lists of tokens that exist at once
// On Hopper: room for the coefficients of one in so many (token, neuron) pairs of a pass, and at
// most for as many as a list's row can address.
inline constexpr std::int64_t kEntryShare = 32;
inline constexpr std::int64_t kMaxEntries = (std::int64_t{1} << 25) - 1;

// Room for the columns of g and u that the forward keeps for the backward: as if the steps of every
// half (HalfColumns) had this share of all neurons. Tiles for which it is too little are computed
// anew.
inline constexpr double kSavedShare = 0.14;

// Sizes of what token_lists.h declares.
inline constexpr std::int64_t kListStateBytes = 12;
inline constexpr std::int64_t kListShareBytes = 8;
inline constexpr std::int64_t kActiveTokensBytes = 8;
inline constexpr std::int64_t kListPartBytes = 12;
inline constexpr std::int64_t kListRowBytes = 8;
inline constexpr std::int64_t kListEntryBytes = 8;

// And of what forward.h does.
inline constexpr std::int64_t kWordPositionsBytes = 6;
inline constexpr std::int64_t kHalfColumnsBytes = 8;

// Hopper's own instructions exist on no other GPU, older or newer. There unions are ordered by
// which half uses a neuron (HalfColumns), and the weights' gradients are made by lists of tokens
// that grow over the whole pass (token_lists.h) instead of rows of coefficients of a group of
// blocks (NeuronRows).
inline bool is_hopper(const Device& device) { return device.compute_capability / 10 == 9; }

// On Hopper, the pieces of work are smaller where there are few tiles, so that more multiprocessors
// take part and each has more loads on their way.
inline constexpr int kSmallRegion = 128;     // neurons of gate work, whose columns lie side by side
inline constexpr int kSmallItem = 128;       // union positions of up work
inline constexpr int kSmallestOutputs = 64;  // of down work; or twice as many
static_assert(4 * kSmallestOutputs == kDownOutputs);
inline constexpr double kSmallRegionTime = 0.6;  // of a region of kBlockNeurons

// How often each pair of multiprocessors takes a pair of tiles and a region of so many neurons.
constexpr std::int64_t gate_waves(std::int64_t tiles, std::int64_t neurons, int region,
                                  int multiprocessors) {
  const std::int64_t blocks = ceil_div<std::int64_t>(neurons, kBlockNeurons);
  const std::int64_t pieces = ceil_div<std::int64_t>(tiles, 2) * blocks * (kBlockNeurons / region);
  return ceil_div<std::int64_t>(pieces, std::max(2, multiprocessors) / 2);
}

constexpr int gate_region(std::int64_t tiles, std::int64_t neurons, int multiprocessors) {
  const auto waves = [&](int region) {
    return static_cast<double>(gate_waves(tiles, neurons, region, multiprocessors));
  };
  const bool small = waves(kSmallRegion) * kSmallRegionTime < waves(kBlockNeurons);
  return small ? kSmallRegion : kBlockNeurons;
}

// A union's steps are known to the device only; with 16 in each tile all multiprocessors have one.
constexpr int up_item(std::int64_t tiles, int multiprocessors) {
  return tiles * 16 <= multiprocessors ? kSmallItem : kUnionItem;
}

// The fewest outputs with which all pieces are worked on at once.
constexpr int down_outputs(std::int64_t tiles, std::int64_t hidden, int multiprocessors) {
  int outputs = kDownOutputs;
  while (outputs > kSmallestOutputs &&
         tiles * ceil_div<std::int64_t>(hidden, outputs / 2) <= multiprocessors) {
    outputs /= 2;
  }
  return outputs;
}

// Up to kMaxDecodeTokens tokens take the kernels that are bound by reading the weights.
inline constexpr int kMaxDecodeTokens = 64;
inline constexpr int kMaxDecodeGroup = 32;  // tokens whose products share the reads of the weights
inline constexpr int kMaxDecodeUnit = 48;   // neurons of one CTA

// Tokens of a group: 8, 16 or 32.
constexpr int decode_group(std::int64_t tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : 32; }

// Neurons of a unit, the work of one CTA: as many CTAs as multiprocessors, or a multiple of it.
constexpr int decode_unit(std::int64_t neurons, int multiprocessors) {
  const std::int64_t at_once = multiprocessors;
  const std::int64_t turns = ceil_div(neurons, at_once * kMaxDecodeUnit);
  return static_cast<int>(ceil_div(neurons, turns * at_once));
}

inline bool takes_decode_path(const FfnPlan& plan) { return plan.tile_tokens <= kMaxDecodeGroup; }

// Parts of a workspace: offsets in bytes, each 256-byte aligned.
class Parts {
 public:
  std::size_t take(std::int64_t bytes) {
    const std::size_t offset = bytes_;
    bytes_ += ceil_div<std::size_t>(static_cast<std::size_t>(bytes), 256) * 256;
    return offset;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

struct DecodeLayout {
  std::int64_t groups;  // of plan.tile_tokens tokens
  std::int64_t units;   // of plan.block_neurons neurons
  std::size_t masks, h, activity, partial_l1, bytes;

  explicit DecodeLayout(const FfnPlan& plan)
      : groups(ceil_div<std::int64_t>(plan.problem.tokens, plan.tile_tokens)),
        units(ceil_div<std::int64_t>(plan.problem.neurons, plan.block_neurons)) {
    Parts carve;
    masks = carve.take(groups * units * 8);
    h = carve.take(groups * plan.problem.neurons * plan.tile_tokens * 2);
    activity = carve.take(plan.problem.neurons * 4);
    partial_l1 = carve.take(groups * units * 4);
    bytes = carve.bytes();
  }
};

struct ForwardLayout {
  std::int64_t tiles = 0;     // of one chunk
  std::int64_t blocks = 0;    // of neurons
  std::int64_t capacity = 0;  // neurons rounded up to a multiple of kUnionStep

  std::size_t masks, columns, unions, counts, halves, h, order, schedule;
  std::size_t activity, partial_l1, bytes;

  explicit ForwardLayout(const FfnPlan& plan) {
    const std::int64_t all_tiles = ceil_div<std::int64_t>(plan.problem.tokens, kTileTokens);
    tiles = std::min<std::int64_t>(all_tiles, plan.chunk_tokens / kTileTokens);
    blocks = ceil_div<std::int64_t>(plan.problem.neurons, kBlockNeurons);
    capacity = ceil_div<std::int64_t>(plan.problem.neurons, kUnionStep) * kUnionStep;
    constexpr std::int64_t kColumnBytes = kColumnWords * 4;
    Parts carve;
    masks = carve.take(2 * tiles * blocks * kMaskWords * 4);
    columns = carve.take(2 * tiles * blocks * kBlockNeurons * kColumnBytes);
    unions = carve.take(tiles * capacity * 8);
    counts = carve.take(tiles * 4);
    halves = carve.take(2 * tiles * kHalfColumnsBytes);
    h = carve.take(2 * tiles * capacity * kColumnBytes);
    order = carve.take(tiles * 4);
    schedule = carve.take(kScheduleHeader + tiles * capacity / kUnionStep * 4);
    activity = carve.take(plan.problem.neurons * 4);
    partial_l1 = carve.take(all_tiles * kStatsParts * 4);
    bytes = carve.bytes();
  }
};

// What the forward keeps for the backward: which columns of each half tile are in use, how many
// (token, neuron) pairs are active, and g and u of the tiles that find room in what is left of
// plan.saved_bytes.
struct SavedLayout {
  std::int64_t half_words;     // 32-bit words of a half tile's masks
  std::int64_t positions = 0;  // of unions: columns of both halves, of g and of u
  std::size_t masks = 0, active, taken, places, g, u;

  explicit SavedLayout(const FfnPlan& plan) : SavedLayout(plan.problem) {
    if (plan.saved_bytes > g) positions = whole_steps((plan.saved_bytes - g) / position_bytes_);
    u = g + static_cast<std::size_t>(positions) * kPositionBytes;
  }

  // A plan's saved_bytes, with room for `share` of the columns that there can be.
  static std::size_t bytes(const FfnProblem& problem, double share) {
    const SavedLayout layout(problem);
    const std::int64_t tiles = ceil_div<std::int64_t>(problem.tokens, kTileTokens);
    const auto wanted = static_cast<double>(tiles * problem.neurons) * share;
    const std::int64_t positions = whole_steps(static_cast<std::size_t>(wanted));
    return layout.g + static_cast<std::size_t>(positions) * layout.position_bytes_;
  }

 private:
  static constexpr std::size_t kPositionBytes = 2 * kColumnWords * 4;  // of one matrix
  static constexpr std::size_t kMaxPositions = std::size_t{1} << 29;   // its columns have 31 bits
  std::size_t position_bytes_;

  explicit SavedLayout(const FfnProblem& problem)
      : half_words(ceil_div<std::int64_t>(problem.neurons, kBlockNeurons) * kMaskWords),
        position_bytes_((problem.kind == FfnKind::kGated ? 2 : 1) * kPositionBytes) {
    const std::int64_t tiles = ceil_div<std::int64_t>(problem.tokens, kTileTokens);
    Parts carve;
    masks = carve.take(2 * tiles * half_words * 4);
    active = carve.take(8);
    taken = carve.take(4);
    places = carve.take(tiles * 4);
    g = u = carve.bytes();
  }

  static std::int64_t whole_steps(std::size_t positions) {
    return static_cast<std::int64_t>(std::min(positions, kMaxPositions) / kUnionStep * kUnionStep);
  }
};

struct BackwardLayout {
  std::int64_t chunks = 0;
  std::int64_t tiles = 0;      // of one chunk
  std::int64_t rounds = 0;     // of one chunk, at most
  std::int64_t capacity = 0;   // as the forward's
  std::int64_t positions = 0;  // of unions: columns of both halves, of dg, du and h
  std::int64_t groups = 0;     // of blocks of kRowNeurons
  std::int64_t blocks = 0;     // of a group
  std::int64_t rows = 0;       // of a list of tokens
  std::int64_t entries = 0;    // of all lists

  std::size_t masks, nonfinite, places, unions, counts, halves, order;
  std::size_t schedules, schedule_bytes;  // of one round
  std::size_t coefficients[3];            // dg, du, h
  std::size_t lists, token_counts, list_rows;
  std::size_t tokens, projection_rows, hidden_rows;  // NeuronRows
  std::size_t list_zeros, list_zero_bytes;           // TokenLists: what begins as 0
  std::size_t list_state, list_shares, activity, silent_nans;
  std::size_t first_rows, first_entries, list_order, list_entries;
  std::size_t word_positions, list_neurons, list_positions, active;
  std::size_t totals[3];  // of the gradients of G, U, D; TokenLists: their lower bits
  std::size_t bytes = 0;

  explicit BackwardLayout(const FfnPlan& plan) {
    const FfnProblem& problem = plan.problem;
    const bool has_lists = is_hopper(plan.device);
    const std::int64_t inputs = problem.kind == FfnKind::kGated ? 2 : 1;  // projections of x
    const std::int64_t half_words = SavedLayout(plan).half_words;
    const std::int64_t all_tiles = ceil_div<std::int64_t>(problem.tokens, kTileTokens);
    chunks = ceil_div<std::int64_t>(all_tiles, has_lists ? kMaxBackwardTiles : kMaxRowTiles);
    tiles = chunks > 0 ? ceil_div(all_tiles, chunks) : 0;
    capacity = ceil_div<std::int64_t>(problem.neurons, kUnionStep) * kUnionStep;
    const std::int64_t fewest =  // of a round, and no more than of a forward's chunk
        std::min({tiles,
                  std::max(kMinRoundTiles,
                           static_cast<std::int64_t>(static_cast<double>(tiles) * kArenaShare)),
                  plan.chunk_tokens / kTileTokens});
    rounds = tiles > 0 ? ceil_div(tiles, fewest) : 0;
    positions = fewest * capacity;
    const std::int64_t all_blocks = ceil_div<std::int64_t>(problem.neurons, kRowNeurons);
    groups = ceil_div<std::int64_t>(all_blocks, kGroupBlocks);
    blocks = ceil_div(all_blocks, groups);

    constexpr std::int64_t kColumnBytes = kColumnWords * 4;
    Parts carve;
    masks = carve.take(2 * tiles * half_words * 4);
    nonfinite = carve.take(2 * tiles * 8);
    places = carve.take(2 * tiles * 4);
    unions = carve.take(tiles * capacity * 8);
    counts = carve.take(tiles * 4);
    halves = carve.take(2 * tiles * kHalfColumnsBytes);
    order = carve.take(tiles * 4);
    // A step of a union has columns of one half at least.
    schedule_bytes = static_cast<std::size_t>(kScheduleHeader + 2 * positions / kUnionStep * 4);
    schedules = carve.take(rounds * static_cast<std::int64_t>(schedule_bytes));
    for (const int i : {0, 1, 2}) {
      const bool exists = i != 1 || inputs == 2;
      coefficients[i] = carve.take(exists ? 2 * positions * kColumnBytes : 0);
    }
    std::int64_t total_bytes = 4;
    if (has_lists) {
      groups = 1;
      blocks = all_blocks;
      rows = all_tiles * kTileTokens;
      entries = std::min(ceil_div(problem.tokens * problem.neurons, kEntryShare), kMaxEntries);
      total_bytes = 1;
      list_zeros = carve.bytes();
      list_state = carve.take(kListStateBytes);
      list_shares = carve.take(blocks * kListShareBytes);
      token_counts = carve.take(blocks * 4);
      activity = carve.take(problem.neurons * 4);
      silent_nans = carve.take(problem.neurons * 4);
      list_zero_bytes = carve.bytes() - list_zeros;
      first_rows = carve.take(blocks * 4);
      first_entries = carve.take(blocks * 4);
      list_order = carve.take(blocks * 4);
      list_neurons = carve.take(blocks * kRowNeurons * 4);
      word_positions = carve.take(tiles * half_words * kWordPositionsBytes);
      list_positions = carve.take(tiles * blocks * kRowNeurons * 4);
      active = carve.take(2 * positions * kActiveTokensBytes);
      lists = carve.take(blocks * 2 * tiles * kListPartBytes);
      Parts instead = carve;  // of the totals: a pass has either
      list_rows = instead.take(blocks * rows * kListRowBytes);
      list_entries = instead.take(entries * kListEntryBytes);
      bytes = instead.bytes();
    } else {
      rows = tiles * kTileTokens;
      lists = carve.take(blocks * 2 * tiles * 16);
      tokens = carve.take(blocks * rows * 4);
      token_counts = carve.take(blocks * 4);
      projection_rows = carve.take(blocks * rows * inputs * kRowNeurons * 2);
      hidden_rows = carve.take(blocks * rows * kRowNeurons * 2);
    }
    const bool has_totals = chunks * rounds > 1 || has_lists;
    for (const int i : {0, 1, 2}) {
      const bool exists = has_totals && (i != 0 || inputs == 2);
      totals[i] = carve.take(exists ? problem.neurons * problem.hidden * total_bytes : 0);
    }
    bytes = std::max(bytes, carve.bytes());
  }
};

}  // namespace twell::cuda
