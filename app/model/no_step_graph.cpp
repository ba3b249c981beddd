#include "app/error.h"
#include "app/model/step_graph.h"

namespace twell::app {

struct StepGraph::Graph {};

StepGraph::StepGraph(const std::function<void()>&) {
  throw Error("CUDA graphs: twell was built without PyTorch's CUDA libraries or headers");
}

StepGraph::~StepGraph() = default;

void StepGraph::replay() {}

}  // namespace twell::app
