#include "cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/check.h"

namespace twell::cuda {

Status make_tensor_map(CUtensorMap& map, const void* data, std::int64_t rows, std::int64_t columns,
                       int box_rows) {
  // Through the runtime, so that no driver library is linked.
  constexpr unsigned kVersion = 12000;  // of CUDA, in which the function appeared
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess) return check(error, "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) {
    return Status(StatusCode::kDevice,
                  "cuTensorMapEncodeTiled: not in this CUDA driver; "
                  "permitted: a driver for CUDA 12.0 or newer");
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return Status(StatusCode::kDevice, "cuTensorMapEncodeTiled: error " + std::to_string(result) +
                                           " for [" + std::to_string(rows) + ", " +
                                           std::to_string(columns) + "]");
  }
  return {};
}

}  // namespace twell::cuda
