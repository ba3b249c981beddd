#include "app/bench/model_bench.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "app/bench/energy.h"
#include "app/bench/kernel_times.h"
#include "app/bench/peak_memory.h"
#include "app/bench/timer.h"
#include "app/error.h"
#include "app/train/loss.h"
#include "app/train/optimizer.h"

namespace twell::app {
namespace {

using torch::Tensor;
using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr double kLearningRate = 1e-6;
constexpr double kLambda = 1e-4;  // of the L1 term, as `twell train` starts with
constexpr double kLossTolerance = 2e-3;
constexpr double kNormTolerance = 0.05;
constexpr double kEnergySeconds = 5;  // the counter moves about ten times per second
constexpr std::int64_t kWarmUp = 2;
constexpr std::int64_t kMinRounds = 3;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Step {
  Tensor hidden;               // where there is no loss yet
  Tensor loss, gradient_norm;  // on the device
  std::vector<FfnPath> paths;
};

struct Form {
  explicit Form(FfnMode mode) : mode(mode), name(name_of(mode)) {}

  FfnMode mode;
  std::string name;
  std::vector<double> ms{};
  Step last{};
  std::optional<std::int64_t> peak{};
  std::optional<double> joules{};  // per step
  Json kernels = Json::array();
};

class Stepper {
 public:
  Stepper(Llama& model, ModelWork work, bool recompute)
      : model_(model), work_(work), recompute_(recompute) {
    const bool training = work == ModelWork::kTrain;
    for (auto& [name, value] : model_.parameters()) value.requires_grad_(training);
    if (training) optimizer_.emplace(model_.parameters(), AdamWOptions{});
  }

  // tokens [windows, tokens + 1]
  Step operator()(FfnMode mode, const Tensor& tokens) {
    const bool training = work_ == ModelWork::kTrain;
    const torch::AutoGradMode grad(training);
    std::vector<FfnOutput> ffns;
    ForwardOptions forward;
    forward.ffn = mode;
    forward.ffn_outputs = &ffns;
    forward.counts = training ? FfnCounts::kL1 : FfnCounts::kNone;
    forward.recompute = recompute_;
    const Tensor hidden = model_.forward(tokens.narrow(1, 0, tokens.size(1) - 1), forward);
    Step step;
    for (const FfnOutput& ffn : ffns) step.paths.push_back(ffn.path);
    if (work_ == ModelWork::kForward) {
      model_.logits(hidden.select(1, -1));
      step.hidden = hidden;
      return step;
    }
    const Tensor loss = loss_of(hidden, tokens);
    step.loss = loss.detach();
    if (!training) return step;
    Tensor l1 = torch::zeros({}, loss.options());
    for (const FfnOutput& ffn : ffns) l1 = l1 + ffn.l1;
    const auto rows = static_cast<double>(ffns.size()) * static_cast<double>(hidden.numel()) /
                      static_cast<double>(hidden.size(-1));
    (loss + kLambda / rows * l1).backward();
    step.gradient_norm = optimizer_->step(kLearningRate);
    return step;
  }

  // The loss of a step that left it out.
  void complete(Step& step, const Tensor& tokens) const {
    if (step.loss.defined()) return;
    const torch::NoGradGuard no_grad;
    step.loss = loss_of(std::exchange(step.hidden, Tensor()), tokens);
  }

 private:
  Tensor loss_of(const Tensor& hidden, const Tensor& tokens) const {
    const Tensor targets = tokens.narrow(1, 1, hidden.size(1)).reshape({-1});
    return linear_cross_entropy(hidden.reshape({targets.size(0), -1}), model_.head(), targets);
  }

