#pragma once
// Llama and Qwen2 on libtorch, for training and for inference, stored as Hugging Face directories.

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "app/hf/config.h"
#include "app/model/ffn.h"

namespace twell::app {

// The keys and values of all tokens so far, for decoding. Starts empty and grows by doubling, at
// most to `max_length`.
struct KvCache {
  explicit KvCache(int64_t max_length) : max_length(max_length) {}

  int64_t capacity() const { return keys.empty() ? 0 : keys.front().size(2); }

  int64_t max_length;
  int64_t length = 0;                       // tokens held
  std::vector<torch::Tensor> keys, values;  // per layer [batch, kv_heads, capacity, head_dim]
  // If defined, where the next token goes: int64 [1] on the model's device, below the capacity. A
  // call then takes one token, attends to the whole capacity under a mask and reads nothing on the
  // host, so that a graph can hold it; `length` is left to the caller.
  torch::Tensor slot;
};

struct ForwardOptions {
  FfnMode ffn = FfnMode::kDense;
  KvCache* cache = nullptr;                       // attended to and extended by this call's tokens
  std::vector<FfnOutput>* ffn_outputs = nullptr;  // one per layer, without y (ReLU models only)
  FfnCounts counts = FfnCounts::kAll;             // what they hold
  // Keep only the input of each layer for backward and compute the layer again there: the same bits
  // from less memory. The model must then stay where it is, and as it is, until backward. Without
  // gradients it means nothing.
  bool recompute = false;
  // Called before each layer's FFN with its input [tokens, hidden] and its weights.
  std::function<void(int layer, const torch::Tensor& x, const FfnWeights& weights)> on_ffn;
};

// The rotary embedding of some positions.
struct Rotation {
  torch::Tensor cos, sin;  // [positions, head_dim / 2]
  torch::Tensor matrices;  // [positions, head_dim, head_dim], of few positions; else undefined
};

// The weights are leaves named as in the checkpoint ("model.layers.0.mlp.gate_proj.weight"), with
// two differences: down_proj is held neuron-major, [neurons, hidden], and q_proj and k_proj are
// one, self_attn.qk_proj, [queries + keys, hidden]. Training holds them in
// float32 and computes in bf16: forward casts, and autograd returns float32 gradients. Inference
// holds them in the compute dtype.
class Llama {
 public:
  using Parameters = std::map<std::string, torch::Tensor>;

  // Random float32 weights: normal with the config's initializer_range from `seed`, residual
  // outputs (o_proj, down_proj) scaled by 1/√(2 layers), norms 1, biases 0.
  static Llama create(const ModelConfig& config, uint64_t seed, torch::ScalarType compute,
                      torch::Device device);
  // Reads config.json and the safetensors; missing, surplus or misshapen tensors give an Error by
  // name. `stored` is the dtype the weights are held in.
  static Llama load(const std::filesystem::path& folder, torch::ScalarType stored,
                    torch::ScalarType compute, torch::Device device);
  // Writes config.json and model.safetensors in `dtype`, each atomically.
  void save(const std::filesystem::path& folder, torch::ScalarType dtype) const;

  // tokens [batch, length] int64 → [batch, length, hidden] after the final norm.
  torch::Tensor forward(const torch::Tensor& tokens, const ForwardOptions& options = {});
  // Makes room for `length` tokens in all (more than the cache holds, at most its max_length).
  void reserve(KvCache& cache, int64_t length);
  // hidden [..., hidden] → [..., vocab], in the compute dtype.
  torch::Tensor logits(const torch::Tensor& hidden) const;
  // The weight of logits(): [vocab, hidden] in the compute dtype.
  torch::Tensor head() const;

  FfnWeights ffn_weights(int layer) const;  // in the compute dtype
  // Throws Error by name if the model can't run in `mode` (twell needs ReLU).
  void check_mode(FfnMode mode) const;
  bool is_relu() const { return config_.hidden_act == "relu"; }

  const ModelConfig& config() const { return config_; }
  void set_separator(int64_t id);  // makes `id` the first of config().eos_token_ids
  Parameters& parameters() { return parameters_; }
  const Parameters& parameters() const { return parameters_; }
  int64_t parameter_count() const;
  std::vector<FfnChooser>& choosers() { return choosers_; }  // one per layer
  torch::Device device() const { return device_; }

 private:
  Llama(ModelConfig config, torch::ScalarType compute, torch::Device device);
  torch::Tensor weight(const std::string& name) const;  // in the compute dtype
  void reserve_positions(int64_t count);
  // x [batch, length, hidden] → the heads' outputs side by side.
  torch::Tensor attention(int layer, const torch::Tensor& x, const Rotation& rotation,
                          KvCache* cache);
  // x plus the product of the heads' outputs. Without gradients it may take the memory of x.
  torch::Tensor add_attention_output(int layer, const torch::Tensor& x,
                                     const torch::Tensor& mixed) const;
  // `path`, if given, is what the FFN must run; otherwise the layer's chooser decides.
  torch::Tensor feed_forward(int layer, const torch::Tensor& x, const ForwardOptions& options,
                             std::optional<FfnPath> path);
  // Without gradients it may overwrite x, which nobody else must hold.
  torch::Tensor block(int layer, torch::Tensor x, const Rotation& rotation,
                      const ForwardOptions& options, std::optional<FfnPath> path = std::nullopt);
  torch::Tensor recomputed_block(int layer, const torch::Tensor& x, const Rotation& rotation,
                                 const ForwardOptions& options);

  ModelConfig config_;
  torch::ScalarType compute_;
  torch::Device device_;
  Parameters parameters_;
  std::vector<FfnChooser> choosers_;
  torch::Tensor cos_, sin_;  // [positions, head_dim / 2] in the compute dtype, grown on demand
};

}  // namespace twell::app
