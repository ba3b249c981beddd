#pragma once

#include <cuda.h>

#include <cstdint>

#include "twell/status.h"

namespace twell::cuda {

// map ← a TMA view of the row-major bf16 matrix [rows, columns] at `data` (16-byte aligned, columns
// a multiple of 8), in boxes of box_rows x 64 elements with the 128-byte swizzle; elements outside
// the matrix are read as zeros.
Status make_tensor_map(CUtensorMap& map, const void* data, std::int64_t rows, std::int64_t columns,
                       int box_rows);

}  // namespace twell::cuda
