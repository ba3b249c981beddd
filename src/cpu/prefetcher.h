#pragma once

#include <cstdint>

#include "twell/types.h"

namespace twell::cpu {
namespace {  // compiled once per instruction set

// Brings `rows` rows of `inner` elements into the second-level cache in `steps` even portions, so
// that the next block of weights arrives while this one is multiplied: each row is a memory page
// of its own, which the hardware prefetchers do not foresee.
class Prefetcher {
 public:
  Prefetcher(const bf16* first, std::int64_t stride, std::int64_t rows, std::int64_t inner,
             std::int64_t steps)
      : row_(first),
        stride_(stride),
        inner_(inner),
        left_(first ? rows * ((inner + kLine - 1) / kLine) : 0),
        portion_((left_ + steps - 1) / (steps > 0 ? steps : 1)) {}

  void step() {
    for (std::int64_t i = 0; i < portion_ && left_ > 0; ++i, --left_) {
      __builtin_prefetch(row_ + column_, 0, 2);
      column_ += kLine;
      if (column_ >= inner_) {
        column_ = 0;
        row_ += stride_;
      }
    }
  }

 private:
  static constexpr std::int64_t kLine = 64 / sizeof(bf16);

  const bf16* row_;
  std::int64_t stride_;
  std::int64_t inner_;
  std::int64_t left_;
  std::int64_t portion_;
  std::int64_t column_ = 0;
};

}  // namespace
}  // namespace twell::cpu
