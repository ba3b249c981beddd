#include "app/bench/timer.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace twell::app {
namespace {

constexpr std::int64_t kFlushBytes = std::int64_t{256} << 20;  // more than any L2 cache holds

}  // namespace

Timer::Timer(const at::Device& device, bool flush) : device_(device) {
  if (!device.is_cpu() && flush) {
    flush_ = at::empty({kFlushBytes}, at::TensorOptions().dtype(at::kByte).device(device));
  }
}

double Timer::operator()(const std::function<void()>& run) const {
  if (device_.is_cpu()) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double, std::milli> spent =
        std::chrono::steady_clock::now() - start;
    return spent.count();
  }
  if (flush_.defined()) flush_.zero_();
  const c10::impl::VirtualGuardImpl guard(device_.type());
  c10::Event begin(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  c10::Event end(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  begin.record(guard.getStream(device_));
  run();
  end.record(guard.getStream(device_));
  end.synchronize();
  return begin.elapsedTime(end);
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

}  // namespace twell::app
