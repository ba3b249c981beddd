#include "app/model/llama.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numbers>
#include <utility>

#include "app/error.h"
#include "app/hf/safetensors.h"
#include "app/model/recompute.h"
#include "app/model/rms_norm.h"

namespace twell::app {
namespace {

using torch::Tensor;

const std::string kEmbedding = "model.embed_tokens.weight";
const std::string kHead = "lm_head.weight";
const std::string kFinalNorm = "model.norm.weight";
const std::string kDown = "mlp.down_proj.weight";
const std::string kQk = "self_attn.qk_proj.";

std::string layer_name(int layer, const std::string& name) {
  return "model.layers." + std::to_string(layer) + "." + name;
}

// The tensors of a checkpoint, as Hugging Face stores them.
std::map<std::string, std::vector<int64_t>> checkpoint_shapes(const ModelConfig& c) {
  const int64_t hidden = c.hidden_size;
  const int64_t queries = c.num_attention_heads * c.head_dim;
  const int64_t keys = c.num_key_value_heads * c.head_dim;
  std::map<std::string, std::vector<int64_t>> shapes;
  shapes[kEmbedding] = {c.vocab_size, hidden};
  if (!c.tie_word_embeddings) shapes[kHead] = {c.vocab_size, hidden};
  shapes[kFinalNorm] = {hidden};
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
    const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
      shapes[layer_name(layer, name)] = std::move(shape);
    };
    add("input_layernorm.weight", {hidden});
    add("post_attention_layernorm.weight", {hidden});
    add("self_attn.q_proj.weight", {queries, hidden});
    add("self_attn.k_proj.weight", {keys, hidden});
    add("self_attn.v_proj.weight", {keys, hidden});
    add("self_attn.o_proj.weight", {hidden, queries});
    if (c.qkv_bias()) {
      add("self_attn.q_proj.bias", {queries});
      add("self_attn.k_proj.bias", {keys});
      add("self_attn.v_proj.bias", {keys});
    }
    if (c.o_bias()) add("self_attn.o_proj.bias", {hidden});
    const int64_t neurons = c.intermediate_size[layer];
    add("mlp.gate_proj.weight", {neurons, hidden});
    add("mlp.up_proj.weight", {neurons, hidden});
    add(kDown, {hidden, neurons});
  }
  return shapes;
}

// The projections of a layer that are one product here, since both are rotated.
struct QkPart {
  std::string name;  // as in a checkpoint
  int64_t rows;
};

std::vector<QkPart> qk_parts(const ModelConfig& c) {
  return {{"self_attn.q_proj.", c.num_attention_heads * c.head_dim},
          {"self_attn.k_proj.", c.num_key_value_heads * c.head_dim}};
}

std::vector<std::string> qk_kinds(const ModelConfig& c) {
  return c.qkv_bias() ? std::vector<std::string>{"weight", "bias"}
                      : std::vector<std::string>{"weight"};
}

// A checkpoint's tensors ↔ a model's.
Llama::Parameters from_checkpoint(const ModelConfig& c, std::map<std::string, Tensor> tensors) {
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
    for (const std::string& kind : qk_kinds(c)) {
      std::vector<Tensor> parts;
      for (const QkPart& part : qk_parts(c)) {
        parts.push_back(tensors.extract(layer_name(layer, part.name + kind)).mapped());
      }
      tensors[layer_name(layer, kQk + kind)] = torch::cat(parts);
    }
    Tensor& down = tensors.at(layer_name(layer, kDown));
    down = down.t().contiguous();
  }
  return tensors;
}

std::map<std::string, Tensor> to_checkpoint(const ModelConfig& c, Llama::Parameters tensors) {
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
    for (const std::string& kind : qk_kinds(c)) {
      const Tensor both = tensors.extract(layer_name(layer, kQk + kind)).mapped();
      int64_t row = 0;
      for (const QkPart& part : qk_parts(c)) {
        tensors[layer_name(layer, part.name + kind)] = both.narrow(0, row, part.rows);
        row += part.rows;
      }
    }
    Tensor& down = tensors.at(layer_name(layer, kDown));
    down = down.t().contiguous();
  }
  return tensors;
}