  Llama& model_;
  ModelWork work_;
  bool recompute_;
  std::optional<AdamW> optimizer_;
};

void wait_for(const torch::Device& device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
  }
}

// |a - b| relative to b.
double apart(double a, double b) { return std::abs(a - b) / std::max(std::abs(b), 1e-12); }

// The greatest difference of a loss from the first form's; Error if it, or that of the gradients'
// norms, is beyond rounding.
double check_alike(const std::vector<Form>& forms, bool training) {
  const Step& first = forms.front().last;
  const double loss = first.loss.item<double>();
  double most = 0;
  for (const Form& form : forms) {
    const double other = form.last.loss.item<double>();
    const double difference = apart(other, loss);
    if (!(difference <= kLossTolerance)) {
      throw Error("the loss is " + std::to_string(other) + " with " + form.name + " blocks and " +
                  std::to_string(loss) + " with " + forms.front().name +
                  " ones on the same batch; they must be equal within 0.2%");
    }
    most = std::max(most, difference);
    if (!training) continue;
    const double norm = form.last.gradient_norm.item<double>();
    const double first_norm = first.gradient_norm.item<double>();
    if (!(apart(norm, first_norm) <= kNormTolerance)) {
      throw Error("the gradient's norm is " + std::to_string(norm) + " with " + form.name +
                  " blocks and " + std::to_string(first_norm) + " with " + forms.front().name +
                  " ones on the same batch; they must be equal within 5%");
    }
  }
  return most;
}

double joules_per_step(const EnergyMeter& meter, const std::function<void()>& step) {
  const double before = meter.joules();
  const auto start = Clock::now();
  std::int64_t steps = 0;
  for (; seconds_since(start) < kEnergySeconds; ++steps) step();
  return (meter.joules() - before) / static_cast<double>(steps);
}

// Mean active neurons per token of each layer.
Json activity(Llama& model, const Tensor& tokens) {
  const torch::NoGradGuard no_grad;
  std::vector<FfnOutput> ffns;
  ForwardOptions forward;
  forward.ffn_outputs = &ffns;
  const Tensor inputs = tokens.narrow(1, 0, tokens.size(1) - 1);
  model.forward(inputs, forward);
  Json result = Json::array();
  for (const FfnOutput& ffn : ffns) {
    result.push_back(ffn.l0.item<double>() / static_cast<double>(inputs.numel()));
  }
  return result;
}

template <class T>
Json nullable(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

}  // namespace

const char* name_of(ModelWork work) {
  switch (work) {
    case ModelWork::kForward:
      return "forward";
    case ModelWork::kEval:
      return "eval";
    case ModelWork::kTrain:
      return "train";
  }
  return "?";
}

Json bench_model(Llama& model, const std::vector<Tensor>& batches,
                 const ModelBenchOptions& options) {
  for (const FfnMode mode : options.forms) model.check_mode(mode);
  if (!model.is_relu()) {
    throw Error("hidden_act is \"" + model.config().hidden_act +
                "\": such a model has no sparse form to compare; permitted: \"relu\"");
  }
  const torch::Device device = model.device();
  std::vector<Form> forms(options.forms.begin(), options.forms.end());
  const auto count = static_cast<std::int64_t>(forms.size());
  const Json active = activity(model, batches.front());
  Stepper step(model, options.work, options.recompute);
  const Timer timer(device, /*flush=*/false);
  const bool training = options.work == ModelWork::kTrain;

  double loss_difference = 0;
  std::int64_t rounds = -kWarmUp;
  auto start = Clock::now();
  for (double spent = 0; rounds < kMinRounds || spent < options.seconds; ++rounds) {
    if (rounds == 0) start = Clock::now();
    const std::int64_t turn = rounds + kWarmUp;
    const Tensor& tokens = batches[static_cast<std::size_t>(turn) % batches.size()];
    for (std::int64_t i = 0; i < count; ++i) {
      Form& form = forms[static_cast<std::size_t>((turn + i) % count)];
      const double ms = timer([&] { form.last = step(form.mode, tokens); });
      step.complete(form.last, tokens);
      if (rounds >= 0) form.ms.push_back(ms);
    }
    loss_difference = std::max(loss_difference, check_alike(forms, training));
    spent = rounds < 0 ? 0 : seconds_since(start);
    if (options.progress && options.seconds > 0) options.progress(spent / options.seconds);
  }
  const EnergyMeter meter(device);
  for (Form& form : forms) {
    // Waits for the device at the end of each step, so that all of it is counted.
    const auto once = [&] {
      step(form.mode, batches.front());
      wait_for(device);
    };
    form.peak = peak_bytes(device, once);
    if (meter.works()) form.joules = joules_per_step(meter, once);
    if (!options.kernels) continue;
    for (const KernelTime& kernel : kernel_times(once)) {
      form.kernels.push_back({{"name", kernel.name}, {"calls", kernel.calls}, {"ms", kernel.ms}});
    }
  }

  const ModelConfig& c = model.config();
  const std::int64_t windows = batches.front().size(0), length = batches.front().size(1) - 1;
  const auto tokens = static_cast<double>(windows * length);
  Json result = {{"mode", name_of(options.work)},
                 {"checkpoint_activations", options.recompute},
                 {"batch", windows},
                 {"tokens", length},
                 {"parameters", model.parameter_count()},
                 {"layers", c.num_hidden_layers},
                 {"hidden", c.hidden_size},
                 {"neurons", c.intermediate_size},
                 {"heads", c.num_attention_heads},
                 {"kv_heads", c.num_key_value_heads},
                 {"vocabulary", c.vocab_size}};
  for (const Form& form : forms) result[form.name + "_ms"] = quantile(form.ms, 0.5);
  result["ratio"] = quantile(forms.front().ms, 0.5) / quantile(forms.back().ms, 0.5);
  for (const Form& form : forms) {
    const double median = quantile(form.ms, 0.5);
    result["spread_ms"][form.name] = {
        {"p10", quantile(form.ms, 0.1)}, {"median", median}, {"p90", quantile(form.ms, 0.9)}};
    result["tokens_per_second"][form.name] = tokens / median * 1000;
    result["loss"][form.name] = form.last.loss.item<double>();
    result["gradient_norm"][form.name] =
        training ? Json(form.last.gradient_norm.item<double>()) : Json();
    result["peak_bytes"][form.name] = nullable(form.peak);
    result["energy_mj_per_token"][form.name] =
        form.joules ? Json(*form.joules / tokens * 1000) : Json();
    Json paths = Json::array();
    for (const FfnPath path : form.last.paths) paths.push_back(name_of(path));
    result["ffn_per_layer"][form.name] = paths;
    if (options.kernels) result["kernels"][form.name] = form.kernels;
  }
  result["energy_missing"] = meter.works() ? Json() : Json(meter.reason());
  result["active_per_layer"] = active;
  result["loss_difference"] = loss_difference;
  result["rounds"] = rounds;
  return result;
}

}  // namespace twell::app
