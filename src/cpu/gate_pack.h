#pragma once
// The CPU side of twell/gate_pack.h. Arguments have been validated.

#include <cstddef>
#include <cstdint>

#include "twell/gate_pack.h"

namespace twell::cpu {

std::size_t gate_pack_workspace_bytes(const TwellShape& shape, std::int64_t hidden,
                                      const Device& device);

void gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs& args);

}  // namespace twell::cpu