std::string to_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Angular frequencies of the rotary embedding, [head_dim / 2] float32 (arXiv 2104.09864; Llama 3
// stretches the slow ones, see Llama3RopeScaling).
Tensor rope_frequencies(const ModelConfig& c) {
  Tensor frequencies = torch::empty({c.head_dim / 2}, torch::kFloat32);
  for (int64_t i = 0; i < c.head_dim / 2; ++i) {
    const auto exponent = static_cast<float>(2 * i) / static_cast<float>(c.head_dim);
    double frequency = 1.0f / std::pow(static_cast<float>(c.rope_theta), exponent);
    if (c.rope_scaling) {
      const Llama3RopeScaling& s = *c.rope_scaling;
      const double wavelength = 2 * std::numbers::pi / frequency;
      const double turns = static_cast<double>(s.original_max_position_embeddings) / wavelength;
      const double keep = std::clamp(
          (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0);
      frequency = keep * frequency + (1 - keep) * frequency / s.factor;
    }
    frequencies[i] = static_cast<float>(frequency);
  }
  return frequencies;
}

// The rotary embedding of one head as matrices R [length, head_dim, head_dim]: for x = (x₁, x₂),
// the halves of its last dimension, x R = x ⊙ (cos, cos) + (-x₂, x₁) ⊙ (sin, sin). cos, sin
// [length, head_dim / 2].
Tensor rotations(const Tensor& cos, const Tensor& sin) {
  const int64_t half = cos.size(1);
  Tensor r = torch::zeros({cos.size(0), 2 * half, 2 * half}, cos.options());
  r.diagonal(0, 1, 2).copy_(torch::cat({cos, cos}, 1));
  r.diagonal(half, 1, 2).copy_(sin);
  r.diagonal(-half, 1, 2).copy_(-sin);
  return r;
}

// The heads of queries and keys side by side, [batch, length, heads + kv_heads, head_dim], become q
// and k: times R of their positions. Small products, one for each position and sequence, beat
// elementwise kernels: they read x and write the result once.
struct Rotate : torch::autograd::Function<Rotate> {
  static constexpr int64_t kPiece = 2048;  // positions whose R exist at once

  // y = x R; `back`: times R transposed.
  static void turn(const Tensor& x, const Tensor& y, const Rotation& rotation, bool back) {
    for (int64_t first = 0; first < x.size(1); first += kPiece) {
      const int64_t count = std::min(kPiece, x.size(1) - first);
      const Tensor r = rotation.matrices.defined()
                           ? rotation.matrices
                           : rotations(rotation.cos.narrow(0, first, count),
                                       rotation.sin.narrow(0, first, count));
      for (int64_t i = 0; i < x.size(0); ++i) {
        Tensor part = y[i].narrow(0, first, count);
        torch::bmm_out(part, x[i].narrow(0, first, count), back ? r.transpose(1, 2) : r);
      }
    }
  }

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const Tensor& qk, int64_t heads,
                                                const Rotation& rotation) {
    ctx->save_for_backward({rotation.cos, rotation.sin, rotation.matrices});
    const Tensor rotated = torch::empty(qk.sizes(), qk.options());
    turn(qk, rotated, rotation, false);
    return {rotated.narrow(2, 0, heads), rotated.narrow(2, heads, qk.size(2) - heads)};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = grads[0], &k = grads[1];
    const Tensor qk =
        torch::empty({q.size(0), q.size(1), q.size(2) + k.size(2), q.size(3)}, q.options());
    const Rotation rotation{saved[0], saved[1], saved[2]};
    turn(q, qk.narrow(2, 0, q.size(2)), rotation, true);
    turn(k, qk.narrow(2, q.size(2), k.size(2)), rotation, true);
    return {qk, Tensor(), Tensor()};
  }
};

// Scaled dot-product attention in which query i sees the keys up to past + i; a single query those
// of `visible` (bool [keys]; undefined: all).
// q [batch, heads, length, head_dim], k and v [batch, kv_heads, past + length, head_dim].
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visible) {
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(1);
  if (length == 1) {  // a group of queries that share keys is a sequence that sees all of them
    const int64_t group = heads / kv_heads;
    const auto mask = visible.defined() ? std::optional(visible.expand({group, k.size(2)}))
                                        : std::optional<Tensor>();
    return torch::scaled_dot_product_attention(q.reshape({batch, kv_heads, group, head_dim}), k, v,
                                               mask)
        .reshape({batch, heads, 1, head_dim});
  }
  const bool grouped = heads != kv_heads;
  const int64_t past = k.size(2) - length;
  if (past == 0) {
    return torch::scaled_dot_product_attention(q, k, v, std::nullopt, 0.0, true, std::nullopt,
                                               grouped);
  }
  const Tensor mask =
      torch::ones({length, past + length}, q.options().dtype(torch::kBool)).tril(past);
  return torch::scaled_dot_product_attention(q, k, v, mask, 0.0, false, std::nullopt, grouped);
}

