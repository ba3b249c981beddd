#pragma once
// Between the host and a device without either waiting for the other.

#include <torch/torch.h>

#include <memory>
#include <vector>

namespace c10 {
struct Event;
}

namespace twell::app {

// `values` of the host on `device`, for work that is queued there from now on; nobody waits.
torch::Tensor upload(const torch::Tensor& values, const torch::Device& device);

// A few numbers on their way from the device to the host. The copy is queued behind the work that
// makes them, into pinned memory, and nobody waits for it until values() is called; long
// afterwards that takes no time. Copies share the numbers.
class Readback {
 public:
  Readback() = default;
  explicit Readback(const torch::Tensor& values);  // one dimension, any dtype and device
  explicit Readback(const std::vector<double>& values);

  bool defined() const { return host_.defined(); }
  bool ready() const;  // whether values() would not wait
  // Waits for the copy. Only if defined().
  std::vector<double> values() const;

 private:
  torch::Tensor host_;                // float64
  std::shared_ptr<c10::Event> done_;  // null where nothing is under way
};

}  // namespace twell::app
