#include "app/compact/compact.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>

#include "app/error.h"
#include "app/hf/config.h"
#include "app/hf/safetensors.h"

namespace twell::app {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

// What may lie beside a model and does not depend on its width.
constexpr const char* kCompanions[] = {
    "tokenizer.json",    "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model",       "vocab.json",
    "merges.txt",        "chat_template.jinja",   "generation_config.json"};

// The layer of a feed-forward matrix "model.layers.L.mlp.…", or none.
std::optional<size_t> mlp_layer(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  const size_t end = name.find(".mlp.");
  if (!name.starts_with(kPrefix) || end == std::string::npos) return std::nullopt;
  return std::stoul(name.substr(kPrefix.size(), end - kPrefix.size()));
}

// The slices `kept` of `value` along `dim`, then zeros up to `width`.
Tensor cut(const Tensor& value, int64_t dim, const Tensor& kept, int64_t width) {
  std::vector<int64_t> shape = value.sizes().vec();
  shape[static_cast<size_t>(dim)] = width;
  Tensor result = torch::zeros(shape, value.options());
  result.narrow(dim, 0, kept.size(0)).copy_(value.index_select(dim, kept));
  return result;
}

}  // namespace

Compaction plan_compaction(const std::vector<Tensor>& activity, int64_t multiple) {
  Compaction result;
  int64_t most = 0;
  for (const Tensor& counts : activity) {
    result.kept.push_back(counts.cpu().nonzero().flatten());
    most = std::max(most, result.kept.back().size(0));
  }
  result.width = std::max<int64_t>(1, (most + multiple - 1) / multiple) * multiple;
  const int64_t neurons = activity.empty() ? 0 : activity.front().size(0);
  if (result.width >= neurons) {
    throw Error("nothing to remove: a layer needs " + std::to_string(most) + " of its " +
                std::to_string(neurons) + " neurons, and all layers get one width, a multiple of " +
                std::to_string(multiple));
  }
  return result;
}

void write_compacted(const fs::path& from, const fs::path& to, const Compaction& compaction) {
  check_output_folder(to);
  ModelConfig config = read_config(from);
  config.intermediate_size = compaction.width;
  const Safetensors file = Safetensors::open(from);
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, info] : file.tensors()) {
    const Tensor value = file.view(name);
    const std::optional<size_t> layer = mlp_layer(name);
    const bool down = name.ends_with("down_proj.weight");  // [hidden, neurons], others transposed
    tensors[name] =
        layer ? cut(value, down ? 1 : 0, compaction.kept.at(*layer), compaction.width) : value;
  }
  fs::create_directories(to);
  write_config(to, config);
  for (const char* name : kCompanions) {
    if (fs::is_regular_file(from / name)) {
      fs::copy_file(from / name, to / name, fs::copy_options::overwrite_existing);
    }
  }
  write_safetensors(to / "model.safetensors", tensors);  // last: without it there is no checkpoint
}

void check_output_folder(const fs::path& folder) {
  if (!fs::exists(folder) || (fs::is_directory(folder) && fs::is_empty(folder))) return;
  throw Error("--out " + folder.string() +
              " exists already and is not an empty folder; choose another");
}

int64_t checkpoint_bytes(const fs::path& folder) {
  const Safetensors file = Safetensors::open(folder);
  uint64_t bytes = 0;
  for (const auto& [name, info] : file.tensors()) bytes += info.bytes;
  return static_cast<int64_t>(bytes);
}

}  // namespace twell::app
