#pragma once
// The gate projection that packs as it goes: words = TwELL(relu(x Gᵀ) rounded to bf16), with no
// dense [rows, columns] matrix in memory.

#include <cstddef>
#include <cstdint>

#include "twell/device.h"
#include "twell/format.h"
#include "twell/status.h"
#include "twell/types.h"

namespace twell {

struct GatePackArgs {
  const bf16* x = nullptr;                     // [shape.rows, hidden]
  const bf16* gate = nullptr;                  // [shape.columns, hidden]
  std::int64_t hidden = 0;                     // a positive multiple of 8
  std::uint32_t* words = nullptr;              // [shape.words()], every word written
  std::int64_t* overflow_tile_rows = nullptr;  // one number: tile rows with count > slots - 1
  void* workspace = nullptr;                   // 64-byte aligned
  void* stream = nullptr;                      // cudaStream_t; ignored on the CPU
};

Result<std::size_t> gate_pack_workspace_bytes(const TwellShape& shape, std::int64_t hidden,
                                              const Device& device);

Status gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs& args);

}  // namespace twell
