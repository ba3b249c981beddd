#pragma once
// Launching and checking, as values.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
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

// Dynamic shared memory of a launch. The limit that it must be within belongs to the kernel, in all
// threads of the process: were it set to what each launch needs, another thread could lower it
// before this one launches. So all launches of a kernel set it to the same, `most`.
struct SharedBytes {
  std::size_t bytes;
  std::size_t most;  // that any launch of the kernel needs

  SharedBytes(std::size_t always) : bytes(always), most(always) {}
  SharedBytes(std::size_t now, std::size_t at_most) : bytes(now), most(at_most) {}
};

// Launches `kernel`; a grid of 0 does nothing. `early`: it may start before the previous kernel of
// the stream ends, and waits for it itself (ptx/grid.cuh).
template <class... Parameters, class... Arguments>
Status launch_kernel(bool early, void (*kernel)(Parameters...), dim3 grid, int threads,
                     SharedBytes shared, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return {};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared.most));
  if (error != cudaSuccess) return check(error, "reserving shared memory");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared.bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "kernel launch");
}

template <class Kernel, class... Arguments>
Status launch(Kernel kernel, dim3 grid, int threads, SharedBytes shared, cudaStream_t stream,
              const Arguments&... arguments) {
  return launch_kernel(false, kernel, grid, threads, shared, stream, arguments...);
}

}  // namespace twell::cuda
