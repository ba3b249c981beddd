#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "app/error.h"
#include "app/model/decoder.h"
#include "app/model/llama.h"
#include "app/model/sample.h"
#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

using torch::Tensor;

ModelConfig small_config() {
  ModelConfig c;
  c.vocab_size = 48;
  c.hidden_size = 32;
  c.intermediate_size = 72;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.max_position_embeddings = 64;
  c.hidden_act = "relu";
  c.initializer_range = 0.3;
  return c;
}

Llama small_model(const ModelConfig& config = small_config()) {
  return Llama::create(config, 7, torch::kFloat32, torch::kCPU);
}

Tensor some_tokens(int64_t batch, int64_t length) {
  return (torch::arange(batch * length) * 17 % 48).view({batch, length});
}

double difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST(Llama, ShapesAndCounts) {
  const torch::NoGradGuard no_grad;
  Llama model = small_model();
  EXPECT_EQ(model.parameter_count(),
            2 * 48 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 72 * 32));
  EXPECT_EQ(model.ffn_weights(1).down.sizes(), (std::vector<int64_t>{72, 32}));
  for (const int64_t length : {1, 2, 63}) {
    std::vector<FfnOutput> ffns;
    ForwardOptions options;
    options.ffn_outputs = &ffns;
    int observed = 0;
    options.on_ffn = [&](int layer, const Tensor& x, const FfnWeights& weights) {
      EXPECT_EQ(layer, observed++);
      EXPECT_EQ(x.sizes(), (std::vector<int64_t>{3 * length, 32}));
      EXPECT_EQ(weights.gate.sizes(), (std::vector<int64_t>{72, 32}));
    };
    const Tensor hidden = model.forward(some_tokens(3, length), options);
    EXPECT_EQ(hidden.sizes(), (std::vector<int64_t>{3, length, 32}));
    EXPECT_EQ(model.logits(hidden).sizes(), (std::vector<int64_t>{3, length, 48}));
    EXPECT_EQ(observed, 2);
    ASSERT_EQ(ffns.size(), 2u);
    EXPECT_EQ(ffns[0].l0.item<int64_t>(), ffns[0].activity.sum().item<int64_t>());
    EXPECT_FALSE(ffns[0].y.defined());
  }
}

// Without gradients the hidden state is updated where it lies: what goes in and what an observer
// holds must not change, and the values must be those of the pass that keeps a graph.
TEST(Llama, WithoutGradientsIsTheSameAndHarmsNothing) {
  for (const bool relu : {true, false}) {
    ModelConfig config = small_config();
    config.attention_bias = true;
    if (!relu) config.hidden_act = "silu";
    Llama model = small_model(config);
    for (auto& [name, value] : model.parameters()) value.requires_grad_(true);
    const Tensor tokens = some_tokens(3, 20);
    const auto observe = [&](std::vector<Tensor>& held) {
      ForwardOptions options;
      options.on_ffn = [&](int, const Tensor& x, const FfnWeights&) { held.push_back(x); };
      return model.forward(tokens, options).detach();
    };
    std::vector<Tensor> with_graph, without;
    const Tensor want = observe(with_graph);
    std::map<std::string, Tensor> before;
    for (const auto& [name, value] : model.parameters()) before[name] = value.detach().clone();
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(observe(without).equal(want));
    EXPECT_TRUE(observe(without).equal(want));
    ASSERT_EQ(without.size(), 4u);
    for (size_t i = 0; i < 4; ++i) EXPECT_TRUE(without[i].equal(with_graph[i % 2])) << i;
    for (const auto& [name, value] : model.parameters()) {
      EXPECT_TRUE(value.equal(before.at(name))) << name;
    }
    EXPECT_TRUE(tokens.equal(some_tokens(3, 20)));
  }
}

TEST(Llama, SameSeedSameWeights) {
  const Llama a = small_model(), b = small_model();
  const Llama c = Llama::create(small_config(), 8, torch::kFloat32, torch::kCPU);
  for (const auto& [name, value] : a.parameters()) {
    EXPECT_TRUE(value.equal(b.parameters().at(name))) << name;
  }
  EXPECT_FALSE(a.head().equal(c.head()));
}

TEST(Llama, LaterTokensDoNotReachEarlierOnes) {
  const torch::NoGradGuard no_grad;
  Llama model = small_model();
  const Tensor tokens = some_tokens(1, 20);
  const Tensor whole = model.forward(tokens);
  Tensor changed = tokens.clone();
  changed[0][12] = (changed[0][12] + 1) % 48;
  const Tensor other = model.forward(changed);
  EXPECT_LT(difference(whole.narrow(1, 0, 12), other.narrow(1, 0, 12)), 1e-5);
  EXPECT_GT(difference(whole.narrow(1, 12, 1), other.narrow(1, 12, 1)), 1e-3);
}

