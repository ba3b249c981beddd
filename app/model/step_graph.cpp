#include "app/model/step_graph.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
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
    const c10::cuda::CUDAStreamGuard guard(stream);
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
