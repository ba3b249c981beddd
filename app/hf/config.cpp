#include "app/hf/config.h"

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string_view>
#include <utility>

#include "app/error.h"
#include "app/hf/json.h"
#include "app/util/atomic_file.h"
#include "app/util/file.h"

namespace twell::app {
namespace {

constexpr uint64_t kMaxFileBytes = 16 << 20;
constexpr int64_t kMaxSize = 1 << 24;  // of any one dimension: products of two stay far below 2^63
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kWidthUnit = 8;  // of widths that differ: what twell's blocks take
constexpr int64_t kMaxId = INT32_MAX;
constexpr double kMaxReal = 1e12;
constexpr std::string_view kOwn = "twell_";  // of the model_type where widths differ
constexpr std::initializer_list<const char*> kDtypes = {"float32", "bfloat16", "float16"};

std::string quoted(const std::string& name, int64_t value) {
  return quote(name) + " = " + std::to_string(value);
}

struct Checker {
  std::string place;  // of the file, in messages

  [[noreturn]] void fail(const std::string& what, const std::string& permitted) const {
    throw Error(place + ": " + what + ", but must be " + permitted);
  }
  void in_range(const char* name, int64_t value, int64_t min, int64_t max) const {
    if (value < min || value > max) {
      fail(quoted(name, value), "from " + std::to_string(min) + " to " + std::to_string(max));
    }
  }
  void positive(const char* name, double value) const {
    if (!(value > 0 && value <= kMaxReal)) {
      fail(quote(name) + " = " + std::to_string(value), "positive and at most 1e12");
    }
  }
  void token(const char* name, int64_t id, int64_t vocab_size) const {
    if (id < 0 || id >= vocab_size) {
      fail(quoted(name, id), "a token below vocab_size = " + std::to_string(vocab_size));
    }
  }
  void one_of(const char* name, const std::string& value,
              std::initializer_list<const char*> permitted) const {
    std::string names;
    for (const char* option : permitted) {
      if (value == option) return;
      names += (names.empty() ? "" : " or ") + quote(option);
    }
    fail(quote(name) + " = " + quote(value), names);
  }
};

void check_widths(const ModelConfig& c, const Checker& checker) {
  const std::vector<int64_t>& widths = c.intermediate_size.values();
  if (c.intermediate_size.all_equal()) {
    checker.in_range("intermediate_size", widths.front(), 1, kMaxSize);
    return;
  }
  if (static_cast<int64_t>(widths.size()) != c.num_hidden_layers) {
    checker.fail("\"intermediate_size\" has " + std::to_string(widths.size()) + " entries",
                 "as long as num_hidden_layers = " + std::to_string(c.num_hidden_layers));
  }
  for (size_t layer = 0; layer < widths.size(); ++layer) {
    const std::string name = "intermediate_size[" + std::to_string(layer) + "]";
    checker.in_range(name.c_str(), widths[layer], kWidthUnit, kMaxSize);
    if (widths[layer] % kWidthUnit != 0) {
      checker.fail(quoted(name, widths[layer]), "a multiple of " + std::to_string(kWidthUnit));
    }
  }
}

void check(const ModelConfig& c, const std::string& place) {
  const Checker checker{place};
  checker.one_of("model_type", c.model_type, {"llama", "qwen2"});
  checker.in_range("vocab_size", c.vocab_size, 1, kMaxSize);
  checker.in_range("hidden_size", c.hidden_size, 1, kMaxSize);
  checker.in_range("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  check_widths(c, checker);
  checker.in_range("num_attention_heads", c.num_attention_heads, 1, kMaxSize);
  checker.in_range("num_key_value_heads", c.num_key_value_heads, 1, c.num_attention_heads);
  checker.in_range("head_dim", c.head_dim, 2, kMaxSize);
  checker.in_range("max_position_embeddings", c.max_position_embeddings, 1, kMaxId);
  if (c.num_attention_heads % c.num_key_value_heads != 0) {
    checker.fail(quoted("num_key_value_heads", c.num_key_value_heads),
                 "a divisor of num_attention_heads = " + std::to_string(c.num_attention_heads));
  }
  if (c.head_dim % 2 != 0) checker.fail(quoted("head_dim", c.head_dim), "even");
  checker.positive("rms_norm_eps", c.rms_norm_eps);
  checker.positive("rope_theta", c.rope_theta);
  if (!(c.initializer_range >= 0 && c.initializer_range <= kMaxReal)) {
    checker.fail("\"initializer_range\" = " + std::to_string(c.initializer_range),
                 "from 0 to 1e12");
  }
  if (c.hidden_act.empty()) checker.fail("\"hidden_act\" = \"\"", "the name of an activation");
  checker.one_of("dtype", c.dtype, kDtypes);
  if (c.model_type == "qwen2" && (c.attention_bias || c.mlp_bias)) {
    checker.fail("\"attention_bias\" or \"mlp_bias\" = true", "false for qwen2");
  }
  if (c.bos_token_id) checker.token("bos_token_id", *c.bos_token_id, c.vocab_size);
  if (c.pad_token_id) checker.token("pad_token_id", *c.pad_token_id, c.vocab_size);
  for (int64_t id : c.eos_token_ids) checker.token("eos_token_id", id, c.vocab_size);
  if (c.rope_scaling) {
    const Llama3RopeScaling& r = *c.rope_scaling;
    checker.positive("rope_scaling.factor", r.factor);
    checker.positive("rope_scaling.low_freq_factor", r.low_freq_factor);
    checker.positive("rope_scaling.high_freq_factor", r.high_freq_factor);
    checker.in_range("rope_scaling.original_max_position_embeddings",
                     r.original_max_position_embeddings, 1, kMaxId);
    if (r.high_freq_factor <= r.low_freq_factor) {
      checker.fail("\"rope_scaling.high_freq_factor\" = " + std::to_string(r.high_freq_factor),
                   "over low_freq_factor = " + std::to_string(r.low_freq_factor));
    }
  }
}

int64_t integer_or(const JsonView& json, const char* name, int64_t fallback, int64_t max) {
  const auto field = json.find(name);
  return field ? field->integer(0, max) : fallback;
}

double number_or(const JsonView& json, const char* name, double fallback) {
  const auto field = json.find(name);
  return field ? field->number(0, kMaxReal) : fallback;
}

bool boolean_or(const JsonView& json, const char* name, bool fallback) {
  const auto field = json.find(name);
  return field ? field->boolean() : fallback;
}

// A number; where widths may differ, a list.
LayerWidths read_widths(const JsonView& json, bool may_differ, int64_t layers) {
  const JsonView field = json["intermediate_size"];
  if (!may_differ) return field.integer(1, kMaxSize);
  if (static_cast<int64_t>(field.size()) != layers) {
    field.refuse("an array of num_hidden_layers = " + std::to_string(layers));
  }
  std::vector<int64_t> widths;
  for (size_t i = 0; i < field.size(); ++i) widths.push_back(field[i].integer(1, kMaxSize));
  return LayerWidths(std::move(widths));
}

// An absent key takes the default of the model class; null says that there is none.
std::optional<int64_t> token_or(const JsonView& json, const char* name,
                                std::optional<int64_t> fallback) {
  if (!json.value().contains(name)) return fallback;
  const auto field = json.find(name);
  if (!field) return std::nullopt;
  return field->integer(0, kMaxId);
}

// Reads rope_theta and the scaling from the top level and from rope_scaling (transformers 4) or
// rope_parameters (transformers 5).
void read_rope(const JsonView& json, ModelConfig& config) {
  config.rope_theta = number_or(json, "rope_theta", config.rope_theta);
  if (json.has("rope_scaling") && json.has("rope_parameters")) {
    json.fail("has both \"rope_scaling\" and \"rope_parameters\"; one of them must go");
  }
  auto rope = json.find("rope_parameters");
  if (!rope) rope = json.find("rope_scaling");
  if (!rope) return;
  config.rope_theta = number_or(*rope, "rope_theta", config.rope_theta);
  auto type = rope->find("rope_type");
  if (!type) type = rope->find("type");
  if (!type || type->string() == "default") {
    rope->only({"rope_type", "type", "rope_theta"});
    return;
  }
  if (type->string() != "llama3") type->refuse("\"default\" or \"llama3\"");
  rope->only({"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
              "original_max_position_embeddings"});
  config.rope_scaling =
      Llama3RopeScaling{.factor = (*rope)["factor"].number(0, kMaxReal),
                        .low_freq_factor = (*rope)["low_freq_factor"].number(0, kMaxReal),
                        .high_freq_factor = (*rope)["high_freq_factor"].number(0, kMaxReal),
                        .original_max_position_embeddings =
                            (*rope)["original_max_position_embeddings"].integer(1, kMaxId)};
}

// Features that change what the model computes and that this program does not have.
void refuse_unsupported(const JsonView& json, const ModelConfig& config) {
  if (const auto quantisation = json.find("quantization_config")) {
    quantisation->fail("is set, but quantised weights are not supported");
  }
  if (boolean_or(json, "use_sliding_window", false)) {
    json["use_sliding_window"].refuse("false: sliding-window attention is not supported");
  }
  if (const auto types = json.find("layer_types")) {
    for (size_t i = 0; i < types->size(); ++i) {
      if ((*types)[i].string() != "full_attention") (*types)[i].refuse("\"full_attention\"");
    }
  }
  if (const auto factor = json.find("partial_rotary_factor")) {
    if (factor->number(0, kMaxReal) != 1.0) factor->refuse("1");
  }
  if (config.model_type == "qwen2") {
    for (const char* name : {"attention_bias", "mlp_bias"}) {
      if (boolean_or(json, name, false)) json[name].refuse("false for qwen2");
    }
  }
}

}  // namespace

LayerWidths::LayerWidths(std::vector<int64_t> of_each) : widths_(std::move(of_each)) {
  if (std::adjacent_find(widths_.begin(), widths_.end(), std::not_equal_to()) == widths_.end()) {
    widths_.resize(1);
  }
}

double LayerWidths::mean() const {
  return std::accumulate(widths_.begin(), widths_.end(), 0.0) / static_cast<double>(widths_.size());
}

void validate(const ModelConfig& config) { check(config, "model configuration"); }

ModelConfig read_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  const nlohmann::json document = parse_json(read_file(path, kMaxFileBytes), path.string());
  const JsonView json(document, path.string());