// Gives `store` [batch, heads, capacity, head_dim] a larger capacity: what is held stays, the rest
// is zeros, which masked attention may multiply by 0.
void grow(Tensor& store, int64_t held, int64_t capacity) {
  Tensor grown =
      torch::zeros({store.size(0), store.size(1), capacity, store.size(3)}, store.options());
  if (held > 0) grown.narrow(2, 0, held).copy_(store.narrow(2, 0, held));
  store = std::move(grown);
}

// Appends x [batch, heads, length, head_dim] at the cache's end; returns what queries attend to.
Tensor append(Tensor& store, const Tensor& x, const KvCache& cache) {
  if (cache.slot.defined()) return store.index_copy_(2, cache.slot, x);
  const int64_t end = cache.length + x.size(2);
  if (!store.defined()) store = x.narrow(2, 0, 0);
  if (store.size(2) < end) {
    grow(store, cache.length, std::min(cache.max_length, std::max<int64_t>(end, 2 * cache.length)));
  }
  store.narrow(2, cache.length, x.size(2)).copy_(x);
  return store.narrow(2, 0, end);
}

}  // namespace

Llama::Llama(ModelConfig config, torch::ScalarType compute, torch::Device device)
    : config_(std::move(config)), compute_(compute), device_(device) {
  validate(config_);
  if (config_.mlp_bias) throw Error("mlp_bias is true; twell's feed-forward blocks have no bias");
  if (config_.hidden_act != "relu" && config_.hidden_act != "silu") {
    throw Error("hidden_act is '" + config_.hidden_act + "'; permitted: relu, silu");
  }
  choosers_.resize(static_cast<size_t>(config_.num_hidden_layers));
}

Llama Llama::create(const ModelConfig& config, uint64_t seed, torch::ScalarType compute,
                    torch::Device device) {
  Llama model(config, compute, device);
  const double residual = 1 / std::sqrt(2.0 * static_cast<double>(config.num_hidden_layers));
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, shape] : checkpoint_shapes(config)) {
    Tensor value = torch::empty(shape, torch::kFloat32);
    const bool closes_block = name.ends_with("o_proj.weight") || name.ends_with(kDown);
    if (name.ends_with("norm.weight")) {
      value.fill_(1);
    } else if (name.ends_with(".bias")) {
      value.zero_();
    } else {
      value.normal_(0, config.initializer_range * (closes_block ? residual : 1), generator);
    }
    tensors[name] = value.to(device);
  }
  model.parameters_ = from_checkpoint(config, std::move(tensors));
  return model;
}

Llama Llama::load(const std::filesystem::path& folder, torch::ScalarType stored,
                  torch::ScalarType compute, torch::Device device) {
  Llama model(read_config(folder), compute, device);
  const Safetensors file = Safetensors::open(folder);
  const auto shapes = checkpoint_shapes(model.config_);
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, info] : file.tensors()) {
    const bool tied_copy = name == kHead && model.config_.tie_word_embeddings;
    if (!shapes.contains(name) && !tied_copy) {
      throw Error(folder.string() + ": surplus tensor '" + name + "': config.json describes none");
    }
  }
  for (const auto& [name, shape] : shapes) {
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end()) {
      throw Error(folder.string() + ": tensor '" + name + "' is missing");
    }
    if (found->second.shape != shape) {
      throw Error(folder.string() + ": tensor '" + name + "' is " + to_text(found->second.shape) +
                  "; config.json wants " + to_text(shape));
    }
    Tensor value = file.load(name);
    if (!value.is_floating_point()) {
      throw Error(folder.string() + ": tensor '" + name + "' is " +
                  c10::toString(value.scalar_type()) + "; weights must be floating-point");
    }
    tensors[name] = value.to(torch::TensorOptions(device).dtype(stored)).contiguous();
  }
  model.parameters_ = from_checkpoint(model.config_, std::move(tensors));
  return model;
}

void Llama::save(const std::filesystem::path& folder, torch::ScalarType dtype) const {
  Parameters stored;
  for (const auto& [name, value] : parameters_) stored[name] = value.detach().to(dtype);
  ModelConfig config = config_;
  config.dtype = dtype == torch::kBFloat16 ? "bfloat16" : "float32";
  write_safetensors(folder / "model.safetensors", to_checkpoint(config_, std::move(stored)));
  write_config(folder, config);
}

