#pragma once
// The kernels of a step, captured once in a CUDA graph and replayed.

#include <functional>
#include <memory>

namespace twell::app {

class StepGraph {
 public:
  // Runs `step` once as it is, then once more to capture it. It must do the same work each time, on
  // the current CUDA device, with the same tensors, without waiting for the device. Throws Error if
  // twell was built without PyTorch's CUDA.
  explicit StepGraph(const std::function<void()>& step);
  ~StepGraph();

  // On the current stream; what the captured step wrote is written anew.
  void replay();

 private:
  struct Graph;
  std::unique_ptr<Graph> graph_;
};

}  // namespace twell::app
