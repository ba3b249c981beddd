#include "app/train/trainer.h"

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "app/data/tokens.h"
#include "app/error.h"
#include "app/hf/tokenizer.h"
#include "app/model/llama.h"
#include "app/train/checkpoint.h"
#include "app/train/evaluate.h"
#include "app/train/loss.h"
#include "app/train/metrics.h"
#include "app/train/optimizer.h"
#include "app/train/revival.h"
#include "app/train/schedule.h"
#include "app/util/atomic_file.h"
#include "app/util/file.h"
#include "app/util/progress.h"
#include "app/util/transfer.h"

namespace twell::app {
namespace {

using torch::Tensor;
using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

constexpr int64_t kFinalEvaluation = 8;  // the last evaluation takes so many times eval_tokens

// Notes SIGINT and SIGTERM while it lives; a second signal of a kind has its usual effect.
class SignalWatch {
 public:
  SignalWatch() {
    caught_ = 0;
    struct sigaction action {};
    action.sa_handler = [](int) { caught_ = 1; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigaction(SIGINT, &action, &old_int_);
    sigaction(SIGTERM, &action, &old_term_);
  }
  ~SignalWatch() {
    sigaction(SIGINT, &old_int_, nullptr);
    sigaction(SIGTERM, &old_term_, nullptr);
  }
  static bool caught() { return caught_ != 0; }

 private:
  static inline volatile std::sig_atomic_t caught_ = 0;
  struct sigaction old_int_ {
  }, old_term_{};
};

// While it lives, PyTorch computes by deterministic algorithms or, without one, throws.
class DeterministicAlgorithms {
 public:
  explicit DeterministicAlgorithms(bool wanted) {
    at::globalContext().setDeterministicFillUninitializedMemory(false);  // costs time, finds bugs
    at::globalContext().setDeterministicAlgorithms(wanted, false);
  }
  ~DeterministicAlgorithms() {
    at::globalContext().setDeterministicAlgorithms(before_, before_warn_only_);
    at::globalContext().setDeterministicFillUninitializedMemory(before_fill_);
  }

 private:
  const bool before_ = at::globalContext().deterministicAlgorithms();
  const bool before_warn_only_ = at::globalContext().deterministicAlgorithmsWarnOnly();
  const bool before_fill_ = at::globalContext().deterministicFillUninitializedMemory();
};

// FNV-1a over the tokens.
uint64_t hash_of(const Corpus& corpus) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const TokenStream* stream : {&corpus.train, &corpus.heldout}) {
    for (int64_t i = 0; i < stream->size(); ++i) {
      hash = (hash ^ static_cast<uint64_t>((*stream)[i])) * 0x100000001b3u;
    }
    hash = (hash ^ static_cast<uint64_t>(stream->size())) * 0x100000001b3u;
  }
  return hash;
}

// The end-of-text token named `wanted`, or by one of its usual names.
int64_t find_eos(const Tokenizer& tokenizer, const std::string& wanted) {
  if (!wanted.empty()) {
    if (const auto id = tokenizer.token_to_id(wanted)) return *id;
    throw Error("--eos is '" + wanted + "', and the tokenizer has no such token");
  }
  for (const char* name :
       {"<|eos|>", "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]"}) {
    if (const auto id = tokenizer.token_to_id(name)) return *id;
  }
  throw Error("the tokenizer has none of the usual end-of-text tokens: name yours with --eos");
}

// The id that separates documents: the one the model's config.json names, where there is a model
// that goes with the tokenizer.
int64_t find_separator(const TrainRun& run, const TrainOptions& o, const Tokenizer& tokenizer) {
  const bool from_init = !o.init.empty() && o.tokenizer == o.init && o.eos.empty();
  std::optional<int64_t> known;
  if (run.resume) {
    known = read_config(run.folder).separator();
  } else if (from_init) {
    known = read_config(o.init).separator();
  }
  return known ? *known : find_eos(tokenizer, o.eos);
}

// The id that starts a text; where the tokenizer has none of its own, the separator serves.
int64_t find_bos(const Tokenizer& tokenizer, int64_t eos) {
  return tokenizer.token_to_id("<|bos|>").value_or(eos);
}

ModelConfig new_config(const TrainOptions& o, const Tokenizer& tokenizer, int64_t eos) {
  ModelConfig c;
  c.vocab_size = (tokenizer.id_limit() + 7) / 8 * 8;
  c.hidden_size = o.hidden;
  c.intermediate_size = o.neurons;
  c.num_hidden_layers = o.layers;
  c.num_attention_heads = o.heads;
  c.num_key_value_heads = o.kv_heads;
  c.head_dim = o.hidden / o.heads;
  c.max_position_embeddings = o.context;
  c.hidden_act = "relu";
  c.tie_word_embeddings = true;
  c.bos_token_id = find_bos(tokenizer, eos);
  c.eos_token_ids = {eos};
  return c;
}

// tokenizer.json and tokenizer_config.json beside the model.
void write_tokenizer(const fs::path& folder, const Tokenizer& tokenizer, const fs::path& source,
                     int64_t eos, int64_t context) {
  write_file(folder / "tokenizer.json", tokenizer.json());
  const fs::path given =
      (fs::is_directory(source) ? source : source.parent_path()) / "tokenizer_config.json";
  if (fs::is_regular_file(given)) {
    write_file(folder / "tokenizer_config.json", read_file(given, uint64_t{1} << 24));
    return;
  }
  const auto name = [&](int64_t id) { return tokenizer.id_to_token(id).value_or(""); };
  const Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", name(find_bos(tokenizer, eos))},
                       {"eos_token", name(eos)},
                       {"model_max_length", context},
                       {"clean_up_tokenization_spaces", false}};
  write_file(folder / "tokenizer_config.json", config.dump(2) + "\n");
}