// Along random directions; the norms are float32's.
TEST(Llama, AttentionGradientsMatchDifferences) {
  torch::manual_seed(3);
  ModelConfig config = small_config();
  config.attention_bias = true;
  Llama model = Llama::create(config, 7, torch::kFloat64, torch::kCPU);
  for (auto& [name, value] : model.parameters()) value = value.to(torch::kFloat64);
  const Tensor tokens = some_tokens(2, 9);
  const auto loss = [&] { return model.forward(tokens).pow(3).sum(); };
  for (const char* kind : {"weight", "bias"}) {
    Tensor& qk = model.parameters().at(std::string("model.layers.0.self_attn.qk_proj.") + kind);
    const Tensor before = qk.clone();
    qk.requires_grad_(true);
    const Tensor gradient = torch::autograd::grad({loss()}, {qk})[0];
    const torch::NoGradGuard no_grad;
    for (const int64_t first : {0, 32}) {  // the rows of q and k
      Tensor direction = torch::zeros_like(before);
      direction.narrow(0, first, first == 0 ? 32 : 16).normal_();
      const auto along = [&](double step) {
        qk.copy_(before + step * direction);
        return loss().item<double>();
      };
      const double step = 3e-4;
      const double want = (along(step) - along(-step)) / (2 * step);
      const double got = (gradient * direction).sum().item<double>();
      qk.copy_(before);
      const double size = (gradient * (direction != 0)).norm().item<double>();
      EXPECT_NEAR(got, want, 0.02 * size) << kind << " from row " << first;
      EXPECT_GT(size, 1) << kind << " from row " << first;
    }
    qk.requires_grad_(false);
  }
}

// One token at a time, in one go, and in uneven parts.
TEST(KvCache, EqualsTheFullForward) {
  const torch::NoGradGuard no_grad;
  for (const int64_t kv_heads : {1, 2, 4}) {
    ModelConfig config = small_config();
    config.num_key_value_heads = kv_heads;
    Llama model = small_model(config);
    const Tensor tokens = some_tokens(2, 41);
    const Tensor whole = model.forward(tokens);
    for (const std::vector<int64_t>& parts :
         {std::vector<int64_t>(41, 1), {41}, {1, 17, 1, 1, 21}}) {
      KvCache cache(41);
      ForwardOptions options;
      options.cache = &cache;
      int64_t at = 0;
      for (const int64_t count : parts) {
        const Tensor step = model.forward(tokens.narrow(1, at, count), options);
        EXPECT_LT(difference(step, whole.narrow(1, at, count)), 2e-5) << "at " << at;
        at += count;
        EXPECT_EQ(cache.length, at);
      }
      EXPECT_THROW(model.forward(tokens.narrow(1, 0, 1), options), Error);
    }
  }
}

// More positions than rotation matrices exist for at once.
TEST(KvCache, ALongPromptMayComeInParts) {
  Llama model = small_model();
  const Tensor tokens = some_tokens(2, 4100);
  Tensor& qk = model.parameters().at("model.layers.0.self_attn.qk_proj.weight");
  qk.requires_grad_(true);
  const Tensor whole = model.forward(tokens);
  // Later tokens change no earlier ones, so neither the gradients of these. A weighted sum, as that
  // of the squares hardly changes: they are normalized.
  const Tensor weights = torch::arange(2 * 2000 * whole.size(2)).view({2, 2000, -1}).cos();
  const auto gradient = [&](const Tensor& hidden) {
    return torch::autograd::grad({(hidden.narrow(1, 0, 2000) * weights).sum()}, {qk})[0];
  };
  const Tensor want = gradient(model.forward(tokens.narrow(1, 0, 2000)));
  EXPECT_LT(difference(gradient(whole), want), 1e-3 * want.abs().max().item<double>());
  const torch::NoGradGuard no_grad;
  KvCache cache(4100);
  ForwardOptions options;
  options.cache = &cache;
  for (const auto& [at, count] : {std::pair(0, 2048), std::pair(2048, 2000), std::pair(4048, 52)}) {
    const Tensor part = model.forward(tokens.narrow(1, at, count), options);
    EXPECT_LT(difference(part, whole.narrow(1, at, count)), 1e-4) << "at " << at;
  }
}

// Steps of fixed shape, whose position is a tensor, as a graph holds them.
TEST(KvCache, StepsInASlotEqualTheFullForward) {
  const torch::NoGradGuard no_grad;
  for (const int64_t kv_heads : {1, 2, 4}) {
    ModelConfig config = small_config();
    config.num_key_value_heads = kv_heads;
    Llama model = small_model(config);
    const Tensor tokens = some_tokens(2, 41);
    const Tensor whole = model.forward(tokens);
    KvCache cache(50);
    ForwardOptions options;
    options.cache = &cache;
    model.forward(tokens.narrow(1, 0, 7), options);
    model.reserve(cache, 50);
    EXPECT_EQ(cache.capacity(), 50);
    cache.slot = torch::zeros({1}, torch::kInt64);
    for (int64_t at = 7; at < 41; ++at) {
      cache.slot.fill_(at);
      const Tensor step = model.forward(tokens.narrow(1, at, 1), options);
      EXPECT_LT(difference(step, whole.narrow(1, at, 1)), 2e-5) << "at " << at;
      EXPECT_EQ(cache.length, 7);
    }
  }
}

