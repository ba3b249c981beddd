#include "app/model/step_graph.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace twell::app {

struct StepGraph::Graph {
  at::cuda::CUDAGraph captured;
};

StepGraph::StepGraph(const std::function<void()>& step) : graph_(std::make_unique<Graph>()) {
  const c10::cuda::CUDAStream outer = c10::cuda::getCurrentCUDAStream();
  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();  // the default can't capture
  outer.synchronize();
  {
    // CUDAStreamGuard would draw the CUDA runtime in, which is not linked without nvcc.
    const c10::StreamGuard guard(stream.unwrap());
    step();  // libraries set themselves up on their first call, which can't be captured
    stream.synchronize();
    graph_->captured.capture_begin();
    step();
    graph_->captured.capture_end();
  }
  stream.synchronize();
}

StepGraph::~StepGraph() = default;

void StepGraph::replay() { graph_->captured.replay(); }

}  // namespace twell::app
