// Every primitive of every instruction set of the machine against plain loops in float64.

#include "cpu/kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/support.h"

namespace twell::cpu {
namespace {

template <class T>
class CpuKernels : public testing::Test {
 protected:
  static constexpr double kSumming = sizeof(T) == 8 ? 0x1p-50 : 0x1p-20;

  template <class Check>
  void for_each_isa(Check&& check) {
    for (const CpuIsa isa : machine_isas()) {
      SCOPED_TRACE(name_of(isa));
      check(kernels<T>(isa));
    }
  }

  std::vector<T> values(std::int64_t count) {
    std::normal_distribution<double> normal;
    std::vector<T> out(static_cast<std::size_t>(count));
    for (T& v : out) assign(v, normal(random_));
    return out;
  }

  // `count` of the rows below `rows`, ascending or not.
  std::vector<std::int32_t> choose(std::int64_t rows, std::int64_t count) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(count));
    for (std::int32_t& i : out) i = static_cast<std::int32_t>(random_() % rows);
    return out;
  }

  TokenMask random_mask(int tokens, double density) {
    TokenMask mask = {};
    std::bernoulli_distribution coin(density);
    for (int t = 0; t < tokens; ++t) {
      mask.word[t / 64] |= static_cast<std::uint64_t>(coin(random_)) << t % 64;
    }
    return mask;
  }

  std::mt19937_64 random_{7};
};
using Types = testing::Types<bf16, float, double>;
TYPED_TEST_SUITE(CpuKernels, Types);

// The strips' layout, spelt out once more.
template <class T>
double panel_at(const T* panel, std::int64_t inner, std::int64_t k, std::int64_t j) {
  const T* strip = panel + j / 32 * 32 * padded(inner);
  return value_of(sizeof(T) == 2 ? strip[(k / 2 * 32 + j % 32) * 2 + k % 2]
                                 : strip[k * 32 + j % 32]);
}

TYPED_TEST(CpuKernels, PanelsHoldRowsAndTheirTransposeAndZeros) {
  using T = TypeParam;
  for (const auto& [inner, columns] : {std::pair{8, 1}, {40, 33}, {72, 16}, {65, 90}, {1, 32}}) {
    const auto matrix = this->values(100 * 100);
    const auto index = this->choose(100, 100);
    this->for_each_isa([&](const Kernels<T>& k) {
      for (const bool transposed : {false, true}) {
        const Rows<T> rows{matrix.data(), 100, transposed ? nullptr : index.data()};
        Buffer panel(static_cast<std::size_t>(panel_elements(inner, columns)) * sizeof(T));
        const auto pack = transposed ? k.pack_transposed : k.pack;
        transposed ? pack(rows, columns, inner, panel.template as<T>())
                   : pack(rows, inner, columns, panel.template as<T>());
        EXPECT_TRUE(panel.guard_intact());
        for (std::int64_t i = 0; i < padded(inner); ++i) {
          for (std::int64_t j = 0; j < padded(columns); ++j) {
            const bool inside = i < inner && j < columns;
            const double want = !inside ? 0 : value_of(transposed ? rows[j][i] : rows[i][j]);
            ASSERT_EQ(panel_at(panel.template as<T>(), inner, i, j), want) << i << ", " << j;
          }
        }
      }
    });
  }
}

