// The CPU backward against a float64 oracle written here, for every instruction set of the machine.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/support.h"
#include "twell/ffn.h"

namespace twell {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// All elements are multiples of 1/8 in [-1, 1], so g, u and dh are exact in float32 and the
// activity pattern is the same for every type and order of summation.
template <class T>
struct Case : FfnTensors<T> {
  std::vector<T> grad_y;
  double grad_l1 = 0.25;

  Case(FfnKind kind, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons, double density)
      : FfnTensors<T>(kind, tokens, hidden, neurons) {
    const auto eighths = [this] { return (static_cast<double>(this->random() % 17) - 8) / 8; };
    this->fill(this->x, tokens, eighths);
    this->fill(this->gate, neurons, eighths);
    this->fill(this->up, neurons, eighths);
    this->fill(this->down, neurons, eighths);
    this->fill(grad_y, tokens, eighths);
    for (std::int64_t t = 0; t < tokens; ++t) this->set_token_bias(t, 1);
    for (std::int64_t n = 0; n < neurons; ++n) set_density(n, density);
  }

  void set_density(std::int64_t n, double density) {
    const double deviation = 0.375 * std::sqrt(static_cast<double>(this->problem.hidden - 1));
    this->set_neuron_bias(n, density <= 0 ? -2048
                             : density >= 1
                                 ? 2048
                                 : std::round(8 * deviation * normal_quantile(density)) / 8);
  }
};

// A gradient and, per element, the sum of its terms' sizes.
struct Gradient {
  std::vector<double> value, size;
  explicit Gradient(std::int64_t elements = 0)
      : value(static_cast<std::size_t>(elements)), size(value) {}
  void add(std::int64_t at, double term) {
    value[at] += term;
    size[at] += std::abs(term);
  }
};

struct Oracle {
  Gradient x, gate, up, down;
};

// The dense block's backward, term by term, as PyTorch's autograd defines it.
template <class T>
Oracle oracle(const Case<T>& c) {
  const auto [kind, dtype, tokens, hidden, neurons] = c.problem;
  const bool gated = kind == FfnKind::kGated;
  const auto dot = [hidden = hidden](const T* a, const T* b) {
    double sum = 0;
    for (std::int64_t k = 0; k < hidden; ++k) sum += value_of(a[k]) * value_of(b[k]);
    return sum;
  };
  Oracle out{Gradient(tokens * hidden), Gradient(neurons * hidden), Gradient(neurons * hidden),
             Gradient(neurons * hidden)};
  for (std::int64_t t = 0; t < tokens; ++t) {
    const T* x = c.x.data() + t * hidden;
    const T* dy = c.grad_y.data() + t * hidden;
    for (std::int64_t n = 0; n < neurons; ++n) {
      const T* up = c.up.data() + n * hidden;
      const T* down = c.down.data() + n * hidden;
      const T* gate = gated ? c.gate.data() + n * hidden : up;
      const double pre = dot(x, gate);
      T rounded;
      assign(rounded, pre < 0 ? 0 : pre);
      const double g = value_of(rounded);
      const double u = gated ? dot(x, up) : 1;
      const double h = g * u;
      const double sign = h > 0 ? 1 : h < 0 ? -1 : 0;
      const double dh = dot(dy, down) + c.grad_l1 * sign;
      const double dg = g <= 0 ? 0 : dh * u;
      const double du = gated ? dh * g : 0;
      for (std::int64_t k = 0; k < hidden; ++k) {
        const std::int64_t weight = n * hidden + k;
        (gated ? out.gate : out.up).add(weight, dg * value_of(x[k]));
        out.x.add(t * hidden + k, dg * value_of(gate[k]));
        if (gated) {
          out.up.add(weight, du * value_of(x[k]));
          out.x.add(t * hidden + k, du * value_of(up[k]));
        }
        out.down.add(weight, h * value_of(dy[k]));
      }
    }
  }
  return out;
}

// `count` of a case's tokens, from `first` on.
template <class T>
Case<T> part_of(const Case<T>& whole, std::int64_t first, std::int64_t count) {
  Case<T> part = whole;
  part.problem.tokens = count;
  for (std::vector<T>* rows : {&part.x, &part.grad_y}) {
    const auto begin = rows->begin() + first * whole.problem.hidden;
    *rows = std::vector<T>(begin, begin + count * whole.problem.hidden);
  }
  return part;
}

// A forward that saves, then any number of backwards.
template <class T>
class Pass {
 public:
  Pass(const Case<T>& c, Device device) : case_(c) {
    poison_weight_gradients();
    plan_ = sparse_plan(c.problem, device, /*training=*/true);
    saved_ = std::make_unique<Buffer>(plan_.saved_bytes);
    Buffer y(c.x.size() * sizeof(T));
    Buffer workspace(plan_.workspace_bytes);
    FfnForwardArgs args;
    args.x = c.x.data();
    args.weights = case_.weights();
    args.y = y.data();
    args.saved = saved_->data();
    args.workspace = workspace.data();
    const Status status = ffn_forward(plan_, args);
    EXPECT_TRUE(status.ok()) << status.message();
  }

