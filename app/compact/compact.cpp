#include "app/compact/compact.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "app/error.h"
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
std::optional<int64_t> mlp_layer(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  const size_t end = name.find(".mlp.");
  if (!name.starts_with(kPrefix) || end == std::string::npos) return std::nullopt;
  return std::stoll(name.substr(kPrefix.size(), end - kPrefix.size()));
}

// The slices `kept` of `value` along `dim`, then zeros up to `width`.
Tensor cut(const Tensor& value, int64_t dim, const Tensor& kept, int64_t width) {
  std::vector<int64_t> shape = value.sizes().vec();
  shape[static_cast<size_t>(dim)] = width;
  Tensor result = torch::zeros(shape, value.options());
  result.narrow(dim, 0, kept.size(0)).copy_(value.index_select(dim, kept));
  return result;
}

// The neurons with a count, filled up to `width` (or to all there are) with the first without.
Tensor kept_neurons(const Tensor& counts, int64_t width) {
  const Tensor fired_first = counts.eq(0).to(torch::kInt64).argsort(/*stable=*/true);
  return std::get<0>(fired_first.narrow(0, 0, std::min(width, counts.size(0))).sort());
}

}  // namespace

Compaction plan_compaction(const std::vector<Tensor>& activity, int64_t multiple, bool one_width) {
  Compaction result;
  std::vector<int64_t> before, widths;
  for (const Tensor& counts : activity) {
    const auto fired = counts.count_nonzero().item<int64_t>();
    const int64_t rounded = std::max<int64_t>(1, (fired + multiple - 1) / multiple) * multiple;
    result.fired.push_back(fired);
    before.push_back(counts.size(0));
    widths.push_back(std::min(rounded, counts.size(0)));
  }
  if (one_width) {
    const int64_t widest = *std::max_element(widths.begin(), widths.end());
    widths.assign(widths.size(), widest);
  }
  if (widths == before) {
    const auto most = std::max_element(result.fired.begin(), result.fired.end());
    const auto layer = most - result.fired.begin();
    throw Error("nothing to remove: layer " + std::to_string(layer) + " needs " +
                std::to_string(*most) + " of its " + std::to_string(before[layer]) +
                " neurons, all of them in multiples of " + std::to_string(multiple) +
                (one_width ? ", and --one-width gives all layers as many"
                           : ", and no other layer can spare any"));
  }
  result.widths = LayerWidths(widths);
  if (!result.widths.all_equal()) {
    for (size_t layer = 0; layer < widths.size(); ++layer) {
      if (widths[layer] % 8 == 0) continue;
      throw Error("layer " + std::to_string(layer) + " would have " +
                  std::to_string(widths[layer]) +
                  " neurons, and widths that differ must be multiples of 8; choose another "
                  "--multiple, or --one-width");
    }
  }
  for (size_t layer = 0; layer < activity.size(); ++layer) {
    result.kept.push_back(kept_neurons(activity[layer].cpu(), widths[layer]));
  }
  return result;
}

void write_compacted(const fs::path& from, const fs::path& to, const Compaction& compaction) {
  check_output_folder(to);
  ModelConfig config = read_config(from);
  config.intermediate_size = compaction.widths;
  const Safetensors file = Safetensors::open(from);
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, info] : file.tensors()) {
    const Tensor value = file.view(name);
    const std::optional<int64_t> layer = mlp_layer(name);
    const bool down = name.ends_with("down_proj.weight");  // [hidden, neurons], others transposed
    tensors[name] =
        layer ? cut(value, down ? 1 : 0, compaction.kept.at(*layer), compaction.widths[*layer])
              : value;
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

CheckpointBytes checkpoint_bytes(const fs::path& folder) {
  const Safetensors file = Safetensors::open(folder);
  CheckpointBytes result;
  for (const auto& [name, info] : file.tensors()) {
    const auto bytes = static_cast<int64_t>(info.bytes);
    result.all += bytes;
    if (const auto layer = mlp_layer(name)) result.ffn[*layer] += bytes;
  }
  return result;
}

}  // namespace twell::app