TYPED_TEST(CpuKernels, MultiplyAndDotsMatchFloat64) {
  using T = TypeParam;
  struct Shape {
    std::int64_t rows, inner, columns;
  };
  for (const Shape s : {Shape{1, 8, 1}, Shape{7, 40, 33}, Shape{32, 512, 64}, Shape{33, 520, 96},
                        Shape{48, 2056, 20}, Shape{300, 264, 130}, Shape{5, 1034, 70}}) {
    const std::int64_t stride = s.inner + s.inner % 2 + 6;
    const auto a_data = this->values(300 * stride);
    const auto b_data = this->values(s.columns * stride);
    const auto index = this->choose(300, s.rows);
    for (const bool gathered : {false, true}) {
      const Rows<T> a{a_data.data(), stride, gathered ? index.data() : nullptr};
      const Rows<T> b{b_data.data(), stride};
      std::vector<double> want, size;
      for (std::int64_t i = 0; i < s.rows; ++i) {
        for (std::int64_t j = 0; j < s.columns; ++j) {
          double sum = 0, terms = 0;
          for (std::int64_t k = 0; k < s.inner; ++k) {
            sum += value_of(a[i][k]) * value_of(b[j][k]);
            terms += std::abs(value_of(a[i][k]) * value_of(b[j][k]));
          }
          want.push_back(sum);
          size.push_back(terms);
        }
      }
      this->for_each_isa([&](const Kernels<T>& k) {
        const std::int64_t ldc = padded(s.columns) + 32;
        Buffer panel(static_cast<std::size_t>(panel_elements(s.inner, s.columns)) * sizeof(T));
        k.pack_transposed(b, s.columns, s.inner, panel.template as<T>());
        Buffer product(static_cast<std::size_t>(s.rows * ldc) * sizeof(Acc<T>));
        Buffer dots(static_cast<std::size_t>(s.rows * ldc) * sizeof(Acc<T>));
        auto* c = product.template as<Acc<T>>();
        auto* d = dots.template as<Acc<T>>();
        k.dots(a, s.rows, b, s.columns, s.inner, d, ldc);
        for (const double times : {1, 2}) {
          k.multiply(a, s.rows, s.inner, panel.template as<T>(), s.columns, c, ldc, times == 2,
                     gathered ? nullptr : a[0]);
          for (std::int64_t i = 0; i < s.rows; ++i) {
            for (std::int64_t j = 0; j < s.columns; ++j) {
              const std::size_t at = static_cast<std::size_t>(i * s.columns + j);
              const double bound = TestFixture::kSumming * size[at];
              ASSERT_NEAR(c[i * ldc + j], times * want[at], 2 * bound) << i << ", " << j;
              ASSERT_NEAR(d[i * ldc + j], want[at], bound) << i << ", " << j;
            }
          }
        }
        EXPECT_TRUE(product.guard_intact());
        EXPECT_TRUE(dots.guard_intact());
      });
    }
  }
}

TYPED_TEST(CpuKernels, WeightedSumAddsToWhatIsThere) {
  using T = TypeParam;
  for (const std::int64_t columns : {8, 56, 256, 328}) {
    for (const std::int64_t count : {0, 1, 2, 17}) {
      const auto matrix = this->values(50 * columns);
      const auto weights = this->values(count);
      const auto index = this->choose(50, count);
      const Rows<T> rows{matrix.data(), columns, index.data()};
      this->for_each_isa([&](const Kernels<T>& k) {
        Buffer out(static_cast<std::size_t>(columns) * sizeof(Acc<T>));
        auto* sums = out.template as<Acc<T>>();
        for (std::int64_t j = 0; j < columns; ++j) sums[j] = 1;
        k.weighted_sum(rows, weights.data(), count, columns, sums);
        for (std::int64_t j = 0; j < columns; ++j) {
          double want = 1, size = 1;
          for (std::int64_t i = 0; i < count; ++i) {
            want += value_of(weights[i]) * value_of(rows[i][j]);
            size += std::abs(value_of(weights[i]) * value_of(rows[i][j]));
          }
          ASSERT_NEAR(sums[j], want, TestFixture::kSumming * size) << j;
        }
        EXPECT_TRUE(out.guard_intact());
      });
    }
  }
}