  // The gradients named by a letter of `wanted`: x, g, u, d.
  void backward(const std::string& wanted = "xgud") {
    poison_weight_gradients();
    run(wanted, false);
  }

  // Those of the weights are added to what they hold.
  void accumulate(const std::string& wanted = "xgud") { run(wanted, true); }
  void hold(const std::vector<T>& values) {
    for (Buffer* gradient : {gate.get(), up.get(), down.get()}) {
      std::copy(values.begin(), values.end(), gradient->template as<T>());
    }
  }

  bool gated() const { return plan_.problem.kind == FfnKind::kGated; }
  const FfnPlan& plan() const { return plan_; }

  std::unique_ptr<Buffer> x, gate, up, down;

 private:
  void poison_weight_gradients() {
    for (std::unique_ptr<Buffer>* gradient : {&gate, &up, &down}) {
      *gradient = std::make_unique<Buffer>(case_.up.size() * sizeof(T));
    }
  }

  void run(const std::string& wanted, bool accumulate) {
    const Buffer saved_before = *saved_;
    x = std::make_unique<Buffer>(case_.x.size() * sizeof(T));
    Buffer workspace(plan_.backward_workspace_bytes);
    const auto want = [&](char name, Buffer& buffer) {
      return wanted.find(name) == std::string::npos ? nullptr : buffer.data();
    };
    const float l1_float = static_cast<float>(case_.grad_l1);
    FfnBackwardArgs args;
    args.grad_y = case_.grad_y.data();
    args.grad_l1 = sizeof(T) == 8 ? static_cast<const void*>(&case_.grad_l1) : &l1_float;
    args.x = case_.x.data();
    args.weights = case_.weights();
    args.saved = saved_->data();
    args.grad_x = want('x', *x);
    args.grad_gate = gated() ? want('g', *gate) : nullptr;
    args.grad_up = want('u', *up);
    args.grad_down = want('d', *down);
    args.accumulate = accumulate;
    args.workspace = workspace.data();
    const Status status = ffn_backward(plan_, args);
    EXPECT_TRUE(status.ok()) << status.message();
    for (const Buffer* b : {x.get(), gate.get(), up.get(), down.get(), &workspace}) {
      EXPECT_TRUE(b->guard_intact());
    }
    EXPECT_TRUE(*saved_ == saved_before) << "the saved buffer was written";
  }

