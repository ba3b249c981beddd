#include "app/compact/compact.h"

#include <gtest/gtest.h>

#include "app/model/llama.h"
#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

using torch::Tensor;

TEST(Compaction, KeepsWhatFiredAndRoundsTheWidth) {
  const Tensor first = torch::tensor(std::vector<int64_t>(40, 0));
  Tensor second = first.clone();
  for (const int64_t n : {3, 5, 6, 10, 17, 21, 30, 33, 39}) second[n] = n;
  const Compaction plan = plan_compaction({first, second}, 8);
  EXPECT_EQ(plan.width, 16);
  EXPECT_EQ(plan.kept[0].size(0), 0);
  EXPECT_TRUE(plan.kept[1].equal(torch::tensor({3, 5, 6, 10, 17, 21, 30, 33, 39}, torch::kInt64)));
  EXPECT_EQ(plan_compaction({first}, 8).width, 8);  // no width of 0
  EXPECT_EQ(plan_compaction({second}, 32).width, 32);
  EXPECT_ERROR(plan_compaction({first, second}, 40), "needs 9 of its 40 neurons");
  EXPECT_ERROR(plan_compaction({first, second}, 64), "multiple of 64");
  EXPECT_ERROR(plan_compaction({torch::ones({40}, torch::kInt64)}, 8), "nothing to remove");
}

TEST(Compaction, WritesTheKeptRowsBitForBit) {
  ModelConfig config;
  config.vocab_size = 24;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 2;
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.hidden_act = "relu";
  const TemporaryFolder folder;
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    const std::string tag = c10::toString(dtype);
    const auto from = folder / ("from" + tag), to = folder / ("to" + tag);
    std::filesystem::create_directories(from);
    Llama::create(config, 5, torch::kFloat32, torch::kCPU).save(from, dtype);
    put(from / "tokenizer.json", "{}");
    put(from / "chat_template.jinja", "x");
    put(from / "notes.txt", "stays behind");

    Compaction plan;
    plan.width = 8;
    plan.kept = {torch::tensor({1, 2, 23}, torch::kInt64), torch::arange(4, 12, torch::kInt64)};
    write_compacted(from, to, plan);
    EXPECT_EQ(contents(to / "chat_template.jinja"), "x");
    EXPECT_EQ(contents(to / "tokenizer.json"), "{}");
    EXPECT_FALSE(std::filesystem::exists(to / "notes.txt"));
    EXPECT_EQ(read_config(to).dtype, dtype == torch::kFloat32 ? "float32" : "bfloat16");
    EXPECT_ERROR(write_compacted(from, to, plan), to.string());

    const Llama whole = Llama::load(from, dtype, dtype, torch::kCPU);
    const Llama cut = Llama::load(to, dtype, dtype, torch::kCPU);
    for (const auto& [name, value] : cut.parameters()) {
      const Tensor old = whole.parameters().at(name);
      if (name.find(".mlp.") == std::string::npos) {
        EXPECT_TRUE(value.equal(old)) << name;
        continue;
      }
      const Tensor kept = plan.kept[name.find("layers.0") != std::string::npos ? 0 : 1];
      ASSERT_EQ(value.sizes(), (std::vector<int64_t>{8, 16})) << name;  // neuron-major
      for (int64_t n = 0; n < 8; ++n) {
        const bool is_kept = n < kept.size(0);
        const Tensor want =
            is_kept ? old[kept[n].item<int64_t>()] : torch::zeros({16}, old.options());
        EXPECT_TRUE(value[n].equal(want)) << name << " " << n;
      }
    }
    EXPECT_EQ(checkpoint_bytes(from) - checkpoint_bytes(to),
              2 * 3 * (24 - 8) * 16 * int64_t(c10::elementSize(dtype)));
  }
}

TEST(Compaction, WantsAnEmptyFolder) {
  const TemporaryFolder folder;
  EXPECT_NO_THROW(check_output_folder(folder.path()));
  EXPECT_NO_THROW(check_output_folder(folder / "new"));
  put(folder / "a/file", "x");
  EXPECT_ERROR(check_output_folder(folder / "a"), (folder / "a").string());
  EXPECT_ERROR(check_output_folder(folder / "a/file"), "empty folder");
}

}  // namespace
}  // namespace twell::app