TYPED_TEST(CpuKernels, ReluPackKeepsPositiveNanAndForcedInOrderAndExpandUndoesIt) {
  using T = TypeParam;
  for (const int tokens : {1, 31, 32, 70, 128}) {
    std::vector<Acc<T>> c(static_cast<std::size_t>(tokens));
    std::normal_distribution<double> normal;
    for (auto& v : c) v = static_cast<Acc<T>>(normal(this->random_));
    c[0] = std::numeric_limits<Acc<T>>::quiet_NaN();
    if (tokens > 2) c[2] = -Acc<T>(0);
    if (tokens > 3) c[3] = std::numeric_limits<Acc<T>>::infinity();
    const TokenMask forced = this->random_mask(tokens, 0.1);
    this->for_each_isa([&](const Kernels<T>& k) {
      Buffer packed(static_cast<std::size_t>(tokens + kPackSlack) * sizeof(T));
      Buffer expanded(static_cast<std::size_t>(padded(tokens)) * sizeof(T));
      TokenMask mask;
      const int count = k.relu_pack(c.data(), tokens, forced, &mask, packed.template as<T>());
      k.expand(packed.template as<T>(), mask, tokens, expanded.template as<T>());
      EXPECT_TRUE(packed.guard_intact());
      EXPECT_TRUE(expanded.guard_intact());
      EXPECT_EQ(count, mask.count());
      const T* value = packed.template as<T>();
      for (int t = 0; t < kMaxTileTokens; ++t) {
        const bool active = t < tokens && (forced[t] || !(c[t] <= 0));
        ASSERT_EQ(mask[t], active) << t;
        if (t >= tokens) continue;
        T want;
        assign(want, active && !(c[t] < 0) ? c[t] : 0);
        const double spread = value_of(expanded.template as<T>()[t]);
        if (!active) {
          EXPECT_EQ(spread, 0) << t;
          continue;
        }
        const double got = value_of(*value++);
        if (std::isnan(c[t])) {
          EXPECT_TRUE(std::isnan(got) && std::isnan(spread)) << t;
        } else {
          EXPECT_EQ(got, value_of(want)) << t;
          EXPECT_EQ(spread, value_of(want)) << t;
        }
      }
    });
  }
}

TYPED_TEST(CpuKernels, ScaleRoundAbsSumAndAllFinite) {
  using T = TypeParam;
  for (const std::int64_t count : {1, 8, 31, 33, 128, 200}) {
    auto g = this->values(count);
    std::vector<Acc<T>> u(static_cast<std::size_t>(count));
    std::normal_distribution<double> normal;
    for (auto& v : u) v = static_cast<Acc<T>>(normal(this->random_));
    this->for_each_isa([&](const Kernels<T>& k) {
      Buffer h(static_cast<std::size_t>(count) * sizeof(T));
      Buffer rounded(static_cast<std::size_t>(count) * sizeof(T));
      k.scale(g.data(), u.data(), count, h.template as<T>());
      k.round(u.data(), count, rounded.template as<T>());
      double sum = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        T want;
        assign(want, static_cast<Acc<T>>(value_of(g[i])) * u[i]);
        ASSERT_EQ(value_of(h.template as<T>()[i]), value_of(want)) << i;
        assign(want, u[i]);
        ASSERT_EQ(value_of(rounded.template as<T>()[i]), value_of(want)) << i;
        sum += std::abs(value_of(g[i]));
      }
      EXPECT_TRUE(h.guard_intact());
      EXPECT_TRUE(rounded.guard_intact());
      EXPECT_NEAR(k.abs_sum(g.data(), count), sum, TestFixture::kSumming * sum);
      EXPECT_TRUE(k.all_finite(g.data(), count));
      for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity()}) {
        const T kept = g[static_cast<std::size_t>(count - 1)];
        assign(g[static_cast<std::size_t>(count - 1)], bad);
        EXPECT_FALSE(k.all_finite(g.data(), count)) << bad;
        g[static_cast<std::size_t>(count - 1)] = kept;
      }
    });
  }
}

}  // namespace
}  // namespace twell::cpu
