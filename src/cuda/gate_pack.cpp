#include "cuda/gate_pack.h"

#include <algorithm>
#include <utility>

#include "cuda/check.h"
#include "cuda/forward.h"

namespace twell::cuda {
namespace {

constexpr std::int64_t kChunkTiles = 128;  // small enough for the columns to stay in L2

struct PackLayout {
  std::int64_t tiles;
  std::int64_t blocks;
  std::size_t schedule = 0;
  std::size_t masks = 256;
  std::size_t columns;
  std::size_t bytes;

  explicit PackLayout(const TwellShape& shape)
      : tiles(std::min<std::int64_t>(kChunkTiles, ceil_div<std::int64_t>(shape.rows, kTileTokens))),
        blocks(ceil_div<std::int64_t>(shape.columns, kBlockNeurons)),
        columns(masks + 2 * tiles * ceil_div<std::int64_t>(blocks * kMaskWords * 4, 256) * 256),
        bytes(columns + 2 * tiles * blocks * kBlockNeurons * kColumnWords * 4) {}
};

}  // namespace

Result<std::size_t> gate_pack_workspace_bytes(const TwellShape& shape, const Device& device) {
  if (device.compute_capability < 80) {
    return Status(StatusCode::kUnsupported, "gate_pack: device.compute_capability is " +
                                                std::to_string(device.compute_capability) +
                                                "; permitted: 80 or newer");
  }
  return PackLayout(shape).bytes;
}

Status gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs& args) {
  const PackLayout layout(shape);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Status status = gate_pack_workspace_bytes(shape, device).status();
  const auto then = [&status](auto&& launch) {
    if (status.ok()) status = launch();
  };
  then([&] { return require_current(device, "gate_pack"); });
  then([&] { return require_aligned(args.x, "gate_pack: x"); });
  then([&] { return require_aligned(args.gate, "gate_pack: gate"); });
  then([&] {
    return check(cudaMemsetAsync(args.overflow_tile_rows, 0, sizeof(std::int64_t), stream),
                 "cudaMemsetAsync");
  });
  if (shape.rows == 0) return status;

  ForwardChunk chunk = {};
  auto* base = static_cast<std::byte*>(args.workspace);
  chunk.hidden = static_cast<int>(args.hidden);
  chunk.neurons = static_cast<int>(shape.columns);
  chunk.blocks = static_cast<int>(layout.blocks);
  chunk.schedule = reinterpret_cast<Schedule*>(base + layout.schedule);
  chunk.masks = reinterpret_cast<std::uint32_t*>(base + layout.masks);
  chunk.columns = reinterpret_cast<std::uint32_t*>(base + layout.columns);
  const std::int64_t step = layout.tiles * kTileTokens;
  for (std::int64_t first = 0; first < shape.rows; first += step) {
    chunk.tokens = static_cast<int>(std::min(step, shape.rows - first));
    chunk.tiles = ceil_div(chunk.tokens, kTileTokens);
    then([&] {
      const Tokens x = {args.x, shape.rows, static_cast<int>(first)};
      return products_for(device).gate(chunk, x, args.gate, device.multiprocessors, stream);
    });
    then([&] {
      return launch_words(chunk, args.words + first * layout.blocks * shape.slots, shape.slots,
                          args.overflow_tile_rows, stream);
    });
  }
  return status;
}

}  // namespace twell::cuda
