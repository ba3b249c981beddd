#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "app/bench/patterned_ffn.h"
#include "app/error.h"
#include "app/inspect/observe.h"
#include "app/inspect/report.h"

namespace twell::app {
namespace {

ModelConfig small_config(const std::string& activation = "relu") {
  ModelConfig c;
  c.vocab_size = 50;
  c.hidden_size = 32;
  c.intermediate_size = LayerWidths({80, 24, 104});
  c.num_hidden_layers = 3;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.max_position_embeddings = 64;
  c.hidden_act = activation;
  c.tie_word_embeddings = true;
  return c;
}

TokenStream some_tokens(std::int64_t count) {
  TokenStream stream(50);
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(i * i % 47);
  stream.append(ids);
  return stream;
}

// The oracle is the dense block's own count of active neurons.
TEST(Observe, CountsWhatTheModelCounts) {
  Llama model = Llama::create(small_config(), 3, torch::kFloat32, torch::kCPU);
  const TokenStream stream = some_tokens(70);
  const std::vector<Trace> traces = observe(model, stream, {.context = 32, .max_tokens = 1000});
  ASSERT_EQ(traces.size(), 3u);

  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> counts;
  for (const int neurons : {80, 24, 104}) counts.push_back(torch::zeros({neurons}, torch::kInt64));
  for (const int first : {0, 32}) {  // two whole windows; the rest is left out
    torch::Tensor tokens = torch::empty({1, 32}, torch::kInt64);
    for (int i = 0; i < 32; ++i) tokens[0][i] = stream[first + i];
    std::vector<FfnOutput> outputs;
    ForwardOptions options;
    options.ffn_outputs = &outputs;
    model.forward(tokens, options);
    for (int layer = 0; layer < 3; ++layer) counts[layer] += outputs[layer].activity;
  }
  for (int layer = 0; layer < 3; ++layer) {
    const Trace& trace = traces[layer];
    EXPECT_EQ(trace.layer, layer);
    ASSERT_EQ(trace.neurons, counts[layer].size(0));
    EXPECT_EQ(trace.tokens(), 64);
    EXPECT_EQ(static_cast<std::int64_t>(trace.cols.size()), counts[layer].sum().item<int64_t>());
    for (int n = 0; n < trace.neurons; ++n) {
      EXPECT_EQ(std::count(trace.cols.begin(), trace.cols.end(), n),
                counts[layer][n].item<std::int64_t>());
      EXPECT_FLOAT_EQ(trace.rate[n], counts[layer][n].item<float>() / 64);
    }
  }
}

TEST(Observe, TakesAShortText) {
  Llama model = Llama::create(small_config(), 3, torch::kFloat32, torch::kCPU);
  EXPECT_EQ(observe(model, some_tokens(5), {.context = 32})[0].tokens(), 5);
  EXPECT_EQ(observe(model, some_tokens(64), {.context = 32, .max_tokens = 10})[0].tokens(), 10);
  EXPECT_THROW(observe(model, some_tokens(0), {}), Error);
}

TEST(Observe, RefusesWhatIsNotRelu) {
  Llama model = Llama::create(small_config("silu"), 3, torch::kFloat32, torch::kCPU);
  try {
    observe(model, some_tokens(5), {});
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("'silu'"), std::string::npos);
  }
}

TEST(InspectReport, SaysWhatTheTracesSay) {
  Trace sparse = random_pattern(256, 1024, 0.005, 1);
  Trace full = random_pattern(256, 512, 1.0, 1);
  full.layer = 6;
  const std::vector<Trace> traces = {sparse, full};
  const auto report = inspect_report("somewhere", traces, {.hidden = 512});
  EXPECT_EQ(report["source"], "somewhere");
  EXPECT_EQ(report["tokens"], 256);
  ASSERT_EQ(report["layers"].size(), 2u);
  const auto& first = report["layers"][0];
  const auto& second = report["layers"][1];
  EXPECT_NEAR(double{first["active_mean"]}, 5.12, 0.6);
  EXPECT_EQ(second["layer"], 6);
  EXPECT_EQ(first["neurons"], 1024);
  EXPECT_EQ(second["neurons"], 512);
  EXPECT_EQ(second["active_mean"], 512.0);
  EXPECT_EQ(second["active_max"], 512);
  EXPECT_EQ(second["union_mean"]["128"], 512.0);
  EXPECT_EQ(second["overflow_share"]["128"], 1.0);
  EXPECT_EQ(first["overflow_share"]["128"], 0.0);
  EXPECT_GT(double{first["predicted"]["prefill_512"]}, double{second["predicted"]["prefill_512"]});
  EXPECT_GT(double{first["predicted"]["decode_1"]}, 1.0);
  EXPECT_THROW(inspect_report("nothing", {}, {}), Error);
}

TEST(InspectReport, IsDrawn) {
  const std::vector<Trace> traces = {random_pattern(256, 1024, 0.01, 1),
                                     random_pattern(256, 64, 0.01, 1)};
  const auto report = inspect_report("a<b", {traces.data(), 1}, {.hidden = 512});
  const std::string text = draw_text(report);
  EXPECT_NE(text.find("a<b: layers: 1, neurons of each: 1024, tokens: 256"), std::string::npos);
  EXPECT_NE(text.find("████████████████████"), std::string::npos);  // the largest mean: a full bar
  EXPECT_NE(draw_text(inspect_report("x", traces, {.hidden = 512}))
                .find("x: layers: 2, neurons of each: 64 to 1024, tokens: 256"),
            std::string::npos);
  const std::string page = draw_html(report);
  EXPECT_NE(page.find("a&lt;b"), std::string::npos);
  EXPECT_EQ(page.find("src="), std::string::npos);
  EXPECT_NE(page.find("prefers-color-scheme:dark"), std::string::npos);
}

}  // namespace
}  // namespace twell::app
