// Times the core's CPU forward alone, to tune kernels and the planner's constants: no PyTorch.
// (The official comparison is `twell bench ffn`.)
//
//   cpu_ffn [--tokens 512] [--hidden 2048] [--neurons 5632] [--threads 2] [--density 0.01]
//           [--trace DIR --layer L] [--isa 0..3] [--heavy N] [--block N] [--repeat 20]
//
// Prints the median and the least time of one forward, and the processor time (which neighbours
// on the machine disturb less), with four layers' weights in rotation.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/ffn.h"
#include "twell/ffn.h"

namespace {

using twell::bf16;
constexpr int kLayers = 4;
constexpr std::int64_t kPatternTokens = 512;

template <class T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(1);
  }
  std::vector<T> data(static_cast<std::size_t>(file.tellg()) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(data.data()),
            static_cast<std::streamsize>(data.size() * sizeof(T)));
  return data;
}

void* aligned(std::size_t bytes) { return std::aligned_alloc(4096, (bytes + 4096) / 4096 * 4096); }

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> flags;
  for (int i = 1; i + 1 < argc; i += 2) flags[argv[i] + 2] = argv[i + 1];
  const auto number = [&](const char* name, double otherwise) {
    return flags.count(name) ? std::atof(flags[name].c_str()) : otherwise;
  };
  const auto tokens = static_cast<std::int64_t>(number("tokens", 512));
  const auto hidden = static_cast<std::int64_t>(number("hidden", 2048));
  const auto neurons = static_cast<std::int64_t>(number("neurons", 5632));
  const double density = number("density", 0.01);

  // pattern[t][n], t < kPatternTokens: where the gate is positive. Column t of x and G makes it so.
  std::mt19937_64 random(1);
  std::vector<char> pattern(static_cast<std::size_t>(kPatternTokens * neurons));
  if (flags.count("trace")) {
    const std::string base = flags["trace"] + "/layer" + flags["layer"];
    const auto rowptr = read<std::uint32_t>(base + ".rowptr.u32");
    const auto cols = read<std::uint16_t>(base + ".cols.u16");
    for (std::int64_t t = 0; t < kPatternTokens; ++t) {
      for (auto i = rowptr[t]; i < rowptr[t + 1]; ++i) pattern[t * neurons + cols[i]] = 1;
    }
  } else {
    for (char& p : pattern) p = random() % 1000000 < density * 1e6;
  }
  std::normal_distribution<float> normal;
  const auto make = [&](std::int64_t rows, float scale) {
    auto* m = static_cast<bf16*>(aligned(static_cast<std::size_t>(rows * hidden) * 2));
    for (std::int64_t i = 0; i < rows * hidden; ++i) {
      m[i] = i < 65536 * 3 ? twell::to_bf16(scale * normal(random)) : m[i - 65521 * 3];
    }
    return m;
  };
  const float small = 1 / std::sqrt(static_cast<float>(hidden));
  bf16* x = make(tokens, 1);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t k = 0; k < kPatternTokens; ++k) {
      x[t * hidden + k] = twell::to_bf16(k == t % kPatternTokens ? 10 : 0);
    }
  }
  twell::FfnWeights weights[kLayers];
  for (auto& w : weights) {
    bf16* gate = make(neurons, small);
    for (std::int64_t n = 0; n < neurons; ++n) {
      for (std::int64_t k = 0; k < kPatternTokens; ++k) {
        gate[n * hidden + k] = twell::to_bf16(pattern[k * neurons + n] ? 1 : -1);
      }
    }
    w = {gate, make(neurons, small), make(neurons, small)};
  }

  twell::Device device = twell::cpu_device(static_cast<int>(number("threads", 2)));
  device.isa = static_cast<twell::CpuIsa>(number("isa", static_cast<int>(device.isa)));
  twell::PlanOptions options;
  options.path = twell::FfnPath::kSparse;
  auto plan =
      twell::plan_ffn({twell::FfnKind::kGated, twell::DType::kBf16, tokens, hidden, neurons},
                      device, options)
          .value();
  plan.heavy_tokens = static_cast<int>(number("heavy", plan.heavy_tokens));
  plan.block_neurons = static_cast<int>(number("block", plan.block_neurons));
  plan.chunk_tokens = static_cast<std::int64_t>(number("chunk", plan.chunk_tokens));
  plan.tile_tokens = static_cast<int>(number("tile", plan.tile_tokens));
  plan.workspace_bytes = twell::cpu::forward_workspace_bytes(plan);

  twell::FfnForwardArgs args;
  std::int64_t l0 = 0;
  args.x = x;
  args.y = aligned(static_cast<std::size_t>(tokens * hidden) * 2);
  args.workspace = aligned(plan.workspace_bytes);
  args.stats.l0 = &l0;
  std::vector<double> ms, cpu_ms;
  const int repeat = static_cast<int>(number("repeat", 20));
  for (int i = -2; i < repeat; ++i) {
    args.weights = weights[(i + kLayers) % kLayers];
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t cpu_start = std::clock();
    if (const auto status = twell::ffn_forward(plan, args); !status.ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      return 1;
    }
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    const double cpu_time = 1e3 * static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
    if (i >= 0) {
      ms.push_back(time.count());
      cpu_ms.push_back(cpu_time / device.threads);
    }
  }
  std::sort(ms.begin(), ms.end());
  std::sort(cpu_ms.begin(), cpu_ms.end());
  std::printf(
      "%s layer %s density %g tokens %ld tile %d chunk %ld block %d heavy %d: %.1f active, median "
      "%.3f ms, least %.3f ms, processor %.3f ms a thread\n",
      twell::name_of(device.isa), flags["layer"].c_str(), density, static_cast<long>(tokens),
      plan.tile_tokens, static_cast<long>(plan.chunk_tokens), plan.block_neurons, plan.heavy_tokens,
      static_cast<double>(l0) / static_cast<double>(tokens), ms[ms.size() / 2], ms[0],
      cpu_ms[cpu_ms.size() / 2]);
}
