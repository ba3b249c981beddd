#include "app/bench/peak_memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <fstream>
#include <string>

namespace twell::app {
namespace {

// Makes the present resident set the greatest one; false if the system does not allow that.
bool reset_peak() {
#ifdef __GLIBC__
  malloc_trim(0);  // what was freed but kept would count otherwise
#endif
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  return file.good();
}

std::optional<std::int64_t> resident_peak() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;  // in kB
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::int64_t> peak_bytes(const torch::Device& device,
                                       const std::function<void()>& run) {
  if (device.is_cpu()) {
    const bool known = reset_peak();
    run();
    return known ? resident_peak() : std::nullopt;
  }
  c10::DeviceAllocator* allocator = c10::getDeviceAllocator(device.type());
  const c10::DeviceIndex index = device.has_index() ? device.index() : c10::DeviceIndex{0};
  allocator->resetPeakStats(index);
  run();
  // The first statistic is the sum over small and large blocks.
  return allocator->getDeviceStats(index).allocated_bytes[0].peak;
}

}  // namespace twell::app
