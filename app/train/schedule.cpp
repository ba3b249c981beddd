#include "app/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace twell::app {

double cosine_schedule(double progress, double warmup, double floor) {
  if (progress < warmup) return progress / warmup;
  const double along = std::clamp((progress - warmup) / (1 - warmup), 0.0, 1.0);
  return floor + (1 - floor) * 0.5 * (1 + std::cos(std::numbers::pi * along));
}

double L1Controller::set_point(double progress) const {
  const double goal = target * (1 - kMargin);
  const double along = std::clamp((progress - warmup) / (arrival - warmup), 0.0, 1.0);
  return std::exp((1 - along) * std::log(std::max(departure, goal)) + along * std::log(goal));
}

void L1Controller::update(double measured, double progress) {
  active = active < 0 ? measured : kMemory * active + (1 - kMemory) * measured;
  if (progress < warmup) {
    lambda = initial * progress / warmup;
    return;
  }
  if (target <= 0) {
    lambda = initial;
    return;
  }
  if (departure < 0) {
    departure = active;
    lambda = initial;
  }
  // At least a hundredth of a neuron: a model gone silent must not push λ to 0 in one step.
  const double now = std::log(std::max(active, 0.01) / set_point(progress));
  const double change = kProportional * (now - error) + kIntegral * now;
  lambda *= std::exp(std::clamp(change, -kMaxChange, kMaxChange));
  error = now;
}

}  // namespace twell::app