// What a step tells of itself: cross entropy, mean Σ|h|, mean active neurons per token and layer,
// norm of the gradient. The host learns of it while the next step runs on the device.
enum Figure { kLoss, kL1, kActive, kGradientNorm, kFigures };

// A line of metrics that lacks what is still on its way from the device: the window's figures,
// then per layer the active (token, neuron) pairs, then per layer the silent neurons.
struct Line {
  Json json;
  Readback sums;
  int64_t steps = 0, tokens = 0;
};

// sum += value, where an undefined sum is zero.
void add(Tensor& sum, const Tensor& value) { sum = sum.defined() ? sum + value : value; }

class Trainer {
 public:
  explicit Trainer(const TrainRun& run);
  Json run();

 private:
  Llama make_model(bool resume);
  void step();
  void queue_step();
  std::vector<double> figures_of(const Readback& figures, int64_t step) const;
  void wait();  // for the last step
  void add_step_seconds(Clock::time_point start);
  void log(bool evaluate_heldout);
  void write_line();
  void start_window();
  std::string progress_text() const;
  Evaluation evaluate_heldout(int64_t tokens);
  void save();
  Json summary();
  double seconds() const;   // since the start of the run, earlier parts included
  double progress() const;  // of the run, at the step that comes next
  bool finished() const;

  const Clock::time_point start_ = Clock::now();
  fs::path folder_;
  torch::Device device_;
  TrainingState state_;
  const DeterministicAlgorithms deterministic_;
  double seconds_before_ = 0;
  Tokenizer tokenizer_;
  int64_t eos_;
  Corpus corpus_;
  Llama model_;
  AdamW optimizer_;
  Revival revival_;
  BatchSampler sampler_;
  Metrics metrics_;
  Readback figures_;            // of the step before
  std::vector<double> landed_;  // of the one before that
  std::optional<Line> line_;    // to be written
  double progress_ = 0;
  std::vector<FfnPath> paths_;
};