  ModelConfig c;
  const std::string type = json["model_type"].string();
  Checker{path.string()}.one_of("model_type", type,
                                {"llama", "qwen2", "twell_llama", "twell_qwen2"});
  const bool own = type.starts_with(kOwn);
  c.model_type = own ? type.substr(kOwn.size()) : type;
  const bool llama = c.model_type == "llama";
  c.vocab_size = json["vocab_size"].integer(1, kMaxSize);
  c.hidden_size = json["hidden_size"].integer(1, kMaxSize);
  c.num_hidden_layers = json["num_hidden_layers"].integer(1, kMaxLayers);
  c.intermediate_size = read_widths(json, own, c.num_hidden_layers);
  c.num_attention_heads = json["num_attention_heads"].integer(1, kMaxSize);
  c.num_key_value_heads = integer_or(json, "num_key_value_heads", c.num_attention_heads, kMaxSize);
  if (!json.has("head_dim") && c.hidden_size % c.num_attention_heads != 0) {
    json["hidden_size"].refuse("a multiple of num_attention_heads = " +
                               std::to_string(c.num_attention_heads) + " if head_dim is not given");
  }
  c.head_dim = integer_or(json, "head_dim", c.hidden_size / c.num_attention_heads, kMaxSize);
  // What a file may leave out has the default of transformers' LlamaConfig or Qwen2Config.
  c.max_position_embeddings =
      integer_or(json, "max_position_embeddings", llama ? 2048 : 32768, kMaxId);
  c.rms_norm_eps = number_or(json, "rms_norm_eps", c.rms_norm_eps);
  c.initializer_range = number_or(json, "initializer_range", c.initializer_range);
  if (const auto field = json.find("hidden_act")) c.hidden_act = field->string();
  c.tie_word_embeddings = boolean_or(json, "tie_word_embeddings", c.tie_word_embeddings);
  c.attention_bias = llama && boolean_or(json, "attention_bias", c.attention_bias);
  c.mlp_bias = llama && boolean_or(json, "mlp_bias", c.mlp_bias);
  c.bos_token_id = token_or(json, "bos_token_id", llama ? std::optional<int64_t>(1) : std::nullopt);
  c.pad_token_id = token_or(json, "pad_token_id", std::nullopt);
  if (const auto eos = json.find("eos_token_id"); eos && eos->value().is_array()) {
    for (size_t i = 0; i < eos->size(); ++i) {
      c.eos_token_ids.push_back((*eos)[i].integer(0, kMaxId));
    }
  } else if (const auto id =
                 token_or(json, "eos_token_id", llama ? std::optional<int64_t>(2) : std::nullopt)) {
    c.eos_token_ids.push_back(*id);
  }
  auto dtype = json.find("dtype");
  if (!dtype) dtype = json.find("torch_dtype");
  if (dtype) {
    c.dtype = dtype->string();
    if (!std::count(kDtypes.begin(), kDtypes.end(), c.dtype)) {
      dtype->refuse("float32, bfloat16 or float16");
    }
  }
  read_rope(json, c);
  refuse_unsupported(json, c);
  check(c, path.string());
  return c;
}

void write_config(const std::filesystem::path& folder, const ModelConfig& c) {
  check(c, (folder / "config.json").string());
  const bool llama = c.model_type == "llama", own = !c.intermediate_size.all_equal();

  nlohmann::ordered_json tokens = nlohmann::ordered_json::object();
  tokens["bos_token_id"] = nullptr;
  tokens["eos_token_id"] = nullptr;
  tokens["pad_token_id"] = nullptr;
  if (c.bos_token_id) tokens["bos_token_id"] = *c.bos_token_id;
  if (c.pad_token_id) tokens["pad_token_id"] = *c.pad_token_id;
  if (c.eos_token_ids.size() == 1) tokens["eos_token_id"] = c.eos_token_ids[0];
  if (c.eos_token_ids.size() > 1) tokens["eos_token_id"] = c.eos_token_ids;

  nlohmann::ordered_json json = {
      {"architectures",
       {std::string(own ? "Twell" : "") + (llama ? "Llama" : "Qwen2") + "ForCausalLM"}},
      {"model_type", std::string(own ? kOwn : "") + c.model_type},
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_hidden_layers},
      {"num_attention_heads", c.num_attention_heads},
      {"num_key_value_heads", c.num_key_value_heads},
      {"head_dim", c.head_dim},
      {"hidden_act", c.hidden_act},
      {"max_position_embeddings", c.max_position_embeddings},
      {"rms_norm_eps", c.rms_norm_eps},
      {"initializer_range", c.initializer_range},
      {"tie_word_embeddings", c.tie_word_embeddings},
      {"rope_theta", c.rope_theta},
      {"use_cache", true}};
  if (llama) {
    json["attention_bias"] = c.attention_bias;
    json["mlp_bias"] = c.mlp_bias;
  } else {
    json["use_sliding_window"] = false;
  }
  // The spelling of transformers 4, which transformers 5 reads as well.
  if (const auto& rope = c.rope_scaling) {
    json["rope_scaling"] = {
        {"rope_type", "llama3"},
        {"factor", rope->factor},
        {"low_freq_factor", rope->low_freq_factor},
        {"high_freq_factor", rope->high_freq_factor},
        {"original_max_position_embeddings", rope->original_max_position_embeddings}};
  }
  json["torch_dtype"] = c.dtype;
  json.update(tokens);

  const auto dump = [](const nlohmann::ordered_json& document) {
    using Handler = nlohmann::json::error_handler_t;
    return document.dump(2, ' ', false, Handler::replace) + "\n";
  };
  write_file(folder / "config.json", dump(json));
  write_file(folder / "generation_config.json", dump(tokens));
}

}  // namespace twell::app
