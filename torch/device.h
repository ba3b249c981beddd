#pragma once
// Where an operator runs: the core's view of a tensor's device, and PyTorch's current stream.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <optional>

#include "twell/device.h"

namespace twell::ops {

// The core's description of `device`: the CPU with PyTorch's number of threads, or a CUDA device
// (the current one if `device` has no index). Throws what the core refuses.
Device describe(const torch::stable::Device& device);

// While it lives, `tensor`'s device is the current one; on the CPU it does nothing.
class Execution {
 public:
  explicit Execution(const torch::stable::Tensor& tensor);

  const Device& device() const { return device_; }
  void* stream() const { return stream_; }  // cudaStream_t; null on the CPU

  torch::stable::Tensor empty(std::initializer_list<std::int64_t> shape,
                              torch::headeronly::ScalarType dtype) const;
  torch::stable::Tensor bytes(std::size_t count) const;  // 64-byte aligned, as PyTorch allocates

 private:
  torch::stable::Device torch_device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Device device_;
  void* stream_ = nullptr;
};

}  // namespace twell::ops
