// What stands in for src/cuda in a build without it.
#ifndef TWELL_HAVE_CUDA

#include "cuda/ffn.h"
#include "cuda/gate_pack.h"
#include "twell/device.h"

namespace twell {

Result<Device> cuda_device(int ordinal) {
  return Status(StatusCode::kUnsupported, "cuda_device: device " + std::to_string(ordinal) +
                                              " asked for; this build of twell has no CUDA "
                                              "kernels");
}

namespace cuda {

Status forward(const FfnPlan&, const FfnForwardArgs&) {
  return {StatusCode::kUnsupported, "ffn_forward: this build of twell has no CUDA kernels"};
}

Status backward(const FfnPlan&, const FfnBackwardArgs&) {
  return {StatusCode::kUnsupported, "ffn_backward: this build of twell has no CUDA kernels"};
}

Result<std::size_t> gate_pack_workspace_bytes(const TwellShape&, const Device&) {
  return Status(StatusCode::kUnsupported, "gate_pack: this build of twell has no CUDA kernels");
}

Status gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs&) {
  return gate_pack_workspace_bytes(shape, device).status();
}

}  // namespace cuda
}  // namespace twell

#endif
