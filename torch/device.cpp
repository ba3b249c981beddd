#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

// Only in PyTorch's CUDA builds, hence weak: the same binary loads into the CPU builds.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

namespace twell::ops {

Device describe(const torch::stable::Device& device) {
  if (device.is_cpu()) {
    // What the processor offers never changes; asking for it traps to the hypervisor.
    static const Device processor = cpu_device(1);
    Device described = processor;
    described.threads = static_cast<int>(torch::stable::get_num_threads());
    return described;
  }
  return require(cuda_device(
      device.has_index() ? device.index() : torch::stable::accelerator::getCurrentDeviceIndex()));
}

Execution::Execution(const torch::stable::Tensor& tensor) : torch_device_(tensor.device()) {
  device_ = describe(torch_device_);
  if (!torch_device_.is_cuda()) return;
  guard_.emplace(torch_device_.index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(torch_device_.index(), &stream_));
}

torch::stable::Tensor Execution::empty(std::initializer_list<std::int64_t> shape,
                                       torch::headeronly::ScalarType dtype) const {
  return torch::stable::empty({shape.begin(), shape.size()}, dtype, std::nullopt, torch_device_);
}

torch::stable::Tensor Execution::bytes(std::size_t count) const {
  return empty({static_cast<std::int64_t>(count)}, torch::headeronly::ScalarType::Byte);
}

}  // namespace twell::ops
