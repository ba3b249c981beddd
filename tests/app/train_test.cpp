#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "app/error.h"
#include "app/train/checkpoint.h"
#include "app/train/evaluate.h"
#include "app/train/loss.h"
#include "app/train/metrics.h"
#include "app/train/optimizer.h"
#include "app/train/options.h"
#include "app/train/schedule.h"
#include "app/train/trainer.h"
#include "tests/app/call_counter.h"

#ifdef TWELL_LIBTORCH_CUDA
#include <c10/cuda/CUDAFunctions.h>
#endif

namespace twell::app {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

// A folder that goes away with the test.
class Scratch {
 public:
  Scratch() {
    std::string name = (fs::temp_directory_path() / "twell-train-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~Scratch() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Schedule, WarmsUpAndFalls) {
  EXPECT_EQ(cosine_schedule(0, 0.1, 0.2), 0);
  EXPECT_DOUBLE_EQ(cosine_schedule(0.05, 0.1, 0.2), 0.5);
  EXPECT_DOUBLE_EQ(cosine_schedule(0.1, 0.1, 0.2), 1);
  EXPECT_DOUBLE_EQ(cosine_schedule(0.55, 0.1, 0.2), 0.6);
  EXPECT_DOUBLE_EQ(cosine_schedule(1, 0.1, 0.2), 0.2);
}

TEST(Options, TargetIsANumberOrAShare) {
  EXPECT_DOUBLE_EQ(parse_target_active("52", 1536), 52);
  EXPECT_DOUBLE_EQ(parse_target_active("4%", 1500), 60);
  EXPECT_DOUBLE_EQ(parse_target_active("0", 1536), 0);
  EXPECT_DOUBLE_EQ(parse_target_active("50%", 68.5), 34.25);
  EXPECT_THROW(parse_target_active("69", 68.5), Error);
  for (const char* bad : {"", "x", "-1", "4 %", "101%", "1537", "nan", "inf", "5%%"}) {
    EXPECT_THROW(parse_target_active(bad, 1536), Error) << bad;
  }
}

TEST(Options, NameTheirOwnFaults) {
  TrainOptions good;
  good.steps = 1;
  EXPECT_NO_THROW(validate(good));
  const auto refused = [&](auto change, const std::string& name) {
    TrainOptions bad = good;
    change(bad);
    try {
      validate(bad);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  };
  refused([](TrainOptions& o) { o.steps = 0; }, "--max-seconds");
  refused([](TrainOptions& o) { o.lr = std::nan(""); }, "--lr");
  refused([](TrainOptions& o) { o.neurons = 100; }, "--neurons");
  refused([](TrainOptions& o) { o.heads = 3, o.kv_heads = 1; }, "--heads");
  refused([](TrainOptions& o) { o.batch = 0; }, "--batch");
}

// A model whose active neurons answer to λ late, in proportion to a power of it, and with noise.
class Plant {
 public:
  explicit Plant(double sensitivity) : sensitivity_(sensitivity) {}
  double step(double lambda) {
    const double settled = 768 / (1 + std::pow(lambda / 1e-4, sensitivity_));
    active_ += (settled - active_) / 30;
    return active_ * (1 + 0.05 * noise_(random_));
  }

 private:
  double sensitivity_;
  double active_ = 768;
  std::mt19937 random_{1};
  std::normal_distribution<double> noise_;
};

TEST(L1Controller, ComesToItsTarget) {
  for (const double sensitivity : {0.7, 1.0, 2.0}) {
    for (const int steps : {300, 1000, 5000}) {
      L1Controller controller;
      controller.target = 60;
      Plant plant(sensitivity);
      double last = 0;
      for (int step = 0; step < steps; ++step) {
        const double active = plant.step(controller.lambda);
        controller.update(active, double(step + 1) / steps);
        if (step < steps * controller.warmup - 1) {
          EXPECT_LE(controller.lambda, controller.initial);
        }
        if (step >= steps * 9 / 10) last += active / (steps - steps * 9 / 10);
      }
      EXPECT_LE(last, 60 * 1.02) << sensitivity << " " << steps;
      EXPECT_GE(last, 60 * 0.8) << sensitivity << " " << steps;
    }
  }
}

TEST(L1Controller, KeepsLambdaIfNotSteered) {
  L1Controller controller;
  controller.target = 0;
  for (int step = 1; step <= 100; ++step) controller.update(500, step / 100.0);
  EXPECT_DOUBLE_EQ(controller.lambda, controller.initial);
}

TEST(LinearCrossEntropy, AgreesWithPyTorch) {
  for (const int64_t tokens : {1, 511, 512, 1100}) {
    torch::manual_seed(tokens);
    const auto leaf = [](std::vector<int64_t> sizes) {
      return torch::randn(sizes, torch::kFloat64).requires_grad_(true);
    };
    const Tensor hidden = leaf({tokens, 24}), head = leaf({56, 24});
    const Tensor targets = torch::randint(56, {tokens}, torch::kInt64);
    (3 * linear_cross_entropy(hidden, head, targets)).backward();
    const Tensor hidden2 = hidden.detach().clone().requires_grad_(true);
    const Tensor head2 = head.detach().clone().requires_grad_(true);
    const Tensor want = torch::cross_entropy_loss(torch::mm(hidden2, head2.t()), targets);
    (3 * want).backward();
    EXPECT_NEAR(linear_cross_entropy(hidden, head, targets).item<double>(), want.item<double>(),
                1e-12);
    EXPECT_TRUE(torch::allclose(hidden.grad(), hidden2.grad(), 1e-9, 1e-12));
    EXPECT_TRUE(torch::allclose(head.grad(), head2.grad(), 1e-9, 1e-12));
  }
}

TEST(AdamW, AgreesWithPyTorch) {
  std::map<std::string, Tensor> ours = {{"a", torch::randn({5, 3})}, {"norm", torch::randn({7})}};
  std::vector<Tensor> theirs;
  for (auto& [name, value] : ours) {
    theirs.push_back(value.clone().requires_grad_(true));
    value.requires_grad_(true);
  }
  AdamW optimizer(ours, {.weight_decay = 0.3, .clip = 0.5});
  using Options = torch::optim::AdamWOptions;
  torch::optim::AdamW reference(
      {torch::optim::OptimizerParamGroup(
           {theirs[0]}, std::make_unique<Options>(Options(0.01).weight_decay(0.3))),
       torch::optim::OptimizerParamGroup({theirs[1]},
                                         std::make_unique<Options>(Options(0.01).weight_decay(0)))},
      Options(0.01).betas({0.9, 0.95}));
  for (auto& group : reference.param_groups()) {
    static_cast<Options&>(group.options()).betas({0.9, 0.95});
  }
  for (int step = 0; step < 5; ++step) {
    int i = 0;
    for (auto& [name, value] : ours) {
      value.mutable_grad() = torch::randn_like(value) * (step + 1);
      theirs[i++].mutable_grad() = value.grad().clone();
    }
    const double norm = torch::nn::utils::clip_grad_norm_(theirs, 0.5);
    EXPECT_NEAR(optimizer.step(0.01).item<double>(), norm, 1e-4 * norm);
    reference.step();
    i = 0;
    for (const auto& [name, value] : ours) {
      EXPECT_TRUE(torch::allclose(value, theirs[i++], 1e-4, 1e-6)) << name << " " << step;
      EXPECT_FALSE(value.grad().defined());
    }
  }
  ours["a"].mutable_grad() = torch::full_like(ours["a"], INFINITY);
  ours["norm"].mutable_grad() = torch::zeros_like(ours["norm"]);
  const Tensor before = ours["a"].detach().clone();
  EXPECT_FALSE(std::isfinite(optimizer.step(0.01).item<double>()));
  EXPECT_TRUE(ours["a"].equal(before));
}

TEST(Metrics, DropsWhatFollowsTheCheckpoint) {
  const Scratch folder;
  const fs::path path = folder / "metrics.jsonl";
  {
    Metrics metrics(path, -1);
    for (int step = 1; step <= 4; ++step) metrics.write({{"step", step}});
  }
  std::ofstream(path, std::ios::app) << "{\"step\": 5, \"lo";  // killed while writing
  { Metrics(path, 3).write({{"step", 4}, {"again", true}}); }
  EXPECT_EQ(contents(path),
            "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4,\"again\":true}\n");
  { Metrics metrics(path, 9); }
  EXPECT_EQ(std::ranges::count(contents(path), '\n'), 4);
  { Metrics metrics(path, -1); }
  EXPECT_EQ(contents(path), "");
}

TEST(UnigramLoss, IsTheCrossEntropyOfTheFrequencies) {
  TokenStream train(4), heldout(4);
  train.append({0, 0, 0, 1});
  heldout.append({0, 1, 3});
  const double want = -(std::log(4 / 8.0) + std::log(2 / 8.0) + std::log(1 / 8.0)) / 3;
  EXPECT_NEAR(unigram_loss(train, heldout, 3, 4), want, 1e-12);
  EXPECT_NEAR(unigram_loss(train, heldout, 1, 4), -std::log(4 / 8.0), 1e-12);
}

TEST(Evaluate, ScoresEveryTokenOnce) {
  ModelConfig config;
  config.vocab_size = 40;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 1;
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.hidden_act = "relu";
  config.initializer_range = 0.5;
  Llama model = Llama::create(config, 1, torch::kFloat32, torch::kCPU);
  TokenStream stream(40);
  std::vector<int64_t> ids;
  for (int i = 0; i < 50; ++i) ids.push_back((i * i + 3 * i) % 40);
  stream.append(ids);
  // The oracle: one window after the other.
  const torch::NoGradGuard no_grad;
  double sum = 0;
  for (int64_t first = 0; first < 49; first += 8) {
    const int64_t length = std::min<int64_t>(8, 49 - first);
    const Tensor window =
        torch::tensor(std::vector<int64_t>(ids.begin() + first, ids.begin() + first + length + 1));
    const Tensor logits = model.logits(model.forward(window.narrow(0, 0, length).unsqueeze(0)))[0];
    sum += torch::cross_entropy_loss(logits, window.narrow(0, 1, length)).item<double>() *
           double(length);
  }
  for (const int64_t batch : {1, 4, 100}) {
    EvaluationOptions options;
    options.context = 8;
    options.batch = batch;
    const Evaluation result = evaluate(model, stream, options);
    EXPECT_EQ(result.tokens, 49);
    EXPECT_NEAR(result.loss, sum / 49, 1e-5);
    ASSERT_EQ(result.layers.size(), 1u);
    options.max_tokens = 10;
    EXPECT_EQ(evaluate(model, stream, options).tokens, 10);
  }
  EXPECT_THROW(evaluate(model, TokenStream(40), {}), Error);
}

// A byte-level tokenizer without merges: 256 bytes and an end of text.
std::string byte_tokenizer() {
  nlohmann::json vocabulary;
  int next = 0;
  const auto add = [&](int code_point) {
    std::string utf8;
    if (code_point < 0x80) {
      utf8 = static_cast<char>(code_point);
    } else {
      utf8 = {static_cast<char>(0xc0 | code_point >> 6),
              static_cast<char>(0x80 | (code_point & 0x3f))};
    }
    vocabulary[utf8] = next++;
  };
  int moved = 256;  // GPT-2's alphabet: bytes that do not print move to 256 and above
  for (int byte = 0; byte < 256; ++byte) {
    const bool prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    add(prints ? byte : moved++);
  }
  vocabulary["<|endoftext|>"] = next;
  const nlohmann::json tokenizer = {{"version", "1.0"},
                                    {"truncation", nullptr},
                                    {"padding", nullptr},
                                    {"added_tokens",
                                     {{{"id", next},
                                       {"content", "<|endoftext|>"},
                                       {"single_word", false},
                                       {"lstrip", false},
                                       {"rstrip", false},
                                       {"normalized", false},
                                       {"special", true}}}},
                                    {"normalizer", nullptr},
                                    {"pre_tokenizer",
                                     {{"type", "ByteLevel"},
                                      {"add_prefix_space", false},
                                      {"trim_offsets", true},
                                      {"use_regex", true}}},
                                    {"post_processor", nullptr},
                                    {"decoder",
                                     {{"type", "ByteLevel"},
                                      {"add_prefix_space", true},
                                      {"trim_offsets", true},
                                      {"use_regex", true}}},
                                    {"model",
                                     {{"type", "BPE"},
                                      {"dropout", nullptr},
                                      {"unk_token", nullptr},
                                      {"continuing_subword_prefix", nullptr},
                                      {"end_of_word_suffix", nullptr},
                                      {"fuse_unk", false},
                                      {"byte_fallback", false},
                                      {"vocab", vocabulary},
                                      {"merges", nlohmann::json::array()}}}};
  return tokenizer.dump();
}

class Training : public testing::Test {
 protected:
  Training() {
    std::ofstream(folder_ / "tokenizer.json") << byte_tokenizer();
    for (int file = 0; file < 40; ++file) {
      fs::create_directories(folder_ / "text");
      std::ofstream text(folder_ / "text" / std::to_string(file));
      for (int i = 0; i < 60; ++i) text << "int f" << (i * file) % 97 << "(int x);\n";
    }
  }

  TrainRun run(const std::string& name) const {
    TrainRun run;
    run.folder = folder_ / name;
    run.options.data = {(folder_ / "text").string()};
    run.options.tokenizer = (folder_ / "tokenizer.json").string();
    run.options.heldout = 0.2;
    run.options.layers = 2;
    run.options.hidden = 32;
    run.options.neurons = 64;
    run.options.heads = 2;
    run.options.kv_heads = 1;
    run.options.context = 32;
    run.options.batch = 4;
    run.options.steps = 40;
    run.options.eval_every = 15;
    run.options.eval_tokens = 256;
    run.options.log_every = 3;
    run.options.checkpoint_every = 7;
    return run;
  }

  void resumes_to_the_same_bits(const TrainRun& like);

  const Scratch folder_;
};

TEST_F(Training, LearnsAndWritesAModel) {
  TrainRun once = run("a");
  const auto summary = train(once);
  EXPECT_LT(summary["heldout_loss"].get<double>(), summary["unigram_loss"].get<double>() + 0.5);
  EXPECT_EQ(summary["steps"], 40);
  for (const char* name : {"model.safetensors", "config.json", "tokenizer.json",
                           "tokenizer_config.json", "metrics.jsonl", "summary.json"}) {
    EXPECT_TRUE(fs::exists(once.folder / name)) << name;
  }
  EXPECT_THROW(train(once), Error);  // the folder is taken

  // What is stored computes what was trained: same loss from the directory.
  const Llama loaded = Llama::load(once.folder, torch::kFloat32, torch::kBFloat16, torch::kCPU);
  EXPECT_TRUE(loaded.is_relu());
  EXPECT_EQ(loaded.parameter_count(), summary["parameters"].get<int64_t>());

  // And it can be the start of another run.
  TrainRun more = run("b");
  more.options.init = once.folder.string();
  more.options.steps = 2;
  EXPECT_LT(train(more)["heldout_loss"].get<double>(), summary["heldout_loss"].get<double>() + 1);
}

void Training::resumes_to_the_same_bits(const TrainRun& like) {
  for (const char* ffn : {"dense", "twell", "auto"}) {
    const auto named = [&](const std::string& name) {
      TrainRun r = like;
      r.folder = folder_ / (name + ffn);
      r.options.ffn = ffn;
      r.options.accumulate = 2;
      return r;
    };
    const TrainRun whole = named("whole"), again = named("again");
    train(whole);
    EXPECT_FALSE(at::globalContext().deterministicAlgorithms());  // as before
    train(again);
    const std::string want = contents(whole.folder / "model.safetensors");
    EXPECT_TRUE(contents(again.folder / "model.safetensors") == want) << ffn;

    // Interrupted as soon as it has written metrics, then resumed.
    TrainRun broken = named("broken");
    std::atomic<bool> done = false;
    std::thread interrupter([&] {
      while (!done) {
        if (!contents(broken.folder / "metrics.jsonl").empty()) {
          kill(getpid(), SIGTERM);
          return;
        }
        usleep(1000);
      }
    });
    try {
      train(broken);
      ADD_FAILURE() << "was not interrupted";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("--resume"), std::string::npos) << error.what();
    }
    done = true;
    interrupter.join();
    const int64_t step = read_checkpoint_state(broken.folder).step;
    EXPECT_GE(step, 3);
    EXPECT_LT(step, 40);
    broken.resume = true;
    broken.options = {};
    train(broken);
    EXPECT_TRUE(contents(broken.folder / "model.safetensors") == want) << ffn;

    // Every line of metrics is there once, with the same losses.
    std::istringstream a(contents(whole.folder / "metrics.jsonl"));
    std::istringstream b(contents(broken.folder / "metrics.jsonl"));
    for (std::string x, y; std::getline(a, x);) {
      ASSERT_TRUE(std::getline(b, y));
      EXPECT_EQ(nlohmann::json::parse(x)["step"], nlohmann::json::parse(y)["step"]);
      EXPECT_EQ(nlohmann::json::parse(x)["lambda"], nlohmann::json::parse(y)["lambda"]);
    }
  }
}

TEST_F(Training, IsDeterministicAndResumesToTheSameBits) { resumes_to_the_same_bits(run("")); }

TEST_F(Training, IsDeterministicAndResumesToTheSameBitsOnTheGpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
  // Large enough that attention's gradients differ from run to run where they may.
  TrainRun large = run("");
  large.device = torch::kCUDA;
  large.options.context = 1024;
  large.options.batch = 8;
  large.options.hidden = 256;
  large.options.heads = large.options.kv_heads = 4;
  resumes_to_the_same_bits(large);
}

// What would stop the host until a GPU has caught up, counted on the CPU: scalars that are read,
// and sizes that depend on values. The fused optimizer's kernel for CPUs reads some of its own.
TEST_F(Training, NoStepWaitsForTheDevice) {
  for (const char* ffn : {"dense", "twell", "auto"}) {
    const auto waits = [&](int64_t steps) {
      TrainRun r = run("waits-" + std::to_string(steps) + ffn);
      r.options.ffn = ffn;
      r.options.steps = steps;
      r.options.eval_every = r.options.checkpoint_every = 1000;
      r.options.log_every = 5;
      r.options.checkpoint_activations = true;
      const CallCounter counter(
          {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"},
          "aten::_fused_adamw_");
      train(r);
      return counter.count();
    };
    EXPECT_EQ(waits(40), waits(20)) << ffn;
  }
}

#ifdef TWELL_LIBTORCH_CUDA
// PyTorch itself warns of each call that makes the host wait for the GPU.
class WaitWarnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override {
    if (warning.msg().find("synchroniz") != std::string::npos) ++count;
  }
  std::atomic<int64_t> count = 0;
};

TEST_F(Training, NoStepWaitsForTheGpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
  for (const char* ffn : {"dense", "twell", "auto"}) {
    const auto waits = [&](int64_t steps) {
      TrainRun r = run("gpu-waits-" + std::to_string(steps) + ffn);
      r.device = torch::Device(torch::kCUDA);
      r.options.ffn = ffn;
      r.options.steps = steps;
      r.options.eval_every = r.options.checkpoint_every = 1000;
      r.options.log_every = 5;
      WaitWarnings warnings;
      const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
      const c10::WarningUtils::WarnAlways always;
      c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_WARN);
      train(r);
      c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
      EXPECT_GT(warnings.count, 0);  // of evaluating and saving
      return warnings.count.load();
    };
    EXPECT_EQ(waits(40), waits(20)) << ffn;
  }
}
#endif

TEST_F(Training, SteersByTheStepBefore) {
  TrainRun r = run("lag");
  r.options.steps = 8;
  r.options.log_every = 1;
  r.options.warmup = 0.25;
  r.options.target_active = "10";
  r.options.arrival = 0.5;
  train(r);
  // The oracle: the controller, fed with what the lines say was active, one step late.
  L1Controller controller;
  controller.target = 10;
  controller.initial = r.options.lambda;
  controller.warmup = 0.25;
  controller.arrival = 0.5;
  std::istringstream lines(contents(r.folder / "metrics.jsonl"));
  double before = -1;
  int64_t step = 0;
  for (std::string text; std::getline(lines, text);) {
    const auto line = nlohmann::json::parse(text);
    ASSERT_EQ(line["step"], ++step);
    if (before >= 0) controller.update(before, double(step) / 8);
    EXPECT_DOUBLE_EQ(line["lambda"].get<double>(), controller.lambda) << step;
    before = line["active"].get<double>();
    double mean = 0;
    for (const double active : line["active_per_layer"]) mean += active / 2;
    EXPECT_NEAR(before, mean, 1e-9) << step;
    EXPECT_GT(line["gradient_norm"].get<double>(), 0);
    EXPECT_LE(line["step_seconds"].get<double>(), line["seconds"].get<double>());
  }
  EXPECT_EQ(step, 8);
  EXPECT_GT(controller.lambda, r.options.lambda);
}

TEST_F(Training, EndsWhenItDiverges) {
  TrainRun broken = run("diverges");
  broken.options.steps = 2;
  train(broken);
  Llama model = Llama::load(broken.folder, torch::kFloat32, torch::kBFloat16, torch::kCPU);
  model.parameters().at("model.layers.1.mlp.up_proj.weight").fill_(INFINITY);
  model.save(broken.folder, torch::kFloat32);
  // Also where nothing but the end of the run looks at the step.
  for (const int64_t steps : {1, 40}) {
    TrainRun r = run("diverged" + std::to_string(steps));
    r.options.init = broken.folder.string();
    r.options.steps = steps;
    try {
      train(r);
      ADD_FAILURE() << "did not diverge";
    } catch (const Error& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("diverged: the gradient of step 1 "), std::string::npos) << text;
    }
    EXPECT_EQ(read_checkpoint_state(r.folder).step, 0);
    EXPECT_FALSE(fs::exists(r.folder / "model.safetensors"));
  }
}

TEST_F(Training, RefusesADamagedOrForeignCheckpoint) {
  TrainRun damaged = run("c");
  damaged.options.steps = 2;
  train(damaged);
  damaged.resume = true;
  EXPECT_NO_THROW(train(damaged));  // already at its end: writes the model again
  std::ofstream(folder_ / "text" / "new") << "more data\n";
  EXPECT_THROW(train(damaged), Error);
  fs::resize_file(checkpoint_path(damaged.folder), 1000);
  EXPECT_THROW(train(damaged), Error);
  damaged.folder = folder_ / "nowhere";
  EXPECT_THROW(train(damaged), Error);
}

}  // namespace
}  // namespace twell::app
