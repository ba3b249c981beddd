#include "app/compact/compact.h"

#include <gtest/gtest.h>

#include "app/model/llama.h"
#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

using torch::Tensor;

Tensor fires(int64_t neurons, const std::vector<int64_t>& which) {
  Tensor counts = torch::zeros({neurons}, torch::kInt64);
  for (const int64_t n : which) counts[n] = n + 1;
  return counts;
}

const std::vector<int64_t> kNine = {3, 5, 6, 10, 17, 21, 30, 33, 39};

TEST(Compaction, KeepsWhatFiredAndRoundsEachWidth) {
  const Tensor none = fires(40, {}), nine = fires(40, kNine);
  const Compaction plan = plan_compaction({none, nine}, 8, false);
  EXPECT_EQ(plan.fired, (std::vector<int64_t>{0, 9}));
  EXPECT_EQ(plan.widths, LayerWidths({8, 16}));  // no width of 0
  // The first silent ones fill up.
  EXPECT_TRUE(plan.kept[0].equal(torch::arange(8, torch::kInt64)));
  EXPECT_TRUE(plan.kept[1].equal(
      torch::tensor({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 21, 30, 33, 39}, torch::kInt64)));
  EXPECT_EQ(plan_compaction({nine, nine}, 8, false).widths, 16);
  EXPECT_EQ(plan_compaction({nine, none}, 32, false).widths, 32);
  // A layer never grows: here it keeps all it has.
  const Compaction uneven = plan_compaction({nine, fires(24, {2}), fires(8, {})}, 16, false);
  EXPECT_EQ(uneven.widths, LayerWidths({16, 16, 8}));
  EXPECT_TRUE(uneven.kept[2].equal(torch::arange(8, torch::kInt64)));
}

TEST(Compaction, GivesOneWidthIfAsked) {
  const Tensor none = fires(40, {}), nine = fires(40, kNine);
  const Compaction plan = plan_compaction({none, nine}, 8, true);
  EXPECT_EQ(plan.widths, 16);
  EXPECT_TRUE(plan.kept[0].equal(torch::arange(16, torch::kInt64)));
  // Layers that differ already may have to grow.
  const Compaction grown = plan_compaction({fires(8, {1}), nine}, 8, true);
  EXPECT_EQ(grown.widths, 16);
  EXPECT_TRUE(grown.kept[0].equal(torch::arange(8, torch::kInt64)));
  EXPECT_EQ(grown.kept[1].size(0), 16);
}

TEST(Compaction, RefusesWidthsThatDifferAndAreNoMultiplesOf8) {
  const Tensor most = fires(20, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}),
               few = fires(20, {2});
  EXPECT_ERROR(plan_compaction({few, most}, 8, false), "layer 1 would have 20");
  EXPECT_EQ(plan_compaction({few, few}, 4, false).widths, 4);
}

TEST(Compaction, SaysWhenThereIsNothingToRemove) {
  const Tensor none = fires(40, {}), nine = fires(40, kNine);
  const Tensor all = torch::ones({40}, torch::kInt64);
  for (const int64_t multiple : {40, 64}) {
    EXPECT_ERROR(plan_compaction({none, nine}, multiple, false), "nothing to remove");
    EXPECT_ERROR(plan_compaction({none, nine}, multiple, false), std::to_string(multiple));
    EXPECT_ERROR(plan_compaction({none, nine}, multiple, false), "layer 1 needs 9 of its 40");
  }
  EXPECT_ERROR(plan_compaction({all}, 8, false), "nothing to remove");
  EXPECT_ERROR(plan_compaction({none, all}, 8, true), "--one-width");
  EXPECT_EQ(plan_compaction({none, all}, 8, false).widths, LayerWidths({8, 40}));
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
    plan.widths = LayerWidths({8, 16});
    plan.kept = {torch::tensor({1, 2, 23}, torch::kInt64), torch::arange(4, 20, torch::kInt64)};
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
      const int64_t layer = name.find("layers.0") != std::string::npos ? 0 : 1;
      const Tensor kept = plan.kept[layer];
      const int64_t width = plan.widths[layer];
      ASSERT_EQ(value.sizes(), (std::vector<int64_t>{width, 16})) << name;  // neuron-major
      for (int64_t n = 0; n < width; ++n) {
        const bool is_kept = n < kept.size(0);
        const Tensor want =
            is_kept ? old[kept[n].item<int64_t>()] : torch::zeros({16}, old.options());
        EXPECT_TRUE(value[n].equal(want)) << name << " " << n;
      }
    }
    const CheckpointBytes before = checkpoint_bytes(from), after = checkpoint_bytes(to);
    const auto row = 16 * static_cast<int64_t>(c10::elementSize(dtype));
    EXPECT_EQ(before.all - after.all, 3 * (24 - 8 + 24 - 16) * row);
    EXPECT_EQ(before.ffn, (std::map<int64_t, int64_t>{{0, 3 * 24 * row}, {1, 3 * 24 * row}}));
    EXPECT_EQ(after.ffn, (std::map<int64_t, int64_t>{{0, 3 * 8 * row}, {1, 3 * 16 * row}}));
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