  const Case<T>& case_;
  FfnPlan plan_;
  std::unique_ptr<Buffer> saved_;
};

// u is rounded to T, then dg, du or h, then the gradient: three roundings; sums lose a little more.
// What has no terms, such as a silent neuron's gradient, must be exactly 0.
template <class T>
void expect_matches(const char* name, const Gradient& want, Buffer& got, int roundings = 3) {
  const double tolerance = (roundings + 0.1) * kEpsilon<T> + kSummingError<T>;
  const T* values = got.as<T>();
  for (std::size_t i = 0; i < want.value.size(); ++i) {
    const double value = value_of(values[i]);
    if (!std::isfinite(want.value[i])) {
      ASSERT_TRUE(std::isnan(want.value[i]) ? std::isnan(value) : value == want.value[i])
          << "grad_" << name << " element " << i << ": " << value << ", wanted " << want.value[i];
      continue;
    }
    ASSERT_LE(std::abs(value - want.value[i]), tolerance * want.size[i])
        << "grad_" << name << " element " << i << ": " << value << ", wanted " << want.value[i];
  }
}

template <class T>
void expect_matches(const Oracle& want, Pass<T>& got) {
  expect_matches<T>("x", want.x, *got.x);
  expect_matches<T>("up", want.up, *got.up);
  expect_matches<T>("down", want.down, *got.down);
  if (got.gated()) expect_matches<T>("gate", want.gate, *got.gate);
}

template <class T>
void expect_same_bits(const Pass<T>& a, const Pass<T>& b) {
  EXPECT_TRUE(*a.x == *b.x);
  EXPECT_TRUE(*a.gate == *b.gate);
  EXPECT_TRUE(*a.up == *b.up);
  EXPECT_TRUE(*a.down == *b.down);
}

template <class T>
std::string describe(const Case<T>& c, CpuIsa isa) {
  return std::string(name_of(isa)) + ", " + name_of(c.problem.kind) + ", tokens " +
         std::to_string(c.problem.tokens) + ", hidden " + std::to_string(c.problem.hidden) +
         ", neurons " + std::to_string(c.problem.neurons);
}

template <class T>
void expect_matches_on_every_isa(const Case<T>& c) {
  const Oracle want = oracle(c);
  for (const CpuIsa isa : machine_isas()) {
    SCOPED_TRACE(describe(c, isa));
    Pass<T> run(c, device_of(isa, 1));
    run.backward();
    expect_matches(want, run);
  }
}

template <class T>
class FfnBackward : public testing::Test {};
using Types = testing::Types<bf16, float, double>;
TYPED_TEST_SUITE(FfnBackward, Types);

constexpr FfnKind kKinds[] = {FfnKind::kGated, FfnKind::kPlain};

TYPED_TEST(FfnBackward, MatchesFloat64AtEveryDensityAndShape) {
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.0, 0.005, 0.1, 0.5, 1.0}) {
      SCOPED_TRACE("density " + std::to_string(density));
      for (const std::int64_t tokens : {0, 1, 7, 8, 9, 33, 127, 128, 129}) {
        expect_matches_on_every_isa(Case<TypeParam>(kind, tokens, 24, 40, density));
      }
      expect_matches_on_every_isa(Case<TypeParam>(kind, 1, 8, 8, density));
      expect_matches_on_every_isa(Case<TypeParam>(kind, 1000, 40, 72, density));
    }
  }
}

// Each crosses a boundary of some blocking: hidden columns 256 and 512, neurons 128 and 512.
TYPED_TEST(FfnBackward, MatchesFloat64AcrossBlocks) {
  for (const double density : {0.05, 0.6}) {
    expect_matches_on_every_isa(Case<TypeParam>(FfnKind::kGated, 130, 536, 24, density));
    expect_matches_on_every_isa(Case<TypeParam>(FfnKind::kGated, 129, 24, 1048, density));
    expect_matches_on_every_isa(Case<TypeParam>(FfnKind::kPlain, 3, 264, 1048, density));
  }
}

TYPED_TEST(FfnBackward, MatchesFloat64AtUnevenPatterns) {
  for (const FfnKind kind : kKinds) {
    Case<TypeParam> one_neuron(kind, 200, 24, 136, 0);
    one_neuron.set_density(131, 1);
    expect_matches_on_every_isa(one_neuron);

    Case<TypeParam> hot_neurons(kind, 300, 24, 136, 0.01);
    for (const int n : {0, 7, 64, 135}) hot_neurons.set_density(n, n == 7 ? 0.5 : 1);
    expect_matches_on_every_isa(hot_neurons);

    Case<TypeParam> heavy_token(kind, 150, 24, 136, 0);
    heavy_token.set_token_bias(140, -1);  // turns every neuron's bias round
    expect_matches_on_every_isa(heavy_token);

    Case<TypeParam> one_busy_tile(kind, 512, 24, 40, 0);  // heavy in a tile, light over the chunk
    for (int t = 128; t < 228; ++t) one_busy_tile.set_token_bias(t, -1);
    expect_matches_on_every_isa(one_busy_tile);
  }
}

