#include "app/model/recompute.h"

#include <gtest/gtest.h>

#include "app/model/llama.h"
#include "app/train/loss.h"
#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

using torch::Tensor;
using torch::autograd::variable_list;

TEST(Recompute, GivesTheSameBitsAndRunsAgainInBackward) {
  torch::manual_seed(2);
  const Tensor w = torch::randn({6, 6}).requires_grad_(true);
  const Tensor unused = torch::randn({3}).requires_grad_(true);
  int runs = 0;
  const auto run = [&](const Tensor& x) -> variable_list {
    ++runs;
    const Tensor y = torch::tanh(torch::mm(x, w));
    return {y, y.abs().sum(), y.gt(0).sum(), torch::ones({2})};
  };
  for (const int used : {0, 1, 2}) {  // which of the first two outputs the loss depends on; both
    const auto gradients = [&](bool again) {
      const Tensor x = torch::linspace(-1, 1, 30).view({5, 6}).requires_grad_(true);
      w.mutable_grad().reset();
      const variable_list y = again ? recompute(run, x * 2, {w, unused}) : run(x * 2);
      EXPECT_EQ(y.size(), 4u);
      EXPECT_FALSE(y[2].requires_grad());
      EXPECT_FALSE(y[3].requires_grad());
      Tensor loss = torch::zeros({});
      if (used != 1) loss = loss + y[0].square().sum();
      if (used != 0) loss = loss + 3 * y[1];
      loss.backward();
      return variable_list{y[0].detach(), y[1].detach(), x.grad(), w.grad()};
    };
    runs = 0;
    const variable_list want = gradients(false);
    EXPECT_EQ(runs, 1);
    const variable_list got = gradients(true);
    EXPECT_EQ(runs, 3);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(got[i].equal(want[i])) << used << " " << i;
    EXPECT_FALSE(unused.grad().defined());
  }
  runs = 0;
  const torch::NoGradGuard no_grad;
  EXPECT_FALSE(recompute(run, torch::ones({1, 6}), {w})[0].requires_grad());
  EXPECT_EQ(runs, 1);
}

// Loss and gradients of a model, two batches after each other, with and without recomputation.
TEST(Recompute, LeavesAModelItsBits) {
  ModelConfig config;
  config.vocab_size = 48;
  config.hidden_size = 32;
  config.intermediate_size = 72;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.initializer_range = 0.3;
  config.tie_word_embeddings = true;
  for (const char* kind : {"llama", "qwen2"}) {
    for (const char* activation : {"relu", "silu"}) {
      for (const FfnMode mode : {FfnMode::kDense, FfnMode::kTwell, FfnMode::kAuto}) {
        config.model_type = kind;
        config.hidden_act = activation;
        if (mode == FfnMode::kTwell && config.hidden_act == "silu") continue;
        const auto gradients = [&](bool again) {
          Llama model = Llama::create(config, 7, torch::kBFloat16, torch::kCPU);
          for (auto& [name, value] : model.parameters()) value.requires_grad_(true);
          variable_list result;
          for (int part = 0; part < 2; ++part) {
            const Tensor tokens = (torch::arange(3 * 18) * (17 + 4 * part) % 48).view({3, 18});
            std::vector<FfnOutput> ffns;
            ForwardOptions options;
            options.ffn = mode;
            options.ffn_outputs = &ffns;
            options.recompute = again;
            const Tensor hidden = model.forward(tokens.narrow(1, 0, 17), options);
            Tensor loss = linear_cross_entropy(hidden.reshape({51, 32}), model.head(),
                                               tokens.narrow(1, 1, 17).reshape({-1}));
            for (const FfnOutput& ffn : ffns) {
              loss = loss + 1e-3 * ffn.l1;
              result.insert(result.end(), {ffn.l1.detach(), ffn.l0, ffn.activity});
              result.push_back(torch::tensor(static_cast<int64_t>(ffn.path)));
            }
            EXPECT_EQ(ffns.size(), model.is_relu() ? 3u : 0u);
            loss.backward();
            result.push_back(loss.detach());
          }
          for (const FfnChooser& chooser : model.choosers()) {
            result.push_back(torch::tensor(chooser.calls));
          }
          for (const auto& [name, value] : model.parameters()) result.push_back(value.grad());
          return result;
        };
        const variable_list want = gradients(false), got = gradients(true);
        ASSERT_EQ(got.size(), want.size());
        for (size_t i = 0; i < want.size(); ++i) {
          EXPECT_TRUE(got[i].equal(want[i]))
              << kind << " " << activation << " " << name_of(mode) << " " << i;
        }
      }
    }
  }
}

TEST(Recompute, ExcludesACache) {
  ModelConfig config;
  config.intermediate_size = config.vocab_size = config.hidden_size = 16;
  config.num_hidden_layers = config.num_attention_heads = config.num_key_value_heads = 1;
  config.head_dim = 16;
  Llama model = Llama::create(config, 7, torch::kFloat32, torch::kCPU);
  KvCache cache(8);
  ForwardOptions options;
  options.cache = &cache;
  options.recompute = true;
  EXPECT_ERROR(model.forward(torch::zeros({1, 2}, torch::kInt64), options), "exclude each other");
}

}  // namespace
}  // namespace twell::app
