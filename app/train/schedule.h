#pragma once
// What a training run does at each point of its way. `progress` in [0, 1] is the share of the run
// that is done: of its steps, or of its seconds if no number of steps was given.

namespace twell::app {

// Linear warm-up to 1 over the first `warmup` of the run, then half a cosine down to `floor`.
// Multiplies the peak learning rate.
double cosine_schedule(double progress, double warmup, double floor);

// Steers λ, the coefficient of the L1 term, so that the mean number of active neurons per token
// comes to a target.
//
// - Until `warmup` of the run, λ rises linearly from 0 to `initial`.
// - Then the set point falls from the number active at that moment to `target`, geometrically, and
//   reaches it at `arrival` of the run; from there on it is `target`.
// - In each step, log λ moves by proportional · (e - e') + integral · e, at most kMaxChange either
//   way, where e = log(active / set point) for a running mean of the active neurons, and e' is the
//   e of the step before (a PI controller in velocity form). The set point aims kMargin below the
//   target, so that noise and held-out text stay under it.
//
// Plain state, stored in checkpoints.
struct L1Controller {
  static constexpr double kMemory = 0.8;     // weight of the past in the running mean
  static constexpr double kMaxChange = 0.1;  // of log λ per step
  static constexpr double kMargin = 0.05;
  static constexpr double kProportional = 1.0;
  static constexpr double kIntegral = 0.05;

  double target = 0;  // active neurons per token; 0: λ stays at `initial`, unsteered
  double initial = 1e-4;
  double warmup = 0.05;
  double arrival = 0.5;

  double lambda = 0;      // to be used in the next step
  double active = -1;     // running mean; < 0: none yet
  double departure = -1;  // `active` at the end of the warm-up; < 0: not there yet
  double error = 0;       // e of the last step

  // The set point at `progress`, once the warm-up is over.
  double set_point(double progress) const;
  // To be called after each step with its mean number of active neurons, and the progress of the
  // run at the next step: sets lambda.
  void update(double measured, double progress);
};

}  // namespace twell::app
