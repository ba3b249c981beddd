#include "app/bench/model_bench.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "app/bench/energy.h"
#include "app/bench/patterned_ffn.h"
#include "app/bench/patterned_model.h"
#include "app/bench/peak_memory.h"
#include "app/bench/timer.h"
#include "tests/app/call_counter.h"
#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

using torch::Tensor;

ModelConfig small_config() {
  ModelConfig config;
  config.vocab_size = 48;
  config.hidden_size = 64;
  config.intermediate_size = 136;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.hidden_act = "relu";
  return config;
}

std::vector<Trace> two_patterns(double density) {
  return {random_pattern(32, 136, density, 7), random_pattern(32, 136, density / 2, 8)};
}

TEST(PatternedModel, FiresExactlyWhereThePatternsSay) {
  for (const double density : {0.0, 0.05, 0.5, 1.0}) {
    const auto patterns = two_patterns(density);
    Llama model = patterned_model(small_config(), patterns, 3, torch::kCPU);
    const Tensor tokens = torch::arange(2 * 48, torch::kInt64).view({2, 48}) % 48;
    EXPECT_TRUE(follows_patterns(model, patterns, tokens));
    // The oracle counts in float64: which neurons are above zero for which token.
    ForwardOptions options;
    int layers = 0;
    options.on_ffn = [&](int layer, const Tensor& x, const FfnWeights& weights) {
      ++layers;
      const Tensor active =
          torch::mm(x.to(torch::kFloat64), weights.gate.to(torch::kFloat64).t()).gt(0);
      const Trace& pattern = patterns[static_cast<std::size_t>(layer % 2)];
      for (std::int64_t i = 0; i < 96; ++i) {
        const Tensor expected = torch::zeros({136}, torch::kBool);
        for (const auto n : pattern.row(i % 48 % 32)) expected[n] = true;
        ASSERT_TRUE(active[i].equal(expected)) << density << " " << layer << " " << i;
      }
    };
    const torch::NoGradGuard no_grad;
    model.forward(tokens, options);
    EXPECT_EQ(layers, 3);
  }
  const auto patterns = two_patterns(0.1);
  Llama model = patterned_model(small_config(), patterns, 3, torch::kCPU);
  EXPECT_FALSE(follows_patterns(model, two_patterns(0.2), torch::zeros({1, 1}, torch::kInt64)));
  EXPECT_ERROR(patterned_model(small_config(), {random_pattern(33, 136, 0.1, 7)}, 3, torch::kCPU),
               "1 to 32");
  EXPECT_ERROR(patterned_model(small_config(), {random_pattern(32, 128, 0.1, 7)}, 3, torch::kCPU),
               "136");
  EXPECT_ERROR(patterned_model(small_config(), {}, 3, torch::kCPU), "at least one");
  ModelConfig uneven = small_config();
  uneven.intermediate_size = LayerWidths({136, 40, 136});
  const std::vector<Trace> unlike = {random_pattern(32, 136, 0.1, 7),
                                     random_pattern(32, 40, 0.1, 8)};
  Llama other = patterned_model(uneven, unlike, 3, torch::kCPU);
  EXPECT_TRUE(follows_patterns(other, unlike, torch::arange(32, torch::kInt64).view({1, 32})));
  EXPECT_ERROR(patterned_model(uneven, patterns, 3, torch::kCPU), "layer 1 has 136");
}

TEST(PatternedModel, TokensFollowTheRows) {
  const Tensor tokens = patterned_tokens(10, 3, 12, 4);
  EXPECT_EQ(tokens.sizes(), (std::vector<std::int64_t>{3, 12}));
  for (std::int64_t window = 0; window < 3; ++window) {
    for (std::int64_t i = 0; i < 12; ++i) {
      EXPECT_EQ(tokens[window][i].item<std::int64_t>(), (window * 10 / 3 + i + 4) % 10);
    }
  }
}