TrainingState initial_state(const TrainRun& run) {
  if (run.resume) return read_checkpoint_state(run.folder);
  TrainingState state;
  state.options = run.options;
  validate(state.options);
  for (const char* name : {"checkpoint.safetensors", "model.safetensors"}) {
    if (fs::exists(run.folder / name)) {
      throw Error("--out " + run.folder.string() + " already holds " + name +
                  ": continue with --resume, or choose another folder");
    }
  }
  return state;
}

Corpus load_corpus(const TrainOptions& options, const Tokenizer& tokenizer, int64_t eos) {
  std::vector<fs::path> paths(options.data.begin(), options.data.end());
  Corpus corpus = tokenize_corpus(paths, tokenizer, eos, options.heldout);
  std::fprintf(stderr, "data: %s; %lld tokens to train on, %lld held out\n",
               corpus.report.summary().c_str(), static_cast<long long>(corpus.train.size()),
               static_cast<long long>(corpus.heldout.size()));
  return corpus;
}

Trainer::Trainer(const TrainRun& run)
    : folder_(run.folder),
      device_(run.device),
      state_(initial_state(run)),
      deterministic_(state_.options.deterministic),
      seconds_before_(state_.seconds),
      tokenizer_(Tokenizer::load(run.resume ? folder_ / "tokenizer.json"
                                            : fs::path(state_.options.tokenizer))),
      eos_(find_separator(run, state_.options, tokenizer_)),
      corpus_(load_corpus(state_.options, tokenizer_, eos_)),
      model_(make_model(run.resume)),
      optimizer_(model_.parameters(),
                 {.weight_decay = state_.options.weight_decay, .clip = state_.options.clip}),
      revival_(state_.options.revive_after, state_.options.seed, model_),
      sampler_(corpus_.train, state_.options.batch, state_.options.context, state_.options.seed),
      metrics_((fs::create_directories(folder_), folder_ / "metrics.jsonl"),
               run.resume ? state_.step : -1) {
  const TrainOptions& o = state_.options;
  const uint64_t hash = hash_of(corpus_);
  if (run.resume) {
    if (hash != state_.corpus_hash) {
      throw Error("the training data has changed since " + checkpoint_path(folder_).string() +
                  " was written; a run can be resumed on the same data only");
    }
    read_checkpoint_tensors(folder_, state_, model_, optimizer_, revival_);
    if (!state_.figures.empty()) figures_ = Readback(state_.figures);
  } else {
    state_.corpus_hash = hash;
    state_.controller.target =
        parse_target_active(o.target_active, model_.config().intermediate_size.mean());
    state_.controller.initial = o.lambda;
    state_.controller.warmup = o.warmup;
    state_.controller.arrival = o.arrival;
    start_window();
    write_config(folder_, model_.config());
    write_tokenizer(folder_, tokenizer_, o.tokenizer, eos_, o.context);
    save();
  }
  progress_ = progress();
}

Llama Trainer::make_model(bool resume) {
  const TrainOptions& o = state_.options;
  Llama model = [&] {
    if (resume) return Llama::create(read_config(folder_), o.seed, torch::kBFloat16, device_);
    if (!o.init.empty()) {
      return Llama::load(o.init, torch::kFloat32, torch::kBFloat16, device_);
    }
    return Llama::create(new_config(o, tokenizer_, eos_), o.seed, torch::kBFloat16, device_);
  }();
  if (!model.is_relu()) {
    throw Error(o.init + " has hidden_act \"" + model.config().hidden_act +
                "\"; twell trains sparse models: \"relu\" is needed");
  }
  if (model.config().vocab_size < tokenizer_.id_limit()) {
    throw Error(o.init + " has " + std::to_string(model.config().vocab_size) +
                " embeddings, too few for a tokenizer with " +
                std::to_string(tokenizer_.id_limit()) + " ids");
  }
  model.set_separator(eos_);  // evaluation must cut the text as training does
  for (auto& [name, value] : model.parameters()) value.requires_grad_(true);
  return model;
}

double Trainer::seconds() const {
  return seconds_before_ + std::chrono::duration<double>(Clock::now() - start_).count();
}

