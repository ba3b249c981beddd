#pragma once
// Launching and checking, as values.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "twell/status.h"

namespace twell::cuda {

inline Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return {StatusCode::kDevice, std::string(what) + ": " + cudaGetErrorString(error)};
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
