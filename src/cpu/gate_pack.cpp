// The gate projection that packs as it goes, on the CPU: chunk by chunk of tokens, a few rows of G
// are multiplied by the chunk's tokens, and the product is turned into words while it is in cache.
// A thread owns whole tiles of columns, so counts need no atomics and columns ascend.

#include "cpu/gate_pack.h"

#include <omp.h>

#include <algorithm>

#include "cpu/carver.h"
#include "cpu/ffn.h"
#include "cpu/kernels.h"

namespace twell::cpu {
namespace {

constexpr std::int64_t kMaxChunkTokens = 512;  // a panel of x that stays in cache
constexpr std::int64_t kGateRows = 32;         // rows of G per call of multiply

struct Workspace {
  bf16* panel = nullptr;      // xᵀ of a chunk; not used where dots are
  float* products = nullptr;  // [threads, kGateRows, padded(chunk)]

  static Workspace carve(const TwellShape& shape, std::int64_t hidden, const Device& device,
                         Carver& carver) {
    const std::int64_t chunk = std::min(shape.rows, kMaxChunkTokens);
    Workspace w;
    w.panel = carver.take<bf16>(panel_elements(hidden, chunk));
    w.products = carver.take<float>(device.threads * kGateRows * padded(chunk));
    return w;
  }
};

class GatePack {
 public:
  GatePack(const TwellShape& shape, const Device& device, const GatePackArgs& args)
      : shape_(shape), device_(device), args_(args), kernels_(kernels<bf16>(device.isa)) {
    Carver carver(args.workspace);
    work_ = Workspace::carve(shape, args.hidden, device, carver);
  }

  void run() {
    std::int64_t overflow = 0;
    for (std::int64_t first = 0; first < shape_.rows; first += kMaxChunkTokens) {
      overflow += run_chunk(first, std::min(kMaxChunkTokens, shape_.rows - first));
    }
    *args_.overflow_tile_rows = overflow;
  }

 private:
  bool use_dots() const { return shape_.rows <= kMaxDotTokens; }

  std::uint32_t* tile_row(std::int64_t row, std::int64_t tile) const {
    return args_.words + (row * shape_.tiles() + tile) * shape_.slots;
  }

  std::int64_t run_chunk(std::int64_t first, std::int64_t tokens) {
    const Rows<bf16> x{args_.x + first * args_.hidden, args_.hidden};
    std::int64_t overflow = 0;
#pragma omp parallel num_threads(device_.threads) reduction(+ : overflow)
    {
      if (!use_dots()) {
#pragma omp for schedule(static)
        for (std::int64_t t = 0; t < tokens; t += kPanelColumns) {
          kernels_.pack_transposed(x.from(t), std::min(kPanelColumns, tokens - t), args_.hidden,
                                   work_.panel + t * padded(args_.hidden));
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t tile = 0; tile < shape_.tiles(); ++tile) {
        pack_tile(x, first, tokens, tile);
        for (std::int64_t t = 0; t < tokens; ++t) {
          overflow += tile_row(first + t, tile)[0] >= static_cast<std::uint32_t>(shape_.slots);
        }
      }
    }
    return overflow;
  }

  void pack_tile(Rows<bf16> x, std::int64_t first, std::int64_t tokens, std::int64_t tile) {
    const std::int64_t ldc = padded(tokens);
    float* product = work_.products + omp_get_thread_num() * kGateRows * ldc;
    const std::int64_t column = tile * kTwellTileColumns;
    const std::int64_t end = std::min(column + kTwellTileColumns, shape_.columns);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::fill_n(tile_row(first + t, tile), shape_.slots, 0u);
    }
    for (std::int64_t n = column; n < end; n += kGateRows) {
      const std::int64_t rows = std::min(kGateRows, end - n);
      const Rows<bf16> gate{args_.gate + n * args_.hidden, args_.hidden};
      if (use_dots()) {
        kernels_.dots(gate, rows, x, tokens, args_.hidden, product, ldc);
      } else {
        const bool more = n + 2 * kGateRows <= shape_.columns;
        kernels_.multiply(gate, rows, args_.hidden, work_.panel, tokens, product, ldc, false,
                          more ? gate[kGateRows] : nullptr);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        append_column(product + r * ldc, first, tokens, tile, static_cast<std::uint32_t>(n + r));
      }
    }
  }

  // Appends a column's active values to their rows' words; the count goes on past the last slot.
  void append_column(const float* product, std::int64_t first, std::int64_t tokens,
                     std::int64_t tile, std::uint32_t column) {
    bf16 values[kMaxTileTokens + kPackSlack];
    for (std::int64_t t = 0; t < tokens; t += kMaxTileTokens) {
      TokenMask active;
      const int width = static_cast<int>(std::min<std::int64_t>(kMaxTileTokens, tokens - t));
      kernels_.relu_pack(product + t, width, TokenMask{}, &active, values);
      const bf16* value = values;
      active.for_each([&](int i) {
        std::uint32_t* words = tile_row(first + t + i, tile);
        const std::uint32_t bits = (value++)->bits;
        const std::uint32_t slot = ++words[0];
        if (slot < static_cast<std::uint32_t>(shape_.slots)) words[slot] = bits << 16 | column;
      });
    }
  }

  const TwellShape& shape_;
  const Device& device_;
  const GatePackArgs& args_;
  const Kernels<bf16>& kernels_;
  Workspace work_;
};

}  // namespace

std::size_t gate_pack_workspace_bytes(const TwellShape& shape, std::int64_t hidden,
                                      const Device& device) {
  Carver carver;
  Workspace::carve(shape, hidden, device, carver);
  return carver.used();
}

void gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs& args) {
  GatePack(shape, device, args).run();
}

}  // namespace twell::cpu