TYPED_TEST(FfnBackward, MatchesFloat64OverSeveralChunks) {
  for (const std::int64_t tokens : {4097, 65537}) {
    Case<TypeParam> c(FfnKind::kGated, tokens, 8, 8, 0.05);
    c.set_density(1, 1);
    c.set_density(2, 0.5);
    c.set_density(3, 0);
    const Oracle want = oracle(c);
    Pass<TypeParam> run(c, cpu_device(2));
    run.backward();
    expect_matches(want, run);
  }
}

TYPED_TEST(FfnBackward, SameBitsForAnyNumberOfThreads) {
  for (const std::int64_t tokens : {5, 300, 4200}) {
    Case<TypeParam> c(FfnKind::kGated, tokens, 40, 72, 0.1);
    for (int n = 10; n < 50; ++n) c.set_density(n, 0.7);
    for (const CpuIsa isa : machine_isas()) {
      SCOPED_TRACE(describe(c, isa));
      Pass<TypeParam> one(c, device_of(isa, 1));
      one.backward();
      for (const int threads : {2, 3, 8}) {
        Pass<TypeParam> many(c, device_of(isa, threads));
        for (int repetition = 0; repetition < 2; ++repetition) {
          many.backward();
          expect_same_bits(one, many);
        }
      }
    }
  }
}

TYPED_TEST(FfnBackward, EachOutputIsOptional) {
  for (const FfnKind kind : kKinds) {
    const Case<TypeParam> c(kind, 150, 24, 72, 0.4);
    Pass<TypeParam> all(c, cpu_device(2)), some(c, cpu_device(2));
    all.backward();
    for (int subset = 0; subset < 16; ++subset) {
      std::string wanted;
      for (int i = 0; i < 4; ++i) {
        if (subset >> i & 1) wanted += "xgud"[i];
      }
      SCOPED_TRACE("wanted: " + wanted);
      some.backward(wanted);
      const auto expect = [&](char name, const Buffer& got, const Buffer& want) {
        const Buffer untouched(name == 'x' ? c.x.size() * sizeof(TypeParam)
                                           : c.up.size() * sizeof(TypeParam));
        EXPECT_TRUE(got == (wanted.find(name) == std::string::npos ? untouched : want)) << name;
      };
      expect('x', *some.x, *all.x);
      expect('u', *some.up, *all.up);
      expect('d', *some.down, *all.down);
      if (kind == FfnKind::kGated) expect('g', *some.gate, *all.gate);
    }
  }
}

// What gradients hold before a pass adds to them, exact in every type.
template <class T>
std::vector<T> old_values(std::size_t count) {
  std::mt19937_64 random(3);
  std::vector<T> values(count);
  for (T& v : values) {
    const int size = static_cast<int>(random() % 24) - 12;
    assign(v, std::ldexp(static_cast<double>(random() % 255) - 127, size));
  }
  return values;
}

template <class T>
void expect_old(const std::vector<T>& old, Buffer& got, std::int64_t first, std::int64_t count) {
  EXPECT_EQ(std::memcmp(old.data() + first, got.as<T>() + first, count * sizeof(T)), 0);
}

TYPED_TEST(FfnBackward, AddsToWhatTheGradientsHold) {
  constexpr std::int64_t kHidden = 24, kNeurons = 40, kSilent = 7;
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.0, 0.1, 1.0}) {
      for (const std::int64_t tokens : {0, 1, 129, 4097}) {
        Case<TypeParam> c(kind, tokens, kHidden, kNeurons, density);
        c.set_density(kSilent, 0);
        std::vector<TypeParam> old = old_values<TypeParam>(c.up.size());
        assign(old[3], kNan);
        assign(old[4], -kInfinity);
        Oracle want = oracle(c);
        for (Gradient* gradient : {&want.gate, &want.up, &want.down}) {
          for (std::size_t i = 0; i < old.size(); ++i) gradient->add(i, value_of(old[i]));
        }
        for (const CpuIsa isa : machine_isas()) {
          SCOPED_TRACE(describe(c, isa) + ", density " + std::to_string(density));
          Pass<TypeParam> one(c, device_of(isa, 1)), three(c, device_of(isa, 3));
          for (Pass<TypeParam>* run : {&one, &three}) {
            run->hold(old);
            run->accumulate();
          }
          expect_matches(want, one);
          expect_same_bits(one, three);
          const bool any = tokens > 0;
          for (Buffer* gradient : {one.gate.get(), one.up.get(), one.down.get()}) {
            expect_old(old, *gradient, any ? kSilent * kHidden : 0, any ? kHidden : c.up.size());
          }
        }
      }
    }
  }
}

