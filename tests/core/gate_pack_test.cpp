// gate_pack on the CPU, for every instruction set of the machine: against words made here from a
// float64 product, and bit by bit against the product that the same kernels give.

#include "twell/gate_pack.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/support.h"
#include "cpu/kernels.h"

namespace twell {
namespace {

struct Case {
  TwellShape shape;
  std::int64_t hidden;
  std::vector<bf16> x, gate;

  // Elements are multiples of 1/8 in [-1, 1], so that every product is exact in float32 and rounds
  // to the same bf16 in any order of summation; or normal numbers. The gate's last column, which
  // meets 1 in x, sets how many values are positive.
  Case(TwellShape s, std::int64_t h, double bias, bool exact = true) : shape(s), hidden(h) {
    std::mt19937_64 random(static_cast<std::uint64_t>(s.rows * 1000003 + s.columns * 1009 + h));
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<bf16>& v, std::int64_t rows) {
      v.resize(static_cast<std::size_t>(rows * hidden));
      for (bf16& e : v) {
        assign(e, exact ? (static_cast<double>(random() % 17) - 8) / 8 : normal(random));
      }
    };
    fill(x, shape.rows);
    fill(gate, shape.columns);
    for (std::int64_t t = 0; t < shape.rows; ++t) assign(x[(t + 1) * hidden - 1], 1);
    for (std::int64_t n = 0; n < shape.columns; ++n) assign(gate[(n + 1) * hidden - 1], bias);
  }
};

struct Packed {
  std::vector<std::uint32_t> words;
  std::int64_t overflow = -1;
};

Packed run(const Case& c, const Device& device) {
  const auto bytes = gate_pack_workspace_bytes(c.shape, c.hidden, device);
  EXPECT_TRUE(bytes.ok()) << bytes.status().message();
  Packed out;
  Buffer workspace(bytes.value()), words(static_cast<std::size_t>(c.shape.words()) * 4);
  GatePackArgs args;
  args.x = c.x.data();
  args.gate = c.gate.data();
  args.hidden = c.hidden;
  args.words = words.as<std::uint32_t>();
  args.overflow_tile_rows = &out.overflow;
  args.workspace = workspace.data();
  const Status status = gate_pack(c.shape, device, args);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(words.guard_intact());
  EXPECT_TRUE(workspace.guard_intact());
  out.words.assign(words.as<std::uint32_t>(), words.as<std::uint32_t>() + c.shape.words());
  return out;
}

Packed encoded(const TwellShape& shape, const std::vector<bf16>& values) {
  Packed out;
  out.words.resize(static_cast<std::size_t>(shape.words()));
  const auto overflow = twell_encode(shape, values, out.words);
  EXPECT_TRUE(overflow.ok());
  out.overflow = overflow->tile_rows;
  return out;
}

// relu(x Gᵀ) in float64, rounded once.
std::vector<bf16> oracle(const Case& c) {
  std::vector<bf16> values(static_cast<std::size_t>(c.shape.rows * c.shape.columns));
  for (std::int64_t t = 0; t < c.shape.rows; ++t) {
    for (std::int64_t n = 0; n < c.shape.columns; ++n) {
      double sum = 0;
      for (std::int64_t k = 0; k < c.hidden; ++k) {
        sum += value_of(c.x[t * c.hidden + k]) * value_of(c.gate[n * c.hidden + k]);
      }
      assign(values[t * c.shape.columns + n], sum < 0 ? 0 : sum);
    }
  }
  return values;
}

void expect_same(const Packed& got, const Packed& want) {
  EXPECT_EQ(got.overflow, want.overflow);
  ASSERT_EQ(got.words, want.words);
}

void expect_exact_on_every_isa(const Case& c) {
  const Packed want = encoded(c.shape, oracle(c));
  for (const CpuIsa isa : machine_isas()) {
    SCOPED_TRACE(std::string(name_of(isa)) + ", rows " + std::to_string(c.shape.rows) +
                 ", columns " + std::to_string(c.shape.columns) + ", slots " +
                 std::to_string(c.shape.slots) + ", hidden " + std::to_string(c.hidden));
    const Packed one = run(c, device_of(isa, 1));
    expect_same(one, want);
    for (const int threads : {2, 3, 8}) expect_same(run(c, device_of(isa, threads)), one);
  }
}

TEST(GatePack, EveryWordAsEncodedFromTheExactProduct) {
  for (const std::int64_t rows : {0, 1, 8, 9, 127, 128, 129, 1000}) {
    for (const double bias : {-1024.0, -4.0, 0.0, 1024.0}) {  // 0, a few, 50 and 100 % active
      expect_exact_on_every_isa(Case({rows, 264, 32}, 24, bias));
    }
  }
  for (const std::int64_t columns : {1, 31, 255, 256, 257, 1000}) {
    expect_exact_on_every_isa(Case({40, columns, 16}, 72, -2));
  }
  for (const int slots : {8, 16, 32, 64, 128}) {
    expect_exact_on_every_isa(Case({150, 520, slots}, 40, -1));
  }
}

TEST(GatePack, WidestMatrix) { expect_exact_on_every_isa(Case({3, 65536, 64}, 8, -3)); }

TEST(GatePack, SameBitsAsTheKernelsProduct) {
  const Case c({300, 776, 32}, 264, -20, false);
  for (const CpuIsa isa : machine_isas()) {
    SCOPED_TRACE(name_of(isa));
    const auto& kernels = cpu::kernels<bf16>(isa);
    const std::int64_t ldc = cpu::padded(c.shape.rows);
    Buffer panel(sizeof(bf16) * cpu::panel_elements(c.hidden, c.shape.rows));
    Buffer product(sizeof(float) * c.shape.columns * ldc);
    kernels.pack_transposed({c.x.data(), c.hidden}, c.shape.rows, c.hidden, panel.as<bf16>());
    kernels.multiply({c.gate.data(), c.hidden}, c.shape.columns, c.hidden, panel.as<bf16>(),
                     c.shape.rows, product.as<float>(), ldc, false, nullptr);
    std::vector<bf16> values(static_cast<std::size_t>(c.shape.rows * c.shape.columns));
    for (std::int64_t t = 0; t < c.shape.rows; ++t) {
      for (std::int64_t n = 0; n < c.shape.columns; ++n) {
        values[t * c.shape.columns + n] = to_bf16(product.as<float>()[n * ldc + t]);
      }
    }
    const Packed want = encoded(c.shape, values);
    EXPECT_GT(want.overflow, 0);
    expect_same(run(c, device_of(isa, 2)), want);
  }
}

TEST(GatePack, KeepsNanAndInfinity) {
  for (const std::int64_t rows : {4, 40}) {
    Case c({rows, 100, 128}, 16, 0);
    assign(c.x[0], std::numeric_limits<double>::quiet_NaN());
    assign(c.x[1 * 16 + 2], std::numeric_limits<double>::infinity());
    const std::vector<bf16> want = oracle(c);
    for (const CpuIsa isa : machine_isas()) {
      SCOPED_TRACE(name_of(isa));
      const Packed got = run(c, device_of(isa, 2));
      std::vector<bf16> values(want.size());
      const Status status = twell_decode(c.shape, got.words, values);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(got.words[0], 100u);  // relu(NaN) is NaN
      for (std::size_t i = 0; i < want.size(); ++i) {
        const double v = value_of(values[i]), w = value_of(want[i]);
        ASSERT_TRUE(v == w || (std::isnan(v) && std::isnan(w))) << i << ": " << v << ", not " << w;
      }
    }
  }
}

TEST(GatePack, ArgumentsAreRefusedByName) {
  const Case c({10, 40, 8}, 16, 0);
  const Device device = cpu_device(1);
  Buffer workspace(gate_pack_workspace_bytes(c.shape, c.hidden, device).value() + 64);
  std::vector<std::uint32_t> words(static_cast<std::size_t>(c.shape.words()));
  std::int64_t overflow = 0;
  GatePackArgs good;
  good.x = c.x.data();
  good.gate = c.gate.data();
  good.hidden = c.hidden;
  good.words = words.data();
  good.overflow_tile_rows = &overflow;
  good.workspace = workspace.data();
  ASSERT_TRUE(gate_pack(c.shape, device, good).ok());
  const auto expect_refused = [&](const char* text, auto change) {
    GatePackArgs args = good;
    TwellShape shape = c.shape;
    Device changed = device;
    change(args, shape, changed);
    const Status status = gate_pack(shape, changed, args);
    EXPECT_FALSE(status.ok()) << text;
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  using Args = GatePackArgs;
  using Shape = TwellShape;
  expect_refused("x is null", [](Args& a, Shape&, Device&) { a.x = nullptr; });
  expect_refused("gate is null", [](Args& a, Shape&, Device&) { a.gate = nullptr; });
  expect_refused("words is null", [](Args& a, Shape&, Device&) { a.words = nullptr; });
  expect_refused("overflow_tile_rows is null",
                 [](Args& a, Shape&, Device&) { a.overflow_tile_rows = nullptr; });
  expect_refused("workspace is null", [](Args& a, Shape&, Device&) { a.workspace = nullptr; });
  expect_refused("workspace is not 64-byte aligned", [](Args& a, Shape&, Device&) {
    a.workspace = static_cast<char*>(a.workspace) + 8;
  });
  expect_refused("hidden is 12", [](Args& a, Shape&, Device&) { a.hidden = 12; });
  expect_refused("hidden is 0", [](Args& a, Shape&, Device&) { a.hidden = 0; });
  expect_refused("slots is 9", [](Args&, Shape& s, Device&) { s.slots = 9; });
  expect_refused("columns is 65537", [](Args&, Shape& s, Device&) { s.columns = 65537; });
  expect_refused("device.threads is 0", [](Args&, Shape&, Device& d) { d.threads = 0; });
  // Without CUDA kernels by that name; with them, a device of compute capability 0.
  expect_refused("gate_pack: ", [](Args&, Shape&, Device& d) { d.type = DeviceType::kCuda; });
  if (detect_cpu_isa() != CpuIsa::kAmxBf16) {
    expect_refused("device.isa is amx_bf16",
                   [](Args&, Shape&, Device& d) { d.isa = CpuIsa::kAmxBf16; });
  }
}

}  // namespace
}  // namespace twell
