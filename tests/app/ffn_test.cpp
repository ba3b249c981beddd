// The autograd glue of the feed-forward block against PyTorch's own graph in float64, on both
// paths.
#include "app/model/ffn.h"

#include <gtest/gtest.h>

#include "app/error.h"

namespace twell::app {
namespace {

using torch::Tensor;

struct Leaves {
  Tensor x, gate, up, down;

  // `shift` moves the gate's products: the lower, the fewer neurons are active.
  Leaves(int64_t tokens, int64_t hidden, int64_t neurons, double shift) {
    torch::manual_seed(tokens + 31 * hidden + 977 * neurons);
    const auto wide = torch::kFloat64;
    x = torch::randn({tokens, hidden}, wide);
    if (hidden > 0) x.select(1, 0).fill_(1);
    gate = torch::randn({neurons, hidden}, wide) / std::sqrt(double(hidden));
    gate.select(1, 0).add_(shift);
    up = torch::randn({neurons, hidden}, wide) / std::sqrt(double(hidden));
    down = torch::randn({neurons, hidden}, wide) / std::sqrt(double(neurons));
  }

  Leaves to(torch::ScalarType type, torch::Device device = torch::kCPU) const {
    Leaves copy = *this;
    for (Tensor* t : {&copy.x, &copy.gate, &copy.up, &copy.down}) {
      *t = t->to(device, type, false, true).requires_grad_(true);
    }
    return copy;
  }
};

struct Outcome {
  Tensor y, l1, l0, activity, dx, dgate, dup, ddown;
};

Outcome finish(Leaves& leaves, Tensor y, Tensor l1, Tensor l0, Tensor activity, double lambda) {
  const Tensor direction =
      torch::cos(torch::arange(y.numel(), torch::kFloat64)).view(y.sizes()).to(y.device());
  ((y.to(torch::kFloat64) * direction).sum() + lambda * l1.to(torch::kFloat64)).backward();
  return {y.detach(),       l1.detach(),       l0, activity, leaves.x.grad(), leaves.gate.grad(),
          leaves.up.grad(), leaves.down.grad()};
}

Outcome by_twell(const Leaves& given, torch::ScalarType type, FfnPath path, double lambda,
                 torch::Device device) {
  Leaves leaves = given.to(type, device);
  const FfnOutput out = relu_ffn(leaves.x, {leaves.gate, leaves.up, leaves.down}, path);
  EXPECT_EQ(out.path, path);
  return finish(leaves, out.y, out.l1, out.l0, out.activity, lambda);
}

// The oracle: plain autograd in float64.
Outcome by_autograd(const Leaves& given, double lambda) {
  Leaves leaves = given.to(torch::kFloat64);
  const Tensor g = torch::relu(torch::mm(leaves.x, leaves.gate.t()));
  const Tensor h = g * torch::mm(leaves.x, leaves.up.t());
  return finish(leaves, torch::mm(h, leaves.down), h.abs().sum(), g.gt(0).sum(), g.gt(0).sum(0),
                lambda);
}

double error(const Tensor& a, const Tensor& b) {
  if (b.numel() == 0) return 0;
  return ((a.cpu().to(torch::kFloat64) - b).norm() / (b.norm() + 1e-30)).item<double>();
}

struct Case {
  FfnPath path;
  torch::ScalarType type;
  int64_t tokens;
  double shift;
  double tolerance;
};

class ReluFfn : public testing::TestWithParam<Case> {};

void expect_agreement(const Case& c, torch::Device device) {
  // Values that bf16 holds exactly, so that only the block's own rounding is measured.
  Leaves leaves(c.tokens, 64, 136, c.shift);
  for (Tensor* t : {&leaves.x, &leaves.gate, &leaves.up, &leaves.down}) {
    *t = t->to(torch::kBFloat16).to(torch::kFloat64);
  }
  const Outcome want = by_autograd(leaves, 0.1);
  const Outcome got = by_twell(leaves, c.type, c.path, 0.1, device);
  EXPECT_EQ(got.y.scalar_type(), c.type);
  EXPECT_EQ(got.l0.item<int64_t>(), want.l0.item<int64_t>());
  EXPECT_TRUE(got.activity.cpu().to(torch::kInt64).equal(want.activity));
  EXPECT_LE(error(got.l1, want.l1), c.tolerance);
  EXPECT_LE(error(got.y, want.y), c.tolerance);
  EXPECT_LE(error(got.dx, want.dx), c.tolerance);
  EXPECT_LE(error(got.dgate, want.dgate), c.tolerance);
  EXPECT_LE(error(got.dup, want.dup), c.tolerance);
  EXPECT_LE(error(got.ddown, want.ddown), c.tolerance);
}

TEST_P(ReluFfn, AgreesWithAutograd) { expect_agreement(GetParam(), torch::kCPU); }

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const FfnPath path : {FfnPath::kDense, FfnPath::kSparse}) {
    for (const int64_t tokens : {0, 1, 129}) {
      for (const double shift : {-50.0, -1.5, 0.0, 50.0}) {  // 0, few, half, all neurons active
        all.push_back({path, torch::kFloat64, tokens, shift, 1e-12});
        all.push_back({path, torch::kFloat32, tokens, shift, 1e-5});
        all.push_back({path, torch::kBFloat16, tokens, shift, 2e-2});
      }
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Paths, ReluFfn, testing::ValuesIn(cases()));

TEST(ReluFfnOnAGpu, AgreesWithAutograd) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
  for (const Case& c : cases()) {
    if (c.path == FfnPath::kSparse && c.type != torch::kBFloat16) continue;  // no such kernels
    SCOPED_TRACE(testing::Message() << name_of(c.path) << " " << c.type << " " << c.tokens
                                    << " tokens, shift " << c.shift);
    expect_agreement(c, torch::kCUDA);
  }
}

TEST(ReluFfnNan, SpreadsAsInTheDenseBlock) {
  for (const FfnPath path : {FfnPath::kDense, FfnPath::kSparse}) {
    Leaves leaves(3, 64, 136, -50);
    leaves.x[1][5] = std::numeric_limits<double>::quiet_NaN();
    const Leaves narrow = leaves.to(torch::kBFloat16);
    const torch::NoGradGuard no_grad;
    const Tensor y = relu_ffn(narrow.x, {narrow.gate, narrow.up, narrow.down}, path).y;
    EXPECT_TRUE(y[1].isnan().all().item<bool>()) << name_of(path);
    EXPECT_TRUE(y[0].isfinite().all().item<bool>()) << name_of(path);
    EXPECT_TRUE(y[2].isfinite().all().item<bool>()) << name_of(path);
  }
}

// A NaN of one gate row alone: up and down are finite, so that a relu that lost it would give 0.
void expect_nan_of_a_gate(torch::ScalarType type, torch::Device device) {
  Leaves leaves(3, 64, 136, -1);
  leaves.gate[5][7] = std::numeric_limits<double>::quiet_NaN();
  Leaves block = leaves.to(type, device);
  const FfnOutput out =
      relu_ffn(block.x, {block.gate, block.up, block.down}, FfnPath::kDense, FfnCounts::kAll);
  EXPECT_TRUE(out.y.isnan().all().item<bool>()) << type << device;
  EXPECT_TRUE(out.l1.isnan().item<bool>()) << type << device;
  EXPECT_EQ(out.activity[5].item<int64_t>(), 3) << type << device;
  out.y.sum().backward();
  EXPECT_TRUE(block.up.grad()[5].isnan().all().item<bool>()) << type << device;
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(relu_ffn(block.x, {block.gate, block.up, block.down}, FfnPath::kDense)
                  .y.isnan()
                  .all()
                  .item<bool>())
      << type << device;
}

TEST(ReluFfnNan, OfAGateStays) {
  for (const auto type : {torch::kBFloat16, torch::kFloat32, torch::kFloat64}) {
    expect_nan_of_a_gate(type, torch::kCPU);
  }
}

TEST(ReluFfnNan, OfAGateStaysOnAGpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
  for (const auto type : {torch::kBFloat16, torch::kFloat32, torch::kFloat64}) {
    expect_nan_of_a_gate(type, torch::kCUDA);
  }
}

TEST(ReluFfn, IsTheSameWithoutGradients) {
  for (const auto type : {torch::kBFloat16, torch::kFloat32, torch::kFloat64}) {
    Leaves leaves = Leaves(129, 64, 136, -0.5).to(type);
    const FfnWeights weights{leaves.gate, leaves.up, leaves.down};
    const std::vector<Tensor> given = {leaves.x, leaves.gate, leaves.up, leaves.down};
    std::vector<Tensor> before;
    for (const Tensor& t : given) before.push_back(t.detach().clone());
    for (const auto counts : {FfnCounts::kNone, FfnCounts::kL1, FfnCounts::kAll}) {
      const FfnOutput want = relu_ffn(leaves.x, weights, FfnPath::kDense, counts);
      const torch::NoGradGuard no_grad;
      const FfnOutput got = relu_ffn(leaves.x, weights, FfnPath::kDense, counts);
      EXPECT_TRUE(got.y.equal(want.y)) << type;
      if (counts != FfnCounts::kNone) {
        EXPECT_TRUE(got.l1.equal(want.l1)) << type;
      }
      if (counts == FfnCounts::kAll) {
        EXPECT_TRUE(got.activity.equal(want.activity)) << type;
      }
      for (size_t i = 0; i < given.size(); ++i) EXPECT_TRUE(given[i].equal(before[i])) << i;
    }
  }
}

TEST(ReluFfn, KeepsNoGraphWithoutGradients) {
  const Leaves leaves = Leaves(4, 64, 136, 0).to(torch::kBFloat16);
  const torch::NoGradGuard no_grad;
  EXPECT_FALSE(
      relu_ffn(leaves.x, {leaves.gate, leaves.up, leaves.down}, FfnPath::kDense).y.requires_grad());
}

TEST(Density, CountsATile) {
  Tensor x = torch::zeros({300, 64});
  Tensor gate = -torch::ones({136, 64});
  x.slice(0, 86, 214).select(1, 0).fill_(1);  // the 128 tokens in the middle
  gate[7][0] = 1;                             // active for all of them
  x[100][1] = 1;
  gate[9][1] = 2;  // and this one for one token
  gate[9][0] = -1;
  const std::vector<double> density = measure_density(x, gate).values();
  EXPECT_DOUBLE_EQ(density[0], 127.0 / 128 + 1.0 / 128);  // token 100: 1 - 1 = 0 for neuron 7
  EXPECT_DOUBLE_EQ(density[1], 2);
  EXPECT_FALSE(measure_density(x.slice(0, 0, 0), gate).defined());
}

TEST(Density, SpreadsItsTilesOverABatch) {
  // Token i fires neuron i / 1024: the four quarters have nothing in common, a tile has one neuron.
  const Tensor x = torch::zeros({4096, 64}), gate = torch::zeros({136, 64});
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    x.slice(0, 1024 * quarter, 1024 * (quarter + 1)).select(1, quarter).fill_(1);
    gate[quarter][quarter] = 1;
  }
  gate[4][3] = 1;  // a second one in the last quarter
  EXPECT_EQ(measure_density(x, gate).values(), (std::vector<double>{1.25, 1.25}));
  const Tensor small = x.slice(0, 2048, 3071);  // of 1023 tokens a tile is more than an eighth
  EXPECT_EQ(measure_density(small, gate).values(), (std::vector<double>{1, 1}));
}