TEST(BenchModel, ComparesTheFormsOfAModel) {
  const auto patterns = two_patterns(0.1);
  for (const ModelWork work : {ModelWork::kForward, ModelWork::kEval, ModelWork::kTrain}) {
    const bool training = work == ModelWork::kTrain;
    Llama model = patterned_model(small_config(), patterns, 3, torch::kCPU);
    const std::vector<Tensor> batches = {patterned_tokens(32, 3, 33, 0),
                                         patterned_tokens(32, 3, 33, 1)};
    ModelBenchOptions options;
    options.work = work;
    options.forms = {FfnMode::kDense, FfnMode::kTwell, FfnMode::kAuto};
    options.seconds = 0;
    const auto r = bench_model(model, batches, options);
    EXPECT_EQ(r["mode"], name_of(work));
    EXPECT_EQ(r["batch"], 3);
    EXPECT_EQ(r["tokens"], 32);
    EXPECT_EQ(r["parameters"], model.parameter_count());
    EXPECT_GE(r["rounds"], 3);
    EXPECT_DOUBLE_EQ(double{r["ratio"]}, double{r["dense_ms"]} / double{r["auto_ms"]});
    EXPECT_LE(double{r["loss_difference"]}, 2e-3);
    for (const char* form : {"dense", "twell", "auto"}) {
      EXPECT_GT(double{r["spread_ms"][form]["p10"]}, 0);
      EXPECT_NEAR(double{r["tokens_per_second"][form]}, 96e3 / double{r[std::string(form) + "_ms"]},
                  1e-3);
      EXPECT_TRUE(r["energy_mj_per_token"][form].is_null());
      EXPECT_EQ(r["gradient_norm"][form].is_null(), !training);
      EXPECT_EQ(r["ffn_per_layer"][form].size(), 3u);
    }
    EXPECT_EQ(r["ffn_per_layer"]["dense"][0], "dense");
    EXPECT_EQ(r["ffn_per_layer"]["twell"][2], "sparse");
    EXPECT_NE(std::string(r["energy_missing"]).find("CUDA"), std::string::npos);
    // The steps have not changed what fires.
    EXPECT_TRUE(follows_patterns(model, patterns, batches[1]));
    const double expected = double(patterns[0].cols.size()) / 32;
    EXPECT_NEAR(double{r["active_per_layer"][0]}, expected, 1e-9);
    EXPECT_NEAR(double{r["active_per_layer"][2]}, expected, 1e-9);

    // The loss is that of the model: PyTorch's, by logits.
    const torch::NoGradGuard no_grad;
    const Tensor tokens = batches[(std::int64_t{r["rounds"]} + 1) % 2];
    const Tensor logits = model.logits(model.forward(tokens.narrow(1, 0, 32)));
    const double loss = torch::cross_entropy_loss(logits.to(torch::kFloat32).view({96, 48}),
                                                  tokens.narrow(1, 1, 32).reshape({96}))
                            .item<double>();
    EXPECT_NEAR(double{r["loss"]["twell"]}, loss, 5e-3 * loss);
  }
}

TEST(BenchModel, ComputesLayersAgainIfAsked) {
  const auto patterns = two_patterns(0.1);
  Llama model = patterned_model(small_config(), patterns, 3, torch::kCPU);
  ModelBenchOptions options;
  options.work = ModelWork::kTrain;
  options.seconds = 0;
  std::vector<double> loss, passes;
  for (const bool recompute : {false, true}) {
    options.recompute = recompute;
    const CallCounter attention({"aten::scaled_dot_product_attention"});
    const auto r = bench_model(model, {patterned_tokens(32, 3, 33, 0)}, options);
    EXPECT_EQ(r["checkpoint_activations"], recompute);
    loss.push_back(r["loss"]["twell"]);
    // In each step's layers; one pass more tells the activity, and one step each the peak memory.
    const double steps = 2 * (double{r["rounds"]} + 2) + 2;
    passes.push_back((static_cast<double>(attention.count()) - 3) / (3 * steps));
  }
  EXPECT_EQ(passes, (std::vector<double>{1, 2}));
  EXPECT_NEAR(loss[0], loss[1], 1e-3 * loss[0]);  // the steps in between were tiny
}

TEST(BenchModel, RefusesModelsWithoutRelu) {
  ModelConfig config = small_config();
  config.hidden_act = "silu";
  Llama model = Llama::create(config, 1, torch::kBFloat16, torch::kCPU);
  EXPECT_ERROR(bench_model(model, {patterned_tokens(32, 1, 9, 0)}, {}), "silu");
}

TEST(Quantile, IsOneOfTheValues) {
  EXPECT_EQ(quantile({3}, 0.5), 3);
  EXPECT_EQ(quantile({5, 1, 3}, 0.5), 3);
  EXPECT_EQ(quantile({5, 1, 3}, 0), 1);
  EXPECT_EQ(quantile({5, 1, 3}, 1), 5);
}

TEST(Timer, MeasuresTheCall) {
  const Timer timer(torch::kCPU, true);
  const double ms = timer([] {
    const timespec pause{0, 20'000'000};
    nanosleep(&pause, nullptr);
  });
  EXPECT_GE(ms, 20);
  EXPECT_LT(ms, 2000);
}

TEST(PeakMemory, SeesWhatIsHeldInBetween) {
  constexpr std::int64_t kBytes = 300 << 20;
  const auto nothing = peak_bytes(torch::kCPU, [] {});
  if (!nothing) GTEST_SKIP() << "the system does not tell peaks";
  const auto held = peak_bytes(torch::kCPU, [] { torch::ones({kBytes}, torch::kInt8); });
  EXPECT_GT(*held - *nothing, kBytes * 9 / 10);
  EXPECT_LT(*held - *nothing, kBytes * 2);
  EXPECT_LT(*peak_bytes(torch::kCPU, [] {}) - *nothing, kBytes / 2);  // forgotten
}

TEST(EnergyMeter, SaysWhyItDoesNotWork) {
  const EnergyMeter cpu(torch::kCPU);
  EXPECT_FALSE(cpu.works());
  EXPECT_NE(cpu.reason().find("CUDA"), std::string::npos);
  const EnergyMeter gpu(torch::Device(torch::kCUDA, 0));
  if (!torch::cuda::is_available()) {
    EXPECT_FALSE(gpu.works());
    EXPECT_FALSE(gpu.reason().empty());
  }
}

}  // namespace
}  // namespace twell::app