void expect_decodes_as_the_full_forward(const torch::Device& device, FfnMode ffn) {
  const torch::InferenceMode inference;
  ModelConfig config = small_config();
  config.max_position_embeddings = 600;
  Llama model = Llama::create(config, 7, torch::kFloat32, device);
  const Tensor tokens = some_tokens(1, 520)[0];
  const Tensor whole =
      model.logits(model.forward(tokens.unsqueeze(0).to(device)))[0].to(torch::kCPU);
  Decoder decoder(model, ffn, 520);
  Tensor logits = decoder.prefill(tokens.narrow(0, 0, 9));
  for (int64_t at = 9; at < 520; ++at) {
    ASSERT_LT(difference(logits.to(torch::kCPU), whole[at - 1]), 1e-4) << "at " << at;
    logits = decoder.step(tokens[at].item<int64_t>());
    ASSERT_EQ(decoder.length(), at + 1);
  }
  EXPECT_THROW(decoder.step(0), Error);
}

TEST(Decoder, EqualsTheFullForward) {
  for (const FfnMode ffn : {FfnMode::kDense, FfnMode::kTwell, FfnMode::kAuto}) {
    expect_decodes_as_the_full_forward(torch::kCPU, ffn);
  }
}

// float32, which the sparse path on CUDA does not offer: what is tested is the captured step.
TEST(Decoder, ReplaysAGraphOnCuda) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "needs a CUDA device";
  expect_decodes_as_the_full_forward(torch::kCUDA, FfnMode::kDense);
}

// In bf16, where CUDA has the sparse path: a replayed step has the bits of one that is not
// captured, in the same slot.
TEST(Decoder, ReplaysTheSameBitsOnCuda) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "needs a CUDA device";
  const torch::InferenceMode inference;
  constexpr int64_t kPrompt = 9, kLength = 64;
  const Tensor tokens = some_tokens(1, kLength)[0];
  for (const FfnMode ffn : {FfnMode::kDense, FfnMode::kTwell, FfnMode::kAuto}) {
    const auto create = [] {
      return Llama::create(small_config(), 7, torch::kBFloat16, torch::kCUDA);
    };
    Llama captured = create(), uncaptured = create();
    Decoder decoder(captured, ffn, kLength);
    KvCache cache(kLength);
    ForwardOptions options;
    options.ffn = ffn;
    options.cache = &cache;
    const auto logits_after = [&](const Tensor& some) {
      const Tensor batch = some.unsqueeze(0).to(torch::kCUDA);
      return uncaptured.logits(uncaptured.forward(batch, options)[0][-1]);
    };
    const Tensor prompt = tokens.narrow(0, 0, kPrompt);
    ASSERT_TRUE(decoder.prefill(prompt).equal(logits_after(prompt))) << name_of(ffn);
    uncaptured.reserve(cache, kLength);
    cache.slot = torch::zeros({1}, torch::TensorOptions(torch::kInt64).device(torch::kCUDA));
    for (int64_t at = kPrompt; at < kLength; ++at) {
      cache.slot.fill_(at);
      const Tensor want = logits_after(tokens.narrow(0, at, 1));
      const Tensor got = decoder.step(tokens[at].item<int64_t>());
      ASSERT_TRUE(got.equal(want))
          << name_of(ffn) << " at " << at << " by " << difference(got, want);
    }
  }
}

TEST(Llama, DenseAndTwellAgree) {
  const torch::NoGradGuard no_grad;
  Llama model = small_model();
  const Tensor tokens = some_tokens(2, 33);
  ForwardOptions options;
  options.ffn = FfnMode::kDense;
  const Tensor dense = model.forward(tokens, options);
  options.ffn = FfnMode::kTwell;
  EXPECT_LT(difference(dense, model.forward(tokens, options)), 1e-4);
}