int64_t Llama::parameter_count() const {
  int64_t count = 0;
  for (const auto& [name, value] : parameters_) count += value.numel();
  return count;
}

void Llama::set_separator(int64_t id) {
  std::erase(config_.eos_token_ids, id);
  config_.eos_token_ids.insert(config_.eos_token_ids.begin(), id);
}

void Llama::check_mode(FfnMode mode) const {
  if (mode == FfnMode::kTwell && !is_relu()) {
    throw Error("--ffn twell needs hidden_act \"relu\"; this model's is \"" + config_.hidden_act +
                "\": use --ffn dense");
  }
}

Tensor Llama::weight(const std::string& name) const { return parameters_.at(name).to(compute_); }

Tensor Llama::head() const { return weight(config_.tie_word_embeddings ? kEmbedding : kHead); }

Tensor Llama::logits(const Tensor& hidden) const { return torch::matmul(hidden, head().t()); }

FfnWeights Llama::ffn_weights(int layer) const {
  return {weight(layer_name(layer, "mlp.gate_proj.weight")),
          weight(layer_name(layer, "mlp.up_proj.weight")), weight(layer_name(layer, kDown))};
}

void Llama::reserve_positions(int64_t count) {
  if (cos_.defined() && cos_.size(0) >= count) return;
  const torch::NoGradGuard no_grad;
  const Tensor angles = torch::outer(torch::arange(2 * count).to(torch::kFloat32),
                                     rope_frequencies(config_));  // [positions, head_dim / 2]
  cos_ = angles.cos().to(torch::TensorOptions(device_).dtype(compute_));
  sin_ = angles.sin().to(torch::TensorOptions(device_).dtype(compute_));
}

void Llama::reserve(KvCache& cache, int64_t length) {
  reserve_positions(length);
  for (size_t layer = 0; layer < cache.keys.size(); ++layer) {
    grow(cache.keys[layer], cache.length, length);
    grow(cache.values[layer], cache.length, length);
  }
}

Tensor Llama::attention(int layer, const Tensor& x, const Rotation& rotation, KvCache* cache) {
  const int64_t batch = x.size(0), length = x.size(1);
  const int64_t heads = config_.num_attention_heads;
  const auto project = [&](const std::string& name) {
    const Tensor bias = config_.qkv_bias() ? weight(layer_name(layer, name + "bias")) : Tensor();
    return torch::linear(x, weight(layer_name(layer, name + "weight")), bias)
        .view({batch, length, -1, config_.head_dim});
  };
  const auto qk = Rotate::apply(project(kQk), heads, rotation);
  // [batch, heads, length, head_dim], as views
  const Tensor q = qk[0].transpose(1, 2);
  Tensor k = qk[1].transpose(1, 2), v = project("self_attn.v_proj.").transpose(1, 2);
  if (cache != nullptr) {
    const auto index = static_cast<size_t>(layer);
    k = append(cache->keys[index], k, *cache);
    v = append(cache->values[index], v, *cache);
  }
  const bool in_slot = cache != nullptr && cache->slot.defined();
  const Tensor visible =
      in_slot ? torch::arange(k.size(2), cache->slot.options()).le(cache->slot) : Tensor();
  return attend(q, k, v, visible).transpose(1, 2).reshape({batch, length, -1});
}

// One product with the sum inside, as a sum of its own is a pass over memory. So is the copy of x
// that addmm begins with: without autograd, to which x may belong, the sum takes the memory of x.
Tensor Llama::add_attention_output(int layer, const Tensor& x, const Tensor& mixed) const {
  const std::string base = layer_name(layer, "self_attn.o_proj.");
  const Tensor rows = x.reshape({-1, x.size(-1)}), heads = mixed.reshape({-1, mixed.size(-1)});
  const Tensor projection = weight(base + "weight").t();
  const Tensor sum = torch::GradMode::is_enabled() ? torch::addmm(rows, heads, projection)
                                                   : rows.addmm_(heads, projection);
  return (config_.o_bias() ? sum + weight(base + "bias") : sum).view_as(x);
}

