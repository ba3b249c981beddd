#include "app/bench/kernel_times.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>

#include "app/error.h"

namespace twell::app {

std::vector<KernelTime> kernel_times(const std::function<void()>& run) {
  namespace impl = torch::profiler::impl;
  namespace profiler = torch::autograd::profiler;
  const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
  const std::set<impl::ActivityType> activities{impl::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  run();
  const std::unique_ptr<profiler::ProfilerResult> result = profiler::disableProfiler();

  std::map<std::string, KernelTime> by_name;
  for (const profiler::KinetoEvent& event : result->events()) {
    if (event.deviceType() != torch::kCUDA) continue;
    KernelTime& kernel = by_name[event.name()];
    kernel.name = event.name();
    ++kernel.calls;
    kernel.ms += static_cast<double>(event.durationNs()) * 1e-6;
  }
  if (by_name.empty()) throw Error("PyTorch's profiler saw no kernels: it needs CUPTI");
  std::vector<KernelTime> times;
  for (auto& [name, kernel] : by_name) times.push_back(std::move(kernel));
  std::sort(times.begin(), times.end(),
            [](const KernelTime& a, const KernelTime& b) { return a.ms > b.ms; });
  return times;
}

}  // namespace twell::app
