#pragma once
// Checks of the operators' arguments. A failed check throws std::runtime_error, which PyTorch
// raises as RuntimeError, with one line: the argument, its value and what is permitted.

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

#include "twell/format.h"
#include "twell/status.h"
#include "twell/types.h"

namespace twell::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor and the name of the argument that holds it.
struct Argument {
  std::string_view name;
  const Tensor& tensor;
};

[[noreturn]] void refuse(std::string_view argument, std::string_view complaint);

// The core's refusals already name their argument.
void require(const Status& status);

template <class T>
T require(Result<T> result) {
  require(result.status());
  return std::move(result).value();
}

void require_contiguous(const Argument& argument);
void require_dim(const Argument& argument, std::int64_t dim);
void require_dtype(const Argument& argument, ScalarType dtype);
void require_shape(const Argument& argument, std::span<const std::int64_t> shape,
                   std::string_view meaning);
void require_same_device(const Argument& argument, const Argument& reference);

// The core's dtype for BFloat16, Float and Double; refuses others.
DType require_core_dtype(std::string_view argument, ScalarType dtype);

// [rows, columns] bf16, contiguous.
void require_bf16_matrix(const Argument& argument);

TwellShape require_twell_shape(std::int64_t rows, std::int64_t columns, std::int64_t slots);

}  // namespace twell::ops
