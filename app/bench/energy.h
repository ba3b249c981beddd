#pragma once

#include <torch/torch.h>

#include <memory>
#include <string>

namespace twell::app {

// The energy that a GPU has used, by NVML's counter. libnvidia-ml is looked for at run time: where
// it, the device or the counter is missing, reason() says so.
class EnergyMeter {
 public:
  explicit EnergyMeter(const torch::Device& device);
  ~EnergyMeter();
  EnergyMeter(const EnergyMeter&) = delete;
  EnergyMeter& operator=(const EnergyMeter&) = delete;

  bool works() const { return reason_.empty(); }
  const std::string& reason() const { return reason_; }
  // Joules since the driver was loaded; the counter moves some times per second, so measure for
  // seconds. Error if the reading fails. Only if works().
  double joules() const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
  std::string reason_;
};

}  // namespace twell::app
