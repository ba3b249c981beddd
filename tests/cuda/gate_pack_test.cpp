// The CUDA gate-and-pack against a float64 oracle and the format's own decoder.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "gate_pack_call.h"

namespace twell {
namespace {

class CudaGatePack : public GpuTest {
 protected:
  void check(std::int64_t rows, std::int64_t hidden, std::int64_t columns, int slots,
             double density) {
    SCOPED_TRACE("rows " + std::to_string(rows) + " columns " + std::to_string(columns) +
                 " slots " + std::to_string(slots) + " density " + std::to_string(density));
    const Block block(FfnKind::kGated, rows, hidden, columns, density);
    const std::vector<double> want = block.gate_values();
    for (const Device& device : devices) {
      SCOPED_TRACE("as sm_" + std::to_string(device.compute_capability));
      check_on(device, block, slots, want);
    }
  }

 private:
  void check_on(const Device& device, const Block& block, int slots,
                const std::vector<double>& want) {
    GatePackCall call(device, block, slots);
    const TwellShape& shape = call.shape;
    const std::int64_t rows = shape.rows, columns = shape.columns;
    const Status status = call.run();
    ASSERT_TRUE(status.ok()) << status.message();
    const std::vector<std::uint32_t> got = call.words.download<std::uint32_t>();
    for (const DeviceBuffer* buffer : {&call.words, &call.overflow, &call.workspace}) {
      EXPECT_TRUE(buffer->guard_intact());
    }

    std::int64_t overflowed = 0, disagreements = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t tile = 0; tile < shape.tiles(); ++tile) {
        const std::uint32_t* tile_row = &got[(row * shape.tiles() + tile) * slots];
        const std::uint32_t count = tile_row[0];
        overflowed += count > static_cast<std::uint32_t>(slots) - 1;
        const std::int64_t end = std::min(columns, (tile + 1) * kTwellTileColumns);
        std::int64_t active = 0;
        for (std::int64_t c = tile * kTwellTileColumns; c < end; ++c) {
          active += want[row * columns + c] > 0;
        }
        disagreements += std::abs(active - static_cast<std::int64_t>(count));
        std::int64_t last = -1;
        for (std::uint32_t s = 1; s < static_cast<std::uint32_t>(slots); ++s) {
          if (s > count) {
            EXPECT_EQ(tile_row[s], 0u);
            continue;
          }
          const std::int64_t column = tile_row[s] & 0xffffu;
          ASSERT_GT(column, last);
          ASSERT_LT(column, end);
          last = column;
          const double value = to_float(bf16{static_cast<std::uint16_t>(tile_row[s] >> 16)});
          EXPECT_GT(value, 0);
          EXPECT_NEAR(value, want[row * columns + column],
                      std::abs(want[row * columns + column]) / 128 + 1e-5);
        }
      }
    }
    EXPECT_EQ(call.overflow.download<std::int64_t>()[0], overflowed);
    EXPECT_LE(disagreements, 1e-4 * static_cast<double>(want.size()) + 0.5);
    if (overflowed == 0) {
      EXPECT_TRUE(twell_validate(shape, got).ok());
    }
  }
};

TEST_F(CudaGatePack, MatchesFloat64) {
  check(0, 64, 256, 32, 0.5);
  check(1, 8, 8, 8, 1.0);
  check(129, 72, 520, 32, 0.02);
  check(300, 136, 1032, 128, 0.1);
  check(200, 64, 1024, 8, 0.0);
}

TEST_F(CudaGatePack, CountsOverflow) {
  check(130, 64, 600, 8, 0.5);
  check(65, 64, 256, 32, 1.0);
}

}  // namespace
}  // namespace twell