double Trainer::progress() const {
  const TrainOptions& o = state_.options;
  if (o.steps > 0) return static_cast<double>(state_.step) / static_cast<double>(o.steps);
  return std::min(1.0, state_.seconds / o.max_seconds);
}

bool Trainer::finished() const {
  const TrainOptions& o = state_.options;
  return (o.steps > 0 && state_.step >= o.steps) ||
         (o.max_seconds > 0 && state_.seconds >= o.max_seconds);
}

void Trainer::step() {
  const Clock::time_point start = Clock::now();
  const Readback before = figures_;
  queue_step();  // sets figures_
  // Only now, with work for the device in the queue, the host waits for the step before.
  if (before.defined()) landed_ = figures_of(before, state_.step - 1);
  add_step_seconds(start);
  write_line();
  state_.seconds = seconds();
  progress_ = progress();
  if (before.defined()) state_.controller.update(landed_[kActive], progress_);
}

void Trainer::wait() {
  const Clock::time_point start = Clock::now();
  if (figures_.defined()) figures_of(figures_, state_.step);
  add_step_seconds(start);
}

void Trainer::add_step_seconds(Clock::time_point start) {
  const double spent = std::chrono::duration<double>(Clock::now() - start).count();
  state_.window.seconds += spent;
  state_.step_seconds += spent;
}

// The figures of a step, once they are there; Error if its gradient is not finite.
std::vector<double> Trainer::figures_of(const Readback& figures, int64_t step) const {
  std::vector<double> values = figures.values();
  if (!std::isfinite(values[kGradientNorm])) {
    throw Error("training diverged: the gradient of step " + std::to_string(step) +
                " is not finite; start again with a lower --lr than " +
                Json(state_.options.lr).dump());
  }
  return values;
}

void Trainer::queue_step() {
  const TrainOptions& o = state_.options;
  const auto layers = static_cast<size_t>(model_.config().num_hidden_layers);
  const int64_t rows = o.accumulate * o.batch * o.context;
  std::vector<Tensor> activity(layers);  // per layer [neurons] int64
  const auto wide = torch::TensorOptions(device_).dtype(torch::kFloat64);
  Tensor figures = torch::zeros({kGradientNorm}, wide);
  for (int64_t part = 0; part < o.accumulate; ++part) {
    const Tensor tokens = upload(sampler_.batch(state_.step * o.accumulate + part), device_);
    const Tensor targets = tokens.narrow(1, 1, o.context).reshape({-1});
    std::vector<FfnOutput> ffns;
    ForwardOptions forward;
    forward.ffn = parse_ffn_mode(o.ffn);
    forward.ffn_outputs = &ffns;
    forward.recompute = o.checkpoint_activations;
    const Tensor hidden = model_.forward(tokens.narrow(1, 0, o.context), forward);
    const Tensor loss =
        linear_cross_entropy(hidden.reshape({targets.size(0), -1}), model_.head(), targets);
    Tensor l1 = torch::zeros({}, loss.options());
    for (const FfnOutput& ffn : ffns) l1 = l1 + ffn.l1;
    // The mean over layers and tokens of Σ|h|.
    l1 = l1 / (static_cast<double>(layers) * static_cast<double>(targets.size(0)));
    const double lambda = state_.controller.lambda;
    const Tensor objective = lambda > 0 ? loss + lambda * l1 : loss;  // 0: no gradient of Σ|h|
    (objective / static_cast<double>(o.accumulate)).backward();

    Tensor l0 = torch::zeros({}, wide);
    paths_.clear();
    for (size_t layer = 0; layer < layers; ++layer) {
      add(activity[layer], ffns[layer].activity.to(torch::kInt64));
      l0 = l0 + ffns[layer].l0;
      paths_.push_back(ffns[layer].path);
    }
    figures += torch::stack({loss.detach().to(torch::kFloat64) / o.accumulate,
                             l1.detach().to(torch::kFloat64) / o.accumulate,
                             l0 / (static_cast<double>(layers) * static_cast<double>(rows))});
  }
  const Tensor norm = optimizer_.step(o.lr * cosine_schedule(progress_, o.warmup, o.lr_floor));
  figures = torch::cat({figures, norm.to(torch::kFloat64).reshape({1})});
  figures_ = Readback(figures);
  ++state_.step;
  const std::vector<int64_t> revived = revival_.step(state_.step, activity, model_, optimizer_);
  MetricsWindow& window = state_.window;
  window.figures += figures;
  for (size_t layer = 0; layer < layers; ++layer) {
    window.activity[layer] += activity[layer];
    window.revived[layer] += revived[layer];
    state_.revived += revived[layer];
  }
  window.tokens += rows;
  ++window.steps;
}

