#include "app/hf/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/app/fixtures.h"
#include "tests/app/mutate.h"

namespace twell::app {
namespace {

using nlohmann::json;

json minimal(const std::string& type = "llama") {
  return {{"model_type", type},      {"vocab_size", 100},      {"hidden_size", 32},
          {"intermediate_size", 88}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}};
}

ModelConfig read(const json& document) {
  const TemporaryFolder folder;
  put(folder / "config.json", document.dump());
  return read_config(folder.path());
}

TEST(Config, ReadsTransformers5Llama) {
  const ModelConfig c = read_config(fixtures() / "models/llama");
  EXPECT_EQ(c.model_type, "llama");
  EXPECT_EQ(c.vocab_size, 311);
  EXPECT_EQ(c.hidden_size, 32);
  EXPECT_EQ(c.intermediate_size, 88);
  EXPECT_EQ(c.num_hidden_layers, 2);
  EXPECT_EQ(c.num_attention_heads, 4);
  EXPECT_EQ(c.num_key_value_heads, 2);
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.hidden_act, "relu");
  EXPECT_EQ(c.rope_theta, 500000.0);
  ASSERT_TRUE(c.rope_scaling);
  EXPECT_EQ(c.rope_scaling->factor, 8.0);
  EXPECT_EQ(c.rope_scaling->original_max_position_embeddings, 256);
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.bos_token_id, std::nullopt);
  EXPECT_EQ(c.eos_token_ids, (std::vector<int64_t>{2, 5}));
  EXPECT_EQ(c.dtype, "bfloat16");
  EXPECT_FALSE(c.qkv_bias());
}

TEST(Config, ReadsTransformers5Qwen2) {
  const ModelConfig c = read_config(fixtures() / "models/qwen2_sharded");
  EXPECT_EQ(c.model_type, "qwen2");
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.max_position_embeddings, 32768);
  EXPECT_FALSE(c.rope_scaling);
  EXPECT_TRUE(c.eos_token_ids.empty());
  EXPECT_EQ(c.dtype, "float32");
  EXPECT_TRUE(c.qkv_bias());
  EXPECT_FALSE(c.o_bias());
}

TEST(Config, ReadsTransformers4Spellings) {
  json document = minimal();
  document["rope_theta"] = 500000.0;
  document["torch_dtype"] = "float16";
  document["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", 32.0},
                              {"low_freq_factor", 1.0},
                              {"high_freq_factor", 4.0},
                              {"original_max_position_embeddings", 8192}};
  const ModelConfig c = read(document);
  EXPECT_EQ(c.rope_theta, 500000.0);
  EXPECT_EQ(c.dtype, "float16");
  EXPECT_EQ(c.rope_scaling->factor, 32.0);
  document["rope_scaling"] = nullptr;
  EXPECT_FALSE(read(document).rope_scaling);
}

TEST(Config, FillsInTransformersDefaults) {
  const ModelConfig llama = read(minimal());
  EXPECT_EQ(llama.num_key_value_heads, 4);
  EXPECT_EQ(llama.head_dim, 8);
  EXPECT_EQ(llama.max_position_embeddings, 2048);
  EXPECT_EQ(llama.hidden_act, "silu");
  EXPECT_EQ(llama.bos_token_id, 1);
  EXPECT_EQ(llama.eos_token_ids, std::vector<int64_t>{2});
  const ModelConfig qwen = read(minimal("qwen2"));
  EXPECT_EQ(qwen.max_position_embeddings, 32768);
  EXPECT_EQ(qwen.bos_token_id, std::nullopt);
}

