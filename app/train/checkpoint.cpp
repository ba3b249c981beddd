#include "app/train/checkpoint.h"

#include <map>
#include <string>

#include "app/error.h"
#include "app/hf/safetensors.h"

namespace twell::app {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(L1Controller, target, initial, warmup, arrival, lambda, active,
                                   departure, error)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(FfnDensity, active, tile_union)

static void to_json(nlohmann::json& json, const FfnChooser& chooser) {
  const Readback& measured = chooser.measured;
  json = {{"calls", chooser.calls},
          {"density", chooser.density},
          {"sparse", chooser.sparse},
          {"measured", measured.defined() ? measured.values() : std::vector<double>()}};
}

static void from_json(const nlohmann::json& json, FfnChooser& chooser) {
  json.at("calls").get_to(chooser.calls);
  json.at("density").get_to(chooser.density);
  json.at("sparse").get_to(chooser.sparse);
  const auto measured = json.at("measured").get<std::vector<double>>();
  chooser.measured = measured.empty() ? Readback() : Readback(measured);
}

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(MetricsWindow, revived, steps, tokens, seconds)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TrainingState, options, step, seconds, step_seconds, figures,
                                   controller, choosers, revived, window, corpus_hash)

namespace {

constexpr const char* kFormat = "twell-training-6";

constexpr const char* kWindowFigures = "window.figures";

std::string window_activity(std::size_t layer) {
  return "window.activity." + std::to_string(layer);
}

std::map<std::string, torch::Tensor> all_tensors(const Llama& model, const AdamW& optimizer,
                                                 const Revival& revival) {
  std::map<std::string, torch::Tensor> tensors = optimizer.state();
  tensors["idle"] = revival.idle();
  for (const auto& [name, value] : model.parameters()) tensors[name] = value.detach();
  return tensors;
}

}  // namespace

std::filesystem::path checkpoint_path(const std::filesystem::path& folder) {
  return folder / "checkpoint.safetensors";
}

void save_checkpoint(const std::filesystem::path& folder, const TrainingState& state,
                     const Llama& model, const AdamW& optimizer, const Revival& revival) {
  std::map<std::string, torch::Tensor> tensors = all_tensors(model, optimizer, revival);
  tensors[kWindowFigures] = state.window.figures;
  for (std::size_t layer = 0; layer < state.window.activity.size(); ++layer) {
    tensors[window_activity(layer)] = state.window.activity[layer];
  }
  write_safetensors(checkpoint_path(folder), tensors,
                    {{"format", kFormat}, {"state", nlohmann::json(state).dump()}});
}

TrainingState read_checkpoint_state(const std::filesystem::path& folder) {
  const std::filesystem::path path = checkpoint_path(folder);
  if (!std::filesystem::exists(path)) {
    throw Error("nothing to resume: there is no " + path.string());
  }
  const auto metadata = Safetensors::open(path).metadata();
  const auto format = metadata.find("format");
  const auto state = metadata.find("state");
  if (format == metadata.end() || format->second != kFormat || state == metadata.end()) {
    throw Error(path.string() + ": not a checkpoint of this version of twell train (" + kFormat +
                ")");
  }
  try {
    return nlohmann::json::parse(state->second).get<TrainingState>();
  } catch (const nlohmann::json::exception& error) {
    throw Error(path.string() + ": its state is damaged: " + error.what());
  }
}

void read_checkpoint_tensors(const std::filesystem::path& folder, TrainingState& state,
                             Llama& model, AdamW& optimizer, Revival& revival) {
  const torch::NoGradGuard no_grad;
  const Safetensors file = Safetensors::open(checkpoint_path(folder));
  for (auto& [name, target] : all_tensors(model, optimizer, revival)) {
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end() || target.sizes() != found->second.shape ||
        found->second.dtype != target.scalar_type()) {
      throw Error(checkpoint_path(folder).string() + ": tensor '" + name +
                  "' is missing or does not fit " + (folder / "config.json").string());
    }
    target.copy_(file.load(name));
  }
  if (state.choosers.size() != model.choosers().size()) {
    throw Error(checkpoint_path(folder).string() + ": written for another number of layers");
  }
  model.choosers() = state.choosers;
  state.window.figures = file.load(kWindowFigures).to(model.device());
  for (std::size_t layer = 0; layer < state.choosers.size(); ++layer) {
    state.window.activity.push_back(file.load(window_activity(layer)).to(model.device()));
  }
  optimizer.set_steps(state.step);
}

}  // namespace twell::app