TEST(Chooser, FollowsTheMode) {
  const Leaves leaves = Leaves(8, 64, 136, 0).to(torch::kBFloat16);
  const FfnWeights weights{leaves.gate, leaves.up, leaves.down};
  FfnChooser chooser;
  chooser.observe(leaves.x, weights, FfnMode::kDense);
  chooser.observe(leaves.x, weights, FfnMode::kTwell);
  EXPECT_EQ(chooser.choose(leaves.x, weights, FfnMode::kDense, false), FfnPath::kDense);
  EXPECT_EQ(chooser.choose(leaves.x, weights, FfnMode::kTwell, false), FfnPath::kSparse);
  EXPECT_EQ(chooser.calls, 0);
}

// A block with nothing active is the sparse path's best case, one with all active its worst. In
// float32 no machine's sparse kernels overtake a dense product at full density.
TEST(Chooser, PicksDenseForDenseAndSparseForSparse) {
  for (const bool sparse : {true, false}) {
    const Leaves leaves = Leaves(512, 512, 2048, sparse ? -50 : 50).to(torch::kFloat32);
    const FfnWeights weights{leaves.gate, leaves.up, leaves.down};
    FfnChooser chooser;
    chooser.observe(leaves.x, weights, FfnMode::kAuto);
    const FfnPath path = chooser.choose(leaves.x, weights, FfnMode::kAuto, false);
    EXPECT_EQ(path, sparse ? FfnPath::kSparse : FfnPath::kDense);
    EXPECT_DOUBLE_EQ(chooser.density.active, sparse ? 0 : 2048);
  }
}