TEST(Config, RefusesByName) {
  const auto expect = [](const char* name, const json& value, const std::string& part,
                         const std::string& type = "llama") {
    json document = minimal(type);
    document[name] = value;
    EXPECT_ERROR(read(document), part);
    EXPECT_ERROR(read(document), name);
  };
  expect("model_type", "mamba", "\"llama\" or \"qwen2\"");
  for (const char* name : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads"}) {
    expect(name, 0, "from 1");
    expect(name, -1, "-1");
    expect(name, 1e300, "must be an integer");
    expect(name, 2.5, "2.5");
    expect(name, true, "true");
    expect(name, nullptr, "null");
    expect(name, "12", "\"12\"");
    expect(name, uint64_t{1} << 63, "9223372036854775808");
  }
  expect("num_attention_heads", 5, "multiple of num_attention_heads = 5");
  expect("num_key_value_heads", 3, "divisor");
  expect("num_key_value_heads", 8, "from 1 to 4");
  expect("num_key_value_heads", 0, "from 1 to 4");
  expect("head_dim", 7, "even");
  expect("head_dim", 0, "from 2");
  expect("rms_norm_eps", 0, "positive");
  expect("rms_norm_eps", "x", "a number");
  expect("rope_theta", -5, "-5");
  expect("tie_word_embeddings", 1, "true or false");
  expect("hidden_act", "", "activation");
  expect("bos_token_id", 100, "vocab_size = 100");
  expect("eos_token_id", json::array({1, 200}), "200");
  expect("torch_dtype", "int8", "int8");
  expect("use_sliding_window", true, "sliding-window", "qwen2");
  expect("layer_types", json::array({"full_attention", "sliding_attention"}), "[1]");
  expect("quantization_config", json::object(), "not supported");
  expect("attention_bias", true, "qwen2", "qwen2");
  expect("partial_rotary_factor", 0.5, "0.5");
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    for (const char* rope : {"linear", "dynamic", "yarn", "longrope"}) {
      expect(key, {{"rope_type", rope}, {"factor", 2.0}}, rope);
    }
    expect(key, {{"rope_type", "llama3"}}, "factor");
    expect(key, {{"rope_type", "default"}, {"factor", 2.0}}, "factor");
  }
  json both = minimal();
  both["rope_scaling"] = both["rope_parameters"] = json::object();
  EXPECT_ERROR(read(both), "both");
  json missing = minimal();
  missing.erase("hidden_size");
  EXPECT_ERROR(read(missing), "has no \"hidden_size\"");
  const TemporaryFolder folder;
  EXPECT_ERROR(read_config(folder.path()), "config.json");
}

TEST(Config, IsReadByTransformers) {
  for (const char* type : {"llama", "qwen2"}) {
    ModelConfig c = read(minimal(type));
    c.hidden_act = "relu";
    c.num_key_value_heads = 2;
    c.head_dim = 12;
    c.rope_theta = 54321.5;
    c.rms_norm_eps = 2e-5;
    c.initializer_range = 0.125;
    c.tie_word_embeddings = true;
    c.dtype = "bfloat16";
    c.bos_token_id = 0;
    c.eos_token_ids = {3, 7};
    c.pad_token_id = std::nullopt;
    c.rope_scaling = Llama3RopeScaling{.factor = 2.5, .original_max_position_embeddings = 512};
    const TemporaryFolder folder;
    write_config(folder.path(), c);
    json expected = {{"model_type", type},
                     {"vocab_size", 100},
                     {"hidden_size", 32},
                     {"intermediate_size", 88},
                     {"num_hidden_layers", 2},
                     {"num_attention_heads", 4},
                     {"num_key_value_heads", 2},
                     {"head_dim", 12},
                     {"hidden_act", "relu"},
                     {"rms_norm_eps", 2e-5},
                     {"initializer_range", 0.125},
                     {"tie_word_embeddings", true},
                     {"dtype", "bfloat16"},
                     {"bos_token_id", 0},
                     {"eos_token_id", {3, 7}},
                     {"pad_token_id", nullptr},
                     {"max_position_embeddings", c.max_position_embeddings},
                     {"rope_parameters",
                      {{"rope_type", "llama3"},
                       {"rope_theta", 54321.5},
                       {"factor", 2.5},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 512}}}};
    put(folder / "expected.json", expected.dump());
    EXPECT_TRUE(check_with_python("config " + folder.path().string() + " " +
                                  (folder / "expected.json").string()));
    const ModelConfig back = read_config(folder.path());
    EXPECT_EQ(back.rope_theta, c.rope_theta);
    EXPECT_EQ(back.eos_token_ids, c.eos_token_ids);
    EXPECT_EQ(back.bos_token_id, c.bos_token_id);
    EXPECT_EQ(back.head_dim, c.head_dim);
    EXPECT_EQ(back.dtype, c.dtype);
    EXPECT_EQ(back.rope_scaling->factor, c.rope_scaling->factor);
  }
}

