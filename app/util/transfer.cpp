#include "app/util/transfer.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace twell::app {

torch::Tensor upload(const torch::Tensor& values, const torch::Device& device) {
  if (device.is_cpu()) return values;
  return values.pin_memory().to(device, /*non_blocking=*/true);  // else the copy waits for its turn
}

Readback::Readback(const torch::Tensor& values) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor wide = values.to(torch::kFloat64);
  if (wide.is_cpu()) {
    host_ = wide.clone();
    return;
  }
  host_ = torch::empty(wide.sizes(), torch::TensorOptions(torch::kFloat64).pinned_memory(true));
  host_.copy_(wide, /*non_blocking=*/true);
  const c10::impl::VirtualGuardImpl guard(wide.device().type());
  done_ = std::make_shared<c10::Event>(wide.device().type());
  done_->record(guard.getStream(wide.device()));
}

Readback::Readback(const std::vector<double>& values)
    : host_(torch::tensor(values, torch::kFloat64)) {}

bool Readback::ready() const { return !done_ || done_->query(); }

std::vector<double> Readback::values() const {
  if (done_) done_->synchronize();
  const auto* first = host_.const_data_ptr<double>();
  return {first, first + host_.numel()};
}

}  // namespace twell::app