// Blocks of 512 x 512 x 2048 in float32, in which `active` neurons fire for every token.
struct Density {
  explicit Density(int64_t active) : gate(torch::full({2048, 512}, -1.0f)) {
    gate.narrow(0, 0, active).fill_(1);
  }
  FfnWeights weights() const { return {gate, gate, gate}; }

  const Tensor x = torch::ones({512, 512});
  Tensor gate;
};

TEST(Chooser, TakesAMeasurementWithTheOneAfterIt) {
  const Density many(2000), few(0);
  FfnChooser chooser;
  const auto call = [](FfnChooser& c, const Density& d, int64_t times) {
    for (int64_t i = 0; i < times; ++i) c.observe(d.x, d.weights(), FfnMode::kAuto);
  };
  call(chooser, many, FfnChooser::kInterval);  // the first counts at once
  EXPECT_EQ(chooser.density.active, 2000);
  call(chooser, few, FfnChooser::kInterval);
  EXPECT_EQ(chooser.density.active, 2000);
  ASSERT_TRUE(chooser.measured.defined());
  EXPECT_EQ(chooser.measured.values(), (std::vector<double>{0, 0}));
  // From a checkpoint: it goes on with what was under way.
  FfnChooser resumed;
  resumed.calls = chooser.calls;
  resumed.density = chooser.density;
  resumed.measured = Readback(chooser.measured.values());
  for (FfnChooser* c : {&chooser, &resumed}) {
    call(*c, many, 1);
    EXPECT_EQ(c->density.active, 2000 * FfnChooser::kMemory);
    EXPECT_EQ(c->density.tile_union, 2000 * FfnChooser::kMemory);
    call(*c, many, FfnChooser::kInterval);
    EXPECT_EQ(c->density.active, 2000 * (FfnChooser::kMemory * FfnChooser::kMemory + 0.5));
  }
}