TEST(Config, ReadsAndWritesWidthsPerLayer) {
  for (const char* type : {"llama", "qwen2"}) {
    json document = minimal("twell_" + std::string(type));
    document["intermediate_size"] = {88, 8};
    const ModelConfig c = read(document);
    EXPECT_EQ(c.model_type, type);
    EXPECT_EQ(c.intermediate_size, LayerWidths({88, 8}));
    EXPECT_FALSE(c.intermediate_size.all_equal());
    EXPECT_EQ(c.intermediate_size[0], 88);
    EXPECT_EQ(c.intermediate_size[1], 8);
    EXPECT_EQ(c.intermediate_size.mean(), 48);
    const TemporaryFolder folder;
    write_config(folder.path(), c);
    const json written = json::parse(contents(folder / "config.json"));
    EXPECT_EQ(written["model_type"], document["model_type"]);
    EXPECT_EQ(written["intermediate_size"], document["intermediate_size"]);
    EXPECT_EQ(written["architectures"][0],
              type == std::string("llama") ? "TwellLlamaForCausalLM" : "TwellQwen2ForCausalLM");
    EXPECT_EQ(read_config(folder.path()).intermediate_size, c.intermediate_size);
    EXPECT_EQ(read_config(folder.path()).model_type, type);
  }
  // Widths that are equal after all are a Llama's.
  json document = minimal("twell_llama");
  document["intermediate_size"] = {24, 24};
  const ModelConfig c = read(document);
  EXPECT_EQ(c.intermediate_size, 24);
  const TemporaryFolder folder;
  write_config(folder.path(), c);
  EXPECT_EQ(json::parse(contents(folder / "config.json"))["intermediate_size"], 24);
  EXPECT_EQ(json::parse(contents(folder / "config.json"))["model_type"], "llama");
}

TEST(Config, RefusesBadWidthsByName) {
  const auto expect = [](const json& widths, const std::string& part,
                         const std::string& type = "twell_llama") {
    json document = minimal(type);
    document["intermediate_size"] = widths;
    EXPECT_ERROR(read(document), part);
    EXPECT_ERROR(read(document), "intermediate_size");
  };
  expect(json::array(), "an array of num_hidden_layers = 2");
  expect({8}, "an array of 1");
  expect({8, 16, 24}, "an array of 3");
  expect({24, 24, 24}, "an array of 3");
  expect({8, 0}, "intermediate_size[1]\" is 0");
  expect({8, -8}, "-8");
  expect({12, 8}, "multiple of 8");
  expect({8, 20}, "intermediate_size[1]\" = 20");
  expect({8, 4}, "from 8");
  expect({8, "16"}, "intermediate_size[1]\" is \"16\"");
  expect({8, 16.5}, "16.5");
  expect({8, uint64_t{1} << 63}, "9223372036854775808");
  expect(88, "an array");
  expect(nullptr, "an array");
  expect({8, 16}, "must be an integer", "llama");
  expect({8, 16}, "must be an integer", "qwen2");
  ModelConfig c = read(minimal());
  c.intermediate_size = LayerWidths({8, 16, 24});
  EXPECT_ERROR(validate(c), "num_hidden_layers = 2");
  c.intermediate_size = LayerWidths(std::vector<int64_t>());
  EXPECT_ERROR(validate(c), "intermediate_size");
}

TEST(Config, ValidatesBeforeWriting) {
  const TemporaryFolder folder;
  ModelConfig c = read(minimal());
  c.vocab_size = 0;
  EXPECT_ERROR(write_config(folder.path(), c), "vocab_size");
  EXPECT_ERROR(validate(c), "vocab_size");
  EXPECT_FALSE(std::filesystem::exists(folder / "config.json"));
}

TEST(Config, SurvivesMutations) {
  const TemporaryFolder folder;
  const std::string text = contents(fixtures() / "models/llama/config.json");
  survive_mutations(text, 2000, [&](const std::string& mutated) {
    put(folder / "config.json", mutated);
    validate(read_config(folder.path()));
  });
}

}  // namespace
}  // namespace twell::app
