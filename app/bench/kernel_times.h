#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace twell::app {

// One kernel, copy or fill on a GPU, by the name that the driver gives it.
struct KernelTime {
  std::string name;
  std::int64_t calls = 0;
  double ms = 0;  // in all calls
};

// What the GPU did during run(), which waits for it, by PyTorch's profiler; most time first.
std::vector<KernelTime> kernel_times(const std::function<void()>& run);

}  // namespace twell::app