Evaluation Trainer::evaluate_heldout(int64_t tokens) {
  const TrainOptions& o = state_.options;
  EvaluationOptions options;
  options.ffn = parse_ffn_mode(o.ffn);
  options.context = o.context;
  options.batch = o.batch;
  options.max_tokens = tokens;
  // Evaluation must leave no trace in what the next steps choose.
  const std::vector<FfnChooser> kept = model_.choosers();
  Evaluation result = evaluate(model_, corpus_.heldout, options);
  model_.choosers() = kept;
  return result;
}

void Trainer::log(bool with_heldout) {
  const TrainOptions& o = state_.options;
  if (with_heldout) wait();
  write_line();
  MetricsWindow& window = state_.window;
  line_.emplace();
  line_->steps = window.steps;
  line_->tokens = window.tokens;
  std::vector<Tensor> pairs, silent;  // scalars, one per layer
  for (const Tensor& activity : window.activity) {
    pairs.push_back(activity.sum());
    silent.push_back(activity.eq(0).sum());
  }
  line_->sums = Readback(torch::cat({window.figures, torch::stack(pairs).to(torch::kFloat64),
                                     torch::stack(silent).to(torch::kFloat64)}));
  Json paths = Json::array();
  for (const FfnPath path : paths_) paths.push_back(name_of(path));
  line_->json = {{"step", state_.step},
                 {"loss", nullptr},
                 {"l1", nullptr},
                 {"active", nullptr},
                 {"share", nullptr},
                 {"active_per_layer", Json::array()},
                 {"silent_per_layer", Json::array()},
                 {"revived_per_layer", window.revived},
                 {"ffn_per_layer", paths},
                 {"lambda", state_.controller.lambda},
                 {"lr", o.lr * cosine_schedule(progress_, o.warmup, o.lr_floor)},
                 {"gradient_norm", nullptr},
                 {"tokens", state_.step * o.batch * o.context * o.accumulate},
                 {"tokens_per_second", static_cast<double>(window.tokens) / window.seconds},
                 {"step_seconds", state_.step_seconds},
                 {"seconds", state_.seconds}};
  start_window();
  if (with_heldout) line_->json["heldout_loss"] = evaluate_heldout(o.eval_tokens).loss;
}

void Trainer::start_window() {
  const ModelConfig& config = model_.config();
  const auto on_device = torch::TensorOptions(device_);
  state_.window = MetricsWindow();
  state_.window.figures = torch::zeros({kFigures}, on_device.dtype(torch::kFloat64));
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    state_.window.activity.push_back(
        torch::zeros({config.intermediate_size[layer]}, on_device.dtype(torch::kInt64)));
    state_.window.revived.push_back(0);
  }
}

void Trainer::write_line() {
  if (!line_) return;
  const std::vector<double> sums = line_->sums.values();
  const double steps = static_cast<double>(line_->steps);
  Json& json = line_->json;
  json["loss"] = sums[kLoss] / steps;
  json["l1"] = sums[kL1] / steps;
  json["active"] = sums[kActive] / steps;
  json["share"] = sums[kActive] / steps / model_.config().intermediate_size.mean();
  json["gradient_norm"] = sums[kGradientNorm] / steps;
  const size_t layers = (sums.size() - kFigures) / 2;
  for (size_t layer = 0; layer < layers; ++layer) {
    const double pairs = sums[kFigures + layer];
    json["active_per_layer"].push_back(pairs / static_cast<double>(line_->tokens));
    json["silent_per_layer"].push_back(static_cast<int64_t>(sums[kFigures + layers + layer]));
  }
  metrics_.write(json);
  line_.reset();
}

