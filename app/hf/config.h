#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace twell::app {

// Llama 3's rope scaling: frequencies of wavelength above original_max_position_embeddings /
// low_freq_factor are divided by `factor`, those below original / high_freq_factor are kept, and
// between them the two are blended linearly in original / wavelength.
struct Llama3RopeScaling {
  double factor = 8.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 8192;
};

// The neurons of each layer's FFN: one number for all layers, or one for each. Like the file's
// field, it takes a number alone.
class LayerWidths {
 public:
  LayerWidths(int64_t of_all = 0) : widths_{of_all} {}
  explicit LayerWidths(std::vector<int64_t> of_each);  // becomes one number if all are equal

  bool all_equal() const { return widths_.size() == 1; }
  int64_t operator[](int64_t layer) const {
    return all_equal() ? widths_.front() : widths_.at(static_cast<size_t>(layer));
  }
  double mean() const;
  const std::vector<int64_t>& values() const { return widths_; }  // one, or one for each layer
  bool operator==(const LayerWidths&) const = default;

 private:
  std::vector<int64_t> widths_;
};

// A number, or a list.
template <class Json>
void to_json(Json& json, const LayerWidths& widths) {
  if (widths.all_equal()) {
    json = widths[0];
  } else {
    json = widths.values();
  }
}

// config.json of a Hugging Face Llama or Qwen2 directory; the names are that file's.
struct ModelConfig {
  std::string model_type = "llama";  // "llama" or "qwen2"
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  LayerWidths intermediate_size;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  std::optional<Llama3RopeScaling> rope_scaling;
  std::string hidden_act = "silu";
  bool tie_word_embeddings = false;
  // Llama: bias of the q, k, v and o projections. Qwen2 always has q, k and v biases and never an
  // o bias, whatever its file says: see qkv_bias() and o_bias().
  bool attention_bias = false;
  bool mlp_bias = false;  // Llama only
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;  // none, one, or several
  std::optional<int64_t> pad_token_id;
  double initializer_range = 0.02;
  std::string dtype = "float32";  // "float32", "bfloat16", "float16": of the stored weights

  // What ends a document in a stream of tokens: the first eos, if there is one.
  std::optional<int64_t> separator() const {
    return eos_token_ids.empty() ? std::nullopt : std::optional(eos_token_ids.front());
  }
  bool qkv_bias() const { return model_type == "qwen2" || attention_bias; }
  bool o_bias() const { return model_type == "llama" && attention_bias; }
};

// Throws Error naming the field, its value and what is permitted, if `config` describes no model
// that can be built.
void validate(const ModelConfig& config);

// Reads and validates `folder`/config.json, in the spelling of transformers 4 (rope_theta and
// rope_scaling, torch_dtype) or 5 (rope_parameters, dtype). What would change the model's output
// and is not supported (sliding-window attention, other rope types, quantisation, ...) is refused
// by name; fields that do not (use_cache, transformers_version, ...) are ignored.
//
// Layers of different widths are twell's own: model_type is then "twell_llama" or "twell_qwen2",
// and intermediate_size a list with an entry for each layer, as in Gemma 3n. Both keep transformers
// from taking the weights for a Llama of one width: it says that it does not know a twell_llama.
ModelConfig read_config(const std::filesystem::path& folder);

// Validates `config` and writes `folder`/config.json and generation_config.json, each atomically,
// such that transformers 4 and 5 load LlamaForCausalLM or Qwen2ForCausalLM from it, if all layers
// have one width.
void write_config(const std::filesystem::path& folder, const ModelConfig& config);

}  // namespace twell::app
