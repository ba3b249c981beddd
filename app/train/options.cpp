#include "app/train/options.h"

#include <charconv>
#include <cmath>
#include <sstream>

#include "app/error.h"
#include "app/model/ffn.h"

namespace twell::app {
namespace {

template <class T>
void check(const char* name, T value, T least, T most) {
  if (value >= least && value <= most) return;  // a NaN is refused
  const auto text = [](T number) { return nlohmann::json(number).dump(); };
  throw Error(std::string(name) + " is " + text(value) + "; permitted: " + text(least) + " to " +
              text(most));
}

}  // namespace

double parse_target_active(const std::string& text, double neurons) {
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  const bool share = stop + 1 == end && *stop == '%';
  if (share) value *= neurons / 100;
  if (error != std::errc() || (stop != end && !share) || !std::isfinite(value) || value < 0 ||
      value > neurons) {
    std::ostringstream most;
    most << neurons;
    throw Error("--target-active is '" + text + "'; permitted: 0 to " + most.str() +
                " neurons, or a share such as 4%");
  }
  return value;
}

void validate(const TrainOptions& o) {
  constexpr int64_t kMost = int64_t{1} << 40;
  check<double>("--heldout", o.heldout, 1e-4, 0.5);
  check<int64_t>("--layers", o.layers, 1, 1000);
  check<int64_t>("--hidden", o.hidden, 8, 65536);
  check<int64_t>("--neurons", o.neurons, 8, 65536);
  check<int64_t>("--heads", o.heads, 1, o.hidden);
  check<int64_t>("--kv-heads", o.kv_heads, 1, o.heads);
  check<int64_t>("--context", o.context, 1, 1 << 20);
  check<int64_t>("--steps", o.steps, 0, kMost);
  check<double>("--max-seconds", o.max_seconds, 0, 1e9);
  check<int64_t>("--batch", o.batch, 1, 1 << 20);
  check<int64_t>("--accumulate", o.accumulate, 1, 1 << 20);
  check<double>("--lr", o.lr, 0, 10);
  check<double>("--lr-floor", o.lr_floor, 0, 1);
  check<double>("--warmup", o.warmup, 1e-6, 0.5);
  check<double>("--weight-decay", o.weight_decay, 0, 10);
  check<double>("--clip", o.clip, 0, 1e9);
  check<double>("--lambda", o.lambda, 0, 1e3);
  check<double>("--arrival", o.arrival, o.warmup + 1e-6, 1);
  check<int64_t>("--revive-after", o.revive_after, 0, int64_t{1} << 30);
  check<int64_t>("--log-every", o.log_every, 1, kMost);
  check<int64_t>("--eval-every", o.eval_every, 1, kMost);
  check<int64_t>("--eval-tokens", o.eval_tokens, 1, kMost);
  check<int64_t>("--checkpoint-every", o.checkpoint_every, 1, kMost);
  if (o.steps == 0 && o.max_seconds == 0) throw Error("give --steps, --max-seconds or both");
  if (o.hidden % 8 != 0 || o.neurons % 8 != 0) {
    throw Error("--hidden and --neurons must be multiples of 8, and are " +
                std::to_string(o.hidden) + " and " + std::to_string(o.neurons));
  }
  if (o.hidden % (2 * o.heads) != 0 || o.heads % o.kv_heads != 0) {
    throw Error("--hidden " + std::to_string(o.hidden) + " must be an even multiple of --heads " +
                std::to_string(o.heads) + ", and that a multiple of --kv-heads " +
                std::to_string(o.kv_heads));
  }
  parse_target_active(o.target_active, static_cast<double>(o.neurons));
  parse_ffn_mode(o.ffn);
}

}  // namespace twell::app