TYPED_TEST(FfnBackward, AccumulatesOnlyWhatIsWanted) {
  const Case<TypeParam> c(FfnKind::kGated, 150, 24, 72, 0.4);
  const std::vector<TypeParam> old = old_values<TypeParam>(c.up.size());
  Pass<TypeParam> all(c, cpu_device(2)), some(c, cpu_device(2));
  for (Pass<TypeParam>* run : {&all, &some}) run->hold(old);
  all.accumulate();
  some.accumulate("ud");
  expect_old(old, *some.gate, 0, c.up.size());
  EXPECT_TRUE(*some.up == *all.up);
  EXPECT_TRUE(*some.down == *all.down);
}

// The first part's gradients are rounded once more.
TYPED_TEST(FfnBackward, AccumulatesPartsToTheWhole) {
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.05, 0.6}) {
      const Case<TypeParam> whole(kind, 300, 24, 72, density);
      const Case<TypeParam> first = part_of(whole, 0, 170), second = part_of(whole, 170, 130);
      const Oracle want = oracle(whole);
      for (const CpuIsa isa : machine_isas()) {
        SCOPED_TRACE(describe(whole, isa));
        Pass<TypeParam> earlier(first, device_of(isa, 2)), run(second, device_of(isa, 2));
        earlier.backward();
        run.gate = std::move(earlier.gate);
        run.up = std::move(earlier.up);
        run.down = std::move(earlier.down);
        run.accumulate();
        if (run.gated()) expect_matches<TypeParam>("gate", want.gate, *run.gate, 4);
        expect_matches<TypeParam>("up", want.up, *run.up, 4);
        expect_matches<TypeParam>("down", want.down, *run.down, 4);
      }
    }
  }
}

TYPED_TEST(FfnBackward, NanAndInfinitySpreadAsInTheDenseBlock) {
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.0, 0.05, 0.6}) {
      for (const double bad : {kNan, kInfinity, -kInfinity}) {
        SCOPED_TRACE("density " + std::to_string(density) + ", value " + std::to_string(bad));
        for (const std::int64_t tokens : {5, 150}) {
          const Case<TypeParam> good(kind, tokens, 24, 40, density);
          Case<TypeParam> bad_x = good, bad_dy = good, bad_both = good, bad_l1 = good;
          assign(bad_x.x[2 * 24 + 3], bad);
          assign(bad_dy.grad_y[1 * 24 + 7], bad);
          assign(bad_both.x[2 * 24 + 3], bad);
          assign(bad_both.grad_y[2 * 24 + 9], bad);
          assign(bad_both.grad_y[4 * 24], bad);
          bad_l1.grad_l1 = bad;
          for (const auto& c : {bad_x, bad_dy, bad_both, bad_l1}) expect_matches_on_every_isa(c);
        }
      }
    }
  }
}

// As twell/ffn.h says: what no token activates is not read, so 0 · inf does not arise.
TYPED_TEST(FfnBackward, NanAndInfinityInASilentNeuronsWeightsHaveNoEffect) {
  for (const FfnKind kind : kKinds) {
    for (const std::int64_t tokens : {5, 150}) {
      Case<TypeParam> good(kind, tokens, 24, 40, 0.4);
      good.set_density(7, 0);
      for (const double bad : {kNan, kInfinity, -kInfinity}) {
        Case<TypeParam> c = good;
        assign(c.down[7 * 24 + 3], bad);
        if (kind == FfnKind::kGated) assign(c.up[7 * 24 + 3], bad);
        for (const CpuIsa isa : machine_isas()) {
          SCOPED_TRACE(describe(c, isa) + ", value " + std::to_string(bad));
          Pass<TypeParam> clean(good, device_of(isa, 1)), got(c, device_of(isa, 1));
          clean.backward();
          got.backward();
          expect_same_bits(clean, got);
        }
      }
    }
  }
}

