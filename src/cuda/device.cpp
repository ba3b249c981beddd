#include "twell/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "cuda/check.h"

namespace twell {

Result<Device> cuda_device(int ordinal) {
  const std::string asked = "cuda_device: device " + std::to_string(ordinal);
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    (void)cudaGetLastError();
    return Status(StatusCode::kUnsupported,
                  asked + " asked for, but CUDA says: " + cudaGetErrorString(error));
  }
  if (ordinal < 0 || ordinal >= count) {
    return Status(StatusCode::kUnsupported,
                  asked + " asked for; permitted: 0 to " + std::to_string(count - 1));
  }
  Device device;
  device.type = DeviceType::kCuda;
  device.ordinal = ordinal;
  int major = 0, minor = 0, shared = 0, l2 = 0;
  const auto query = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  cudaError_t error = query(major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = query(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = query(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = query(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = query(l2, cudaDevAttrL2CacheSize);
  if (error != cudaSuccess) return cuda::check(error, asked.c_str());
  device.compute_capability = 10 * major + minor;
#ifdef TWELL_CUDA_PORTABLE
  // The kernels are those of sm_80, which must not be launched as Hopper's are: they have no wait
  // for the previous kernel (ptx/grid.cuh).
  device.compute_capability = std::min(device.compute_capability, 80);
#endif
  device.shared_memory_bytes = static_cast<std::size_t>(shared);
  device.l2_bytes = static_cast<std::size_t>(l2);
  return device;
}

}  // namespace twell
