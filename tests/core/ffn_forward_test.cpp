// The CPU forward against a float64 oracle written here, for every instruction set of the machine.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/support.h"
#include "twell/ffn.h"

namespace twell {
namespace {

template <class T>
struct Case : FfnTensors<T> {
  // About `density` of the gate's values are positive.
  Case(FfnKind kind, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons, double density)
      : FfnTensors<T>(kind, tokens, hidden, neurons) {
    std::normal_distribution<double> normal;
    const auto scaled = [&](std::int64_t fan_in) {
      return [&, scale = 1 / std::sqrt(static_cast<double>(fan_in))] {
        return scale * normal(this->random);
      };
    };
    this->fill(this->x, tokens, scaled(1));
    this->fill(this->gate, neurons, scaled(hidden));
    this->fill(this->up, neurons, scaled(hidden));
    this->fill(this->down, neurons, scaled(neurons));
    const double bias = density <= 0 ? -100 : density >= 1 ? 100 : normal_quantile(density);
    for (std::int64_t t = 0; t < tokens; ++t) this->set_token_bias(t, 1);
    for (std::int64_t n = 0; n < neurons; ++n) this->set_neuron_bias(n, bias);
  }
};

struct Oracle {
  std::vector<double> y;
  std::vector<double> error;  // per y: the largest error that rounding explains
  double l1 = 0;
  double l1_error = 0;
};

template <class T>
Oracle oracle(const Case<T>& c) {
  const auto [kind, dtype, tokens, hidden, neurons] = c.problem;
  Oracle out;
  out.y.assign(static_cast<std::size_t>(tokens * hidden), 0);
  out.error = out.y;
  // g, h and y are rounded to T once each; sums lose a little of the sum of their terms' sizes.
  const double rounding = 4 * kEpsilon<T>;
  const double summing = kSummingError<T>;
  const bool gated = kind == FfnKind::kGated;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < neurons; ++n) {
      double g = 0, u = 0, g_size = 0, u_size = 0;
      for (std::int64_t k = 0; k < hidden; ++k) {
        const double x = value_of(c.x[t * hidden + k]);
        const double g_term = gated ? x * value_of(c.gate[n * hidden + k]) : 0;
        const double u_term = x * value_of(c.up[n * hidden + k]);
        g += g_term;
        u += u_term;
        g_size += std::abs(g_term);
        u_size += std::abs(u_term);
      }
      const double pre = gated ? g : u;
      const double relu = pre < 0 ? 0 : pre;
      const double h = gated ? relu * u : relu;
      const double h_error = rounding * std::abs(h) +
                             summing * (gated ? g_size * std::abs(u) + relu * u_size : u_size);
      out.l1 += std::abs(h);
      out.l1_error += h_error;
      for (std::int64_t k = 0; k < hidden; ++k) {
        const double term = h * value_of(c.down[n * hidden + k]);
        out.y[t * hidden + k] += term;
        out.error[t * hidden + k] += (h_error + (rounding + summing) * std::abs(h)) *
                                     std::abs(value_of(c.down[n * hidden + k]));
      }
    }
  }
  return out;
}

template <class T>
struct Output {
  Buffer y{0};
  std::int64_t l0 = -1;
  double l1 = -1;
  std::vector<std::int32_t> activity;
};

template <class T>
Output<T> run(const Case<T>& c, Device device, bool training = false) {
  const FfnPlan plan = sparse_plan(c.problem, device, training);
  Output<T> out;
  out.y = Buffer(c.x.size() * sizeof(T));
  out.activity.assign(static_cast<std::size_t>(c.problem.neurons), -7);
  Buffer workspace(plan.workspace_bytes);
  Buffer saved(plan.saved_bytes);
  float l1_float = -1;
  double l1_double = -1;
  FfnForwardArgs args;
  args.x = c.x.data();
  args.weights = c.weights();
  args.y = out.y.data();
  args.stats.l0 = &out.l0;
  args.stats.l1 = sizeof(T) == 8 ? static_cast<void*>(&l1_double) : &l1_float;
  args.stats.activity = out.activity.data();
  args.saved = training ? saved.data() : nullptr;
  args.workspace = workspace.data();
  const Status status = ffn_forward(plan, args);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(out.y.guard_intact());
  EXPECT_TRUE(workspace.guard_intact());
  EXPECT_TRUE(saved.guard_intact());
  out.l1 = sizeof(T) == 8 ? l1_double : l1_float;
  return out;
}

