#include "app/train/revival.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

using torch::Tensor;

constexpr int64_t kLayers = 2, kHidden = 16;
constexpr int64_t kNeurons[kLayers] = {40, 24};

ModelConfig small_config() {
  ModelConfig config;
  config.vocab_size = 40;
  config.hidden_size = kHidden;
  config.intermediate_size = LayerWidths({kNeurons[0], kNeurons[1]});
  config.num_hidden_layers = kLayers;
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.hidden_act = "relu";
  return config;
}

std::string name_of(int64_t layer, const std::string& part) {
  return "model.layers." + std::to_string(layer) + ".mlp." + part + "_proj.weight";
}

// A model in training whose parameters and moments are all different and not zero.
struct Setting {
  Llama model = Llama::create(small_config(), 1, torch::kFloat32, torch::kCPU);
  AdamW optimizer{model.parameters(), {}};

  Setting() {
    torch::manual_seed(1);
    for (auto& [name, value] : model.parameters()) value.requires_grad_(true);
    for (auto& [name, value] : optimizer.state()) value.normal_();
  }
  std::map<std::string, Tensor> copy() const {
    std::map<std::string, Tensor> result;
    for (const auto& [name, value] : optimizer.state()) result[name] = value.clone();
    for (const auto& [name, value] : model.parameters()) result[name] = value.detach().clone();
    return result;
  }
};

std::vector<Tensor> all_fire_but(const std::vector<int64_t>& silent_in_layer_1) {
  std::vector<Tensor> activity(kLayers);
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    activity[layer] = torch::full({kNeurons[layer]}, 3, torch::kInt64);
  }
  for (const int64_t n : silent_in_layer_1) activity[1][n] = 0;
  return activity;
}

TEST(Revival, RenewsTheGateRowAndForgetsTheMoments) {
  Setting s;
  Revival revival(2, 7, s.model);
  const auto before = s.copy();
  const std::vector<int64_t> none(kLayers, 0);
  EXPECT_EQ(revival.step(1, all_fire_but({5, 11}), s.model, s.optimizer), none);
  for (const auto& [name, value] : s.copy()) EXPECT_TRUE(value.equal(before.at(name))) << name;
  EXPECT_EQ(revival.step(2, all_fire_but({5, 11, 12}), s.model, s.optimizer),
            (std::vector<int64_t>{0, 2}));
  for (const auto& [name, value] : s.copy()) {
    const bool gate = name == name_of(1, "gate");
    const bool moment =
        name.starts_with("adam.") && name.find("layers.1.mlp.") != std::string::npos;
    for (int64_t row = 0; row < value.size(0); ++row) {
      const bool revived = row == 5 || row == 11;
      const Tensor old = before.at(name)[row];
      if (revived && gate) {
        EXPECT_FALSE((value[row] == old).any().item<bool>());
        EXPECT_LT(value[row].abs().max().item<float>(), 0.02f * 6);
        EXPECT_GT(value[row].abs().max().item<float>(), 0.02f / 4);
      } else if (revived && moment) {
        EXPECT_TRUE(value[row].eq(0).all().item<bool>()) << name;
      } else {
        EXPECT_TRUE(value[row].equal(old)) << name << " " << row;
      }
    }
  }
  const Tensor gate = s.model.parameters().at(name_of(1, "gate")).detach();
  EXPECT_FALSE(gate[5].equal(gate[11]));

  // The same seed and step draw the same rows, another step others.
  Setting same, later;
  for (Setting* other : {&same, &later}) {
    Revival again(2, 7, other->model);
    const int64_t first = other == &same ? 1 : 11;
    again.step(first, all_fire_but({5, 11}), other->model, other->optimizer);
    again.step(first + 1, all_fire_but({5, 11}), other->model, other->optimizer);
    EXPECT_EQ(other->model.parameters().at(name_of(1, "gate"))[5].equal(gate[5]), other == &same);
  }
}

TEST(Revival, CountsLikeANaiveCounter) {
  for (const int64_t after : {1, 2, 5, 13}) {
    Setting s;
    Revival revival(after, 3, s.model);
    std::mt19937 random(static_cast<unsigned>(after));
    std::vector<std::vector<int64_t>> idle;
    for (const int64_t neurons : kNeurons) idle.emplace_back(neurons, 0);
    for (int64_t step = 1; step <= 120; ++step) {
      if (step == 60) {  // as after a resume: the counters alone come back
        Revival resumed(after, 3, s.model);
        resumed.idle().copy_(revival.idle());
        revival = resumed;
      }
      std::vector<Tensor> activity(kLayers);
      std::vector<int64_t> want(kLayers, 0);
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        activity[layer] = torch::zeros({kNeurons[layer]}, torch::kInt64);
        for (int64_t n = 0; n < kNeurons[layer]; ++n) {
          const bool fires = std::bernoulli_distribution(0.02 * double(n))(random);
          activity[layer][n] = fires ? 4 : 0;
          idle[layer][n] = fires ? 0 : idle[layer][n] + 1;
          if (idle[layer][n] < after) continue;
          idle[layer][n] = 0;
          ++want[layer];
        }
      }
      ASSERT_EQ(revival.step(step, activity, s.model, s.optimizer), want) << after << " " << step;
    }
  }
}

TEST(Revival, IsOffAtZero) {
  Setting s;
  Revival revival(0, 7, s.model);
  const auto before = s.copy();
  for (int64_t step = 1; step <= 20; ++step) {
    EXPECT_EQ(revival.step(step, all_fire_but({1, 2}), s.model, s.optimizer),
              std::vector<int64_t>(kLayers, 0));
  }
  for (const auto& [name, value] : s.copy()) EXPECT_TRUE(value.equal(before.at(name))) << name;
}

}  // namespace
}  // namespace twell::app