// At u = 0 a neuron may be active with h = 0: the L1 term has no gradient there.
TYPED_TEST(FfnBackward, L1GradientAtZero) {
  Case<TypeParam> c(FfnKind::kGated, 20, 8, 8, 1);
  c.grad_l1 = 3;
  for (auto& e : c.grad_y) assign(e, 0);
  for (int k = 0; k < 8; ++k) assign(c.up[3 * 8 + k], 0);  // neuron 3: u = 0, hence h = 0
  for (const CpuIsa isa : machine_isas()) {
    Pass<TypeParam> run(c, device_of(isa, 1));
    run.backward();
    for (int n = 0; n < 8; ++n) {
      double size = 0;
      for (int k = 0; k < 8; ++k) {
        size += std::abs(value_of(run.gate->template as<TypeParam>()[n * 8 + k]));
        size += std::abs(value_of(run.up->template as<TypeParam>()[n * 8 + k]));
        EXPECT_EQ(value_of(run.down->template as<TypeParam>()[n * 8 + k]), 0);
      }
      EXPECT_EQ(size == 0, n == 3) << "neuron " << n;
    }
    expect_matches(oracle(c), run);
  }
}

// The gradients against differences of the forward itself, along random directions.
TEST(FfnBackwardDifferences, AgreeInFloat64) {
  for (const FfnKind kind : kKinds) {
    Case<double> c(kind, 40, 16, 48, 0.3);
    std::mt19937_64 random(5);
    std::normal_distribution<double> normal;
    const auto noise = [&](std::size_t size) {
      std::vector<double> v(size);
      for (double& e : v) e = normal(random);
      return v;
    };
    const auto moved = [](const std::vector<double>& v, const std::vector<double>& by, double h) {
      std::vector<double> out = v;
      for (std::size_t i = 0; i < v.size(); ++i) out[i] += h * by[i];
      return out;
    };
    // Off the grid, where g or u may be 0 and the loss has a kink.
    for (std::vector<double>* v : {&c.x, &c.gate, &c.up, &c.down}) {
      *v = moved(*v, noise(v->size()), 0.01);
    }
    const auto loss = [](const Case<double>& at) {
      const FfnPlan plan = sparse_plan(at.problem, cpu_device(1), /*training=*/false);
      Buffer y(at.x.size() * sizeof(double)), workspace(plan.workspace_bytes);
      double l1 = 0;
      FfnForwardArgs args;
      args.x = at.x.data();
      args.weights = at.weights();
      args.y = y.data();
      args.stats.l1 = &l1;
      args.workspace = workspace.data();
      EXPECT_TRUE(ffn_forward(plan, args).ok());
      double sum = at.grad_l1 * l1;
      for (std::size_t i = 0; i < at.x.size(); ++i) sum += at.grad_y[i] * y.as<double>()[i];
      return sum;
    };
    Pass<double> run(c, cpu_device(1));
    run.backward();
    const auto check = [&](const char* name, std::vector<double> Case<double>::*member,
                           Buffer& gradient) {
      const std::vector<double> direction = noise((c.*member).size());
      const double step = 1e-6;
      Case<double> ahead = c, behind = c;
      ahead.*member = moved(c.*member, direction, step);
      behind.*member = moved(c.*member, direction, -step);
      const double difference = (loss(ahead) - loss(behind)) / (2 * step);
      double slope = 0;
      for (std::size_t i = 0; i < direction.size(); ++i) {
        slope += direction[i] * gradient.as<double>()[i];
      }
      EXPECT_NEAR(difference, slope, 1e-5 * (1 + std::abs(slope))) << name;
    };
    check("x", &Case<double>::x, *run.x);
    check("up", &Case<double>::up, *run.up);
    check("down", &Case<double>::down, *run.down);
    if (kind == FfnKind::kGated) check("gate", &Case<double>::gate, *run.gate);
  }
}

}  // namespace
}  // namespace twell