template <class T>
void expect_matches(const Case<T>& c, const Oracle& want, Output<T>& got) {
  const T* y = got.y.template as<T>();
  for (std::size_t i = 0; i < want.y.size(); ++i) {
    ASSERT_LE(std::abs(value_of(y[i]) - want.y[i]), want.error[i])
        << "token " << i / static_cast<std::size_t>(c.problem.hidden) << ", column "
        << i % static_cast<std::size_t>(c.problem.hidden);
  }
  EXPECT_NEAR(got.l1, want.l1, want.l1_error + kEpsilon<float> * want.l1);
  std::int64_t total = 0;
  for (std::int32_t count : got.activity) total += count;
  EXPECT_EQ(total, got.l0);
}

template <class T>
class FfnForward : public testing::Test {};
using Types = testing::Types<bf16, float, double>;
TYPED_TEST_SUITE(FfnForward, Types);

TYPED_TEST(FfnForward, MatchesFloat64AtEveryDensityAndShape) {
  struct Shape {
    std::int64_t tokens, hidden, neurons;
  };
  for (const Shape shape : {Shape{0, 8, 8}, Shape{1, 8, 8}, Shape{1, 264, 136}, Shape{7, 40, 72},
                            Shape{8, 64, 64}, Shape{9, 48, 264}, Shape{33, 104, 40},
                            Shape{129, 296, 200}, Shape{515, 24, 56}, Shape{64, 1032, 24}}) {
    for (const double density : {0.0, 0.03, 0.5, 1.0}) {
      for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
        const Case<TypeParam> c(kind, shape.tokens, shape.hidden, shape.neurons, density);
        const Oracle want = oracle(c);
        for (const CpuIsa isa : machine_isas()) {
          SCOPED_TRACE(std::string(name_of(isa)) + ", " + name_of(kind) + ", tokens " +
                       std::to_string(shape.tokens) + ", hidden " + std::to_string(shape.hidden) +
                       ", neurons " + std::to_string(shape.neurons) + ", density " +
                       std::to_string(density));
          auto got = run(c, device_of(isa, 2));
          expect_matches(c, want, got);
          if (density == 0) {
            EXPECT_EQ(got.l0, 0);
          }
          if (density == 1) {
            EXPECT_EQ(got.l0, shape.tokens * shape.neurons);
          }
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TYPED_TEST(FfnForward, SameBitsForAnyNumberOfThreadsAndWhenTraining) {
  for (const std::int64_t tokens : {3, 300}) {
    const Case<TypeParam> c(FfnKind::kGated, tokens, 264, 328, 0.2);
    for (const CpuIsa isa : machine_isas()) {
      SCOPED_TRACE(name_of(isa));
      auto one = run(c, device_of(isa, 1));
      for (const int threads : {2, 3, 5}) {
        auto many = run(c, device_of(isa, threads), threads == 3);
        EXPECT_TRUE(one.y == many.y);
        EXPECT_EQ(one.l0, many.l0);
        EXPECT_EQ(one.l1, many.l1);
        EXPECT_EQ(one.activity, many.activity);
      }
    }
  }
}

TYPED_TEST(FfnForward, NanAndInfinityInATokenSpreadToThatTokenOnly) {
  using T = TypeParam;
  const double inf = std::numeric_limits<double>::infinity();
  for (const double bad : {std::nan(""), inf, -inf}) {
    for (const std::int64_t tokens : {2, 70}) {
      Case<T> c(FfnKind::kGated, tokens, 64, 136, 0.1);
      for (const CpuIsa isa : machine_isas()) {
        auto clean = run(c, device_of(isa, 2));
        const T kept = c.x[64];
        assign(c.x[64], bad);  // token 1
        auto got = run(c, device_of(isa, 2));
        c.x[64] = kept;
        for (std::int64_t i = 0; i < tokens * 64; ++i) {
          const double y = value_of(got.y.template as<T>()[i]);
          if (i / 64 == 1) {
            EXPECT_TRUE(std::isnan(y)) << i;  // 0 · inf at some neuron, as in the dense block
          } else {
            EXPECT_EQ(y, value_of(clean.y.template as<T>()[i])) << i;
          }
        }
      }
    }
  }
}

// As twell/ffn.h says: what no token activates is not read, so 0 · inf does not arise.
TYPED_TEST(FfnForward, NanAndInfinityInAWeightReachWhoActivatesTheNeuron) {
  using T = TypeParam;
  const std::int64_t silent = 5, busy = 6, hidden = 64;
  const double inf = std::numeric_limits<double>::infinity();
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const std::int64_t tokens : {2, 70, 200}) {
      Case<T> good(kind, tokens, hidden, 136, 0.3);
      good.set_neuron_bias(silent, -100);
      good.set_neuron_bias(busy, 100);
      const auto poisoned = [&](std::vector<T> Case<T>::*weights, std::int64_t neuron, double bad) {
        Case<T> c = good;
        assign((c.*weights)[neuron * hidden + 3], bad);
        return c;
      };
      for (const CpuIsa isa : machine_isas()) {
        SCOPED_TRACE(std::string(name_of(isa)) + ", " + name_of(kind) + ", tokens " +
                     std::to_string(tokens));
        const auto clean = run(good, device_of(isa, 1));
        const auto finite_values = [&](const Case<T>& c) {
          auto got = run(c, device_of(isa, 1));
          const T* y = got.y.template as<T>();
          return std::count_if(y, y + tokens * hidden,
                               [](T v) { return std::isfinite(value_of(v)); });
        };
        for (const double bad : {std::nan(""), inf, -inf}) {
          EXPECT_TRUE(run(poisoned(&Case<T>::down, silent, bad), device_of(isa, 1)).y == clean.y);
          // The row's one bad element is one column of y.
          EXPECT_EQ(finite_values(poisoned(&Case<T>::down, busy, bad)), tokens * (hidden - 1));
          if (kind == FfnKind::kGated) {
            EXPECT_TRUE(run(poisoned(&Case<T>::up, silent, bad), device_of(isa, 1)).y == clean.y);
            EXPECT_EQ(finite_values(poisoned(&Case<T>::up, busy, bad)), 0);
          }
        }
        const auto deciding = kind == FfnKind::kGated ? &Case<T>::gate : &Case<T>::up;
        EXPECT_EQ(finite_values(poisoned(deciding, silent, std::nan(""))), 0);
      }
    }
  }
}

TEST(FfnForwardArguments, AreRefusedByName) {
  Case<float> c(FfnKind::kGated, 4, 8, 8, 0.5);
  const FfnPlan plan = plan_ffn(c.problem, cpu_device(1)).value();
  Buffer workspace(plan.workspace_bytes + 64);
  std::vector<float> y(32);
  FfnForwardArgs good;
  good.x = c.x.data();
  good.weights = c.weights();
  good.y = y.data();
  good.workspace = workspace.data();
  ASSERT_TRUE(ffn_forward(plan, good).ok());

  const auto expect_refused = [&](const FfnPlan& p, const FfnForwardArgs& args, const char* name) {
    const Status status = ffn_forward(p, args);
    EXPECT_FALSE(status.ok()) << name;
    EXPECT_NE(status.message().find(name), std::string::npos) << status.message();
  };
  FfnForwardArgs bad = good;
  bad.x = nullptr;
  expect_refused(plan, bad, "x is null");
  bad = good;
  bad.weights.gate = nullptr;
  expect_refused(plan, bad, "weights.gate is null");
  bad = good;
  bad.weights.down = nullptr;
  expect_refused(plan, bad, "weights.down is null");
  bad = good;
  bad.workspace = workspace.as<char>() + 8;
  expect_refused(plan, bad, "workspace");
  bad = good;
  bad.saved = workspace.data();
  expect_refused(plan, bad, "saved");
  FfnPlan dense = plan;
  dense.path = FfnPath::kDense;
  expect_refused(dense, good, "plan.path is dense");
}

}  // namespace
}  // namespace twell