// Against a model of one width, whose layers have zeros for the neurons that the others lack.
TEST(Llama, LayersMayDifferInWidth) {
  ModelConfig config = small_config();
  config.intermediate_size = LayerWidths({72, 16});
  Llama model = small_model(config), wide = small_model();
  for (auto& [name, value] : model.parameters()) {
    Tensor& other = wide.parameters().at(name);
    if (name.find("layers.1.mlp.") != std::string::npos) {
      ASSERT_EQ(value.sizes(), (std::vector<int64_t>{16, 32})) << name;
      other.zero_().narrow(0, 0, 16).copy_(value);
    } else {
      other.copy_(value);
    }
    value.requires_grad_(true);
    other.requires_grad_(true);
  }
  const Tensor tokens = some_tokens(2, 33);
  for (const FfnMode mode : {FfnMode::kDense, FfnMode::kTwell, FfnMode::kAuto}) {
    for (const bool recompute : {false, true}) {
      std::vector<FfnOutput> ffns;
      ForwardOptions options;
      options.ffn = mode;
      options.ffn_outputs = &ffns;
      options.recompute = recompute;
      const Tensor got = model.forward(tokens, options);
      const Tensor want = wide.forward(tokens, options);
      EXPECT_LT(difference(got, want), 1e-4);
      ASSERT_EQ(ffns.size(), 4u);
      EXPECT_TRUE(ffns[1].activity.equal(ffns[3].activity.narrow(0, 0, 16)));
      model.logits(got).square().sum().backward();
      wide.logits(want).square().sum().backward();
      for (auto& [name, value] : model.parameters()) {
        const Tensor other = wide.parameters().at(name).grad().narrow(0, 0, value.size(0));
        const double size = other.abs().max().item<double>();
        EXPECT_LT(difference(value.grad(), other), 1e-3 * size) << name;
        value.mutable_grad().reset();
        wide.parameters().at(name).mutable_grad().reset();
      }
    }
  }
}

TEST(Llama, WidthsSurviveSaving) {
  const TemporaryFolder folder;
  ModelConfig config = small_config();
  config.intermediate_size = LayerWidths({8, 72});
  const Llama model = small_model(config);
  model.save(folder.path(), torch::kFloat32);
  const Llama loaded = Llama::load(folder.path(), torch::kFloat32, torch::kFloat32, torch::kCPU);
  EXPECT_EQ(loaded.config().intermediate_size, config.intermediate_size);
  for (const auto& [name, value] : model.parameters()) {
    EXPECT_TRUE(loaded.parameters().at(name).equal(value)) << name;
  }
  std::string text = contents(folder / "config.json");
  text.replace(text.find("72"), 2, "64");
  put(folder / "config.json", text);
  EXPECT_ERROR(Llama::load(folder.path(), torch::kFloat32, torch::kFloat32, torch::kCPU),
               "config.json wants [32, 64]");
}

TEST(Llama, RefusesByName) {
  ModelConfig config = small_config();
  config.hidden_act = "silu";
  Llama silu = small_model(config);
  EXPECT_NO_THROW(silu.check_mode(FfnMode::kAuto));
  try {
    silu.check_mode(FfnMode::kTwell);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("silu"), std::string::npos);
  }
  const torch::NoGradGuard no_grad;
  EXPECT_EQ(silu.forward(some_tokens(1, 3)).size(2), 32);
  config = small_config();
  config.mlp_bias = true;
  EXPECT_THROW(small_model(config), Error);
}

TEST(Sampler, IsGreedyAtZeroAndReproducible) {
  const Tensor logits = torch::tensor({0.1, 2.0, 1.9, -3.0});
  EXPECT_EQ(Sampler({.temperature = 0}).draw(logits), 1);
  EXPECT_EQ(Sampler({.temperature = 5, .top_k = 1}).draw(logits), 1);
  EXPECT_EQ(Sampler({.temperature = 5, .top_p = 0}).draw(logits), 1);
  Sampler a({.temperature = 1, .seed = 3}), b({.temperature = 1, .seed = 3});
  for (int i = 0; i < 50; ++i) EXPECT_EQ(a.draw(logits), b.draw(logits));
  EXPECT_THROW(a.draw(torch::tensor({0.0, std::nan("")})), Error);
}

// Frequencies against the probabilities they are drawn from.
TEST(Sampler, DrawsFromTheDistribution) {
  const Tensor p = torch::tensor({0.5, 0.3, 0.15, 0.05}, torch::kFloat64);
  const auto frequencies = [&](SampleOptions options) {
    Sampler sampler(options);
    std::vector<double> counts(4);
    for (int i = 0; i < 4000; ++i) counts[sampler.draw(p.log())] += 1.0 / 4000;
    return counts;
  };
  const auto all = frequencies({.temperature = 1});
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(all[i], p[i].item<double>(), 0.03);
  const auto nucleus = frequencies({.temperature = 1, .top_p = 0.75});  // 0.5 + 0.3 reach it
  EXPECT_NEAR(nucleus[0], 0.625, 0.03);
  EXPECT_NEAR(nucleus[1], 0.375, 0.03);
  const auto three = frequencies({.temperature = 1, .top_k = 3});
  EXPECT_EQ(three[3], 0);
}

}  // namespace
}  // namespace twell::app