void Trainer::save() {
  wait();
  write_line();
  metrics_.flush_to_disk();
  state_.choosers = model_.choosers();
  state_.figures = figures_.defined() ? figures_.values() : std::vector<double>();
  save_checkpoint(folder_, state_, model_, optimizer_, revival_);
}

std::string Trainer::progress_text() const {
  char text[128];
  if (landed_.empty()) {
    std::snprintf(text, sizeof text, "step %lld", static_cast<long long>(state_.step));
    return text;
  }
  const double share = 100 * state_.controller.active / model_.config().intermediate_size.mean();
  std::snprintf(text, sizeof text, "step %lld, loss %.3f, active %.1f (%.1f%%), %.0f tokens/s",
                static_cast<long long>(state_.step), landed_[kLoss], state_.controller.active,
                share, static_cast<double>(state_.window.tokens) / state_.window.seconds);
  return text;
}

Json Trainer::run() {
  const TrainOptions& o = state_.options;
  {
    const SignalWatch signals;
    Progress bar("train", progress_);
    int64_t saved_step = state_.step;
    while (!finished()) {
      step();
      const bool last = finished();
      const std::string text = progress_text();
      const bool heldout = state_.step % o.eval_every == 0 || last;
      if (heldout || state_.step % o.log_every == 0) log(heldout);
      if (state_.step % o.checkpoint_every == 0 || last) {
        save();
        saved_step = state_.step;
      }
      if (last) {
        bar.finish(text);
      } else {
        bar.update(std::max(progress_, o.max_seconds > 0 ? state_.seconds / o.max_seconds : 0),
                   text);
      }
      if (signals.caught() && !last) {
        if (saved_step != state_.step) save();
        throw Error("interrupted after step " + std::to_string(state_.step) +
                    ", all of it saved; go on with: twell train --resume --out " +
                    folder_.string());
      }
    }
  }
  Json result = summary();
  model_.save(folder_, torch::kBFloat16);
  write_file(folder_ / "summary.json", result.dump(2) + "\n");
  return result;
}

Json Trainer::summary() {
  const TrainOptions& o = state_.options;
  const Evaluation heldout = evaluate_heldout(kFinalEvaluation * o.eval_tokens);
  const LayerWidths& neurons = model_.config().intermediate_size;
  Json silent = Json::array(), active = Json::array();
  for (const LayerActivity& layer : heldout.layers) {
    active.push_back(layer.active);
    silent.push_back(layer.silent);
  }
  return {{"model", folder_.string()},
          {"parameters", model_.parameter_count()},
          {"steps", state_.step},
          {"tokens", state_.step * o.batch * o.context * o.accumulate},
          {"epochs", sampler_.epoch(state_.step * o.accumulate)},
          {"train_tokens", corpus_.train.size()},
          {"heldout_tokens", heldout.tokens},
          {"heldout_loss", heldout.loss},
          {"unigram_loss", unigram_loss(corpus_.train, corpus_.heldout, heldout.tokens,
                                        model_.config().vocab_size)},
          {"loss_unit", "nats per token"},
          {"heldout_perplexity", heldout.perplexity()},
          {"neurons", neurons},
          {"active", heldout.active()},
          {"active_share", heldout.active() / neurons.mean()},
          {"target_active", state_.controller.target},
          {"active_per_layer", active},
          {"silent_per_layer", silent},
          {"revived", state_.revived},
          {"lambda", state_.controller.lambda},
          {"train_seconds", seconds()}};
}

}  // namespace

Json train(const TrainRun& run) { return Trainer(run).run(); }

}  // namespace twell::app