Tensor Llama::feed_forward(int layer, const Tensor& x, const ForwardOptions& options,
                           std::optional<FfnPath> path) {
  const Tensor flat = x.reshape({-1, config_.hidden_size}).contiguous();  // [tokens, hidden]
  const FfnWeights weights = ffn_weights(layer);
  if (options.on_ffn) options.on_ffn(layer, flat, weights);
  if (!is_relu()) return silu_ffn(flat, weights).view_as(x);
  if (!path) {
    FfnChooser& chooser = choosers_[static_cast<size_t>(layer)];
    const bool in_slot = options.cache != nullptr && options.cache->slot.defined();
    if (!in_slot) chooser.observe(flat.detach(), weights, options.ffn);
    path = chooser.choose(flat, weights, options.ffn, torch::GradMode::is_enabled());
  }
  const FfnCounts counts = options.ffn_outputs == nullptr ? FfnCounts::kNone : options.counts;
  FfnOutput out = relu_ffn(flat, weights, *path, counts);
  const Tensor y = std::exchange(out.y, Tensor()).view_as(x);
  if (options.ffn_outputs != nullptr) options.ffn_outputs->push_back(std::move(out));
  return y;
}

Tensor Llama::block(int layer, Tensor x, const Rotation& rotation, const ForwardOptions& options,
                    std::optional<FfnPath> path) {
  const auto norm = [&](const std::string& name) {
    return rms_norm(x, parameters_.at(layer_name(layer, name)), config_.rms_norm_eps);
  };
  x = add_attention_output(
      layer, x, attention(layer, norm("input_layernorm.weight"), rotation, options.cache));
  return x + feed_forward(layer, norm("post_attention_layernorm.weight"), options, path);
}

Tensor Llama::recomputed_block(int layer, const Tensor& x, const Rotation& rotation,
                               const ForwardOptions& options) {
  std::vector<Tensor> parameters;
  for (const auto& [name, value] : parameters_) {
    const bool here = name.starts_with(layer_name(layer, ""));
    if (here && value.requires_grad()) parameters.push_back(value);
  }
  // What the chooser decides the first time holds for the second.
  const auto path = std::make_shared<std::optional<FfnPath>>();
  const auto run = [this, layer, rotation, mode = options.ffn, counts = options.counts,
                    path](const Tensor& input) {
    std::vector<FfnOutput> ffns;
    ForwardOptions inner;
    inner.ffn = mode;
    inner.ffn_outputs = &ffns;
    inner.counts = counts;
    torch::autograd::variable_list outputs = {block(layer, input, rotation, inner, *path)};
    if (!ffns.empty()) {
      *path = ffns[0].path;
      outputs.insert(outputs.end(), {ffns[0].l1, ffns[0].l0, ffns[0].activity});
    }
    return outputs;
  };
  const torch::autograd::variable_list outputs = recompute(run, x, parameters);
  if (options.ffn_outputs != nullptr && path->has_value()) {
    options.ffn_outputs->push_back({Tensor(), outputs[1], outputs[2], outputs[3], **path});
  }
  return outputs[0];
}

Tensor Llama::forward(const Tensor& tokens, const ForwardOptions& options) {
  check_mode(options.ffn);
  const int64_t position = options.cache != nullptr ? options.cache->length : 0;
  const int64_t end = position + tokens.size(1);
  if (options.cache != nullptr) {
    if (options.recompute) throw Error("a cache and recomputation exclude each other");
    if (end > options.cache->max_length) {
      throw Error("the cache holds " + std::to_string(options.cache->max_length) + " tokens, and " +
                  std::to_string(end) + " were given");
    }
    options.cache->keys.resize(choosers_.size());
    options.cache->values.resize(choosers_.size());
  }
  reserve_positions(end);
  const bool in_slot = options.cache != nullptr && options.cache->slot.defined();
  const auto rows = [&](const Tensor& table) {  // of this call's positions
    return in_slot ? table.index_select(0, options.cache->slot)
                   : table.narrow(0, position, tokens.size(1));
  };
  Rotation rotation{rows(cos_), rows(sin_), {}};
  if (tokens.size(1) <= Rotate::kPiece) {
    rotation.matrices = rotations(rotation.cos, rotation.sin);
  }
  const bool again = options.recompute && torch::GradMode::is_enabled();
  Tensor x = torch::embedding(parameters_.at(kEmbedding), tokens).to(compute_);
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    x = again ? recomputed_block(layer, x, rotation, options) : block(layer, x, rotation, options);
  }
  if (options.cache != nullptr && !in_slot) options.cache->length = end;
  return rms_norm(x, parameters_.at(kFinalNorm), config_.rms_norm_eps);
}

}  // namespace twell::app