// Around the break-even it stays with what it has: dense until sparse gains kMargin, sparse until
// it loses.
TEST(Chooser, DoesNotFlipAtTheBreakEven) {
  const Density block(0);
  const auto ratio = [&](double active) {  // dense / sparse, as predicted
    const FfnPlan plan = plan_for(block.x, 2048, FfnPath::kAuto, true, {active, active});
    return plan.predicted_dense_ms / plan.predicted_sparse_ms;
  };
  ASSERT_GT(ratio(0), 1 + FfnChooser::kMargin);
  ASSERT_LT(ratio(2048), 1);
  const auto density_at = [&](double wanted) {  // by bisection: the ratio falls with the density
    double low = 0, high = 2048;
    for (int i = 0; i < 50; ++i) {
      const double middle = (low + high) / 2;
      (ratio(middle) > wanted ? low : high) = middle;
    }
    return low;
  };
  const double between = density_at(1 + FfnChooser::kMargin / 2);
  ASSERT_GT(ratio(between), 1);
  ASSERT_LT(ratio(between), 1 + FfnChooser::kMargin);
  FfnChooser chooser;
  const auto choose = [&](double active) {
    chooser.density = {active, active};
    return chooser.choose(block.x, block.weights(), FfnMode::kAuto, true);
  };
  EXPECT_EQ(choose(2048), FfnPath::kDense);
  EXPECT_EQ(choose(between), FfnPath::kDense);
  EXPECT_EQ(choose(density_at(1.2 + FfnChooser::kMargin)), FfnPath::kSparse);
  EXPECT_EQ(choose(between), FfnPath::kSparse);
  EXPECT_EQ(choose(density_at(0.99)), FfnPath::kDense);
  EXPECT_EQ(choose(between), FfnPath::kDense);
}

TEST(Mode, IsParsedAndNamed) {
  EXPECT_EQ(parse_ffn_mode("twell"), FfnMode::kTwell);
  EXPECT_STREQ(name_of(FfnMode::kAuto), "auto");
  EXPECT_THROW(parse_ffn_mode("sparse"), Error);
}

}  // namespace
}  // namespace twell::app
