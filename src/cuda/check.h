#pragma once
// Launching and checking, as values.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "twell/device.h"
#include "twell/status.h"

namespace twell::cuda {

inline Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return {StatusCode::kDevice, std::string(what) + ": " + cudaGetErrorString(error)};
}

// What TMA and 16-byte copies need.
inline Status require_aligned(const void* pointer, const std::string& name) {
  const auto rest = reinterpret_cast<std::uintptr_t>(pointer) % 16;
  if (rest == 0) return {};
  return {StatusCode::kInvalidArgument, name + " is at an address of remainder " +
                                            std::to_string(rest) +
                                            " modulo 16; permitted: 16-byte aligned memory"};
}

inline Status require_current(const Device& device, const std::string& function) {
  int current = 0;
  if (Status status = check(cudaGetDevice(&current), "cudaGetDevice"); !status.ok()) return status;
  if (current == device.ordinal) return {};
  return {StatusCode::kInvalidArgument,
          function + ": device.ordinal is " + std::to_string(device.ordinal) +
              "; permitted: the current CUDA device, " + std::to_string(current)};
}

// Launches `kernel` on a one-dimensional grid; a grid of 0 does nothing.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int grid, int threads, std::size_t shared_bytes,
              cudaStream_t stream, const Arguments&... arguments) {
  if (grid == 0) return {};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return check(error, "reserving shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "kernel launch");
}

}  // namespace twell::cuda
