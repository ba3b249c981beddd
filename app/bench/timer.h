#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <vector>

namespace twell::app {

// Milliseconds of one call: by the device's own clock on a GPU, else by the wall clock.
class Timer {
 public:
  // With `flush`, a GPU's L2 cache is emptied before each call; it does nothing on the CPU.
  Timer(const at::Device& device, bool flush);
  double operator()(const std::function<void()>& run) const;

 private:
  at::Device device_;
  at::Tensor flush_;
};

// The value below which a share `q` in [0, 1] of `values` lies, one of them. They are not empty.
double quantile(std::vector<double> values, double q);

}  // namespace twell::app
