#pragma once
// The CUDA side of twell/gate_pack.h. Arguments have been validated.

#include "twell/gate_pack.h"

namespace twell::cuda {

Result<std::size_t> gate_pack_workspace_bytes(const TwellShape& shape, const Device& device);

Status gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs& args);

}  // namespace twell::cuda
