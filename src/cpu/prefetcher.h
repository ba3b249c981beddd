#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace twell::cpu {
namespace {  // compiled once per instruction set

// Brings `rows` rows of `inner` elements into the second-level cache in `steps` even portions, so
// that the next block of weights arrives while this one is multiplied: each row is a memory page
// of its own, which the hardware prefetchers do not foresee.
class Prefetcher {
 public:
  Prefetcher(Rows<bf16> rows, std::int64_t count, std::int64_t inner, std::int64_t steps)
      : rows_(rows),
        inner_(inner),
        left_(rows.data ? count * ((inner + kLine - 1) / kLine) : 0),
        portion_(steps > 0 ? (left_ + steps - 1) / steps : 0) {}

  void step() {
    for (std::int64_t i = 0; i < portion_ && left_ > 0; ++i, --left_) {
      __builtin_prefetch(rows_[row_] + column_, 0, 2);
      column_ += kLine;
      if (column_ >= inner_) {
        column_ = 0;
        ++row_;
      }
    }
  }

 private:
  static constexpr std::int64_t kLine = 64 / sizeof(bf16);

  Rows<bf16> rows_;
  std::int64_t inner_;
  std::int64_t left_;
  std::int64_t portion_;
  std::int64_t row_ = 0;
  std::int64_t column_ = 0;
};

}  // namespace
}  // namespace twell::cpu
