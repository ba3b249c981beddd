#include "check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace twell::ops {
namespace {

std::string to_string(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::span<const std::int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.data(), sizes.size()};
}

std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

}  // namespace

void refuse(std::string_view argument, std::string_view complaint) {
  throw std::runtime_error("twell: " + std::string(argument) + " " + std::string(complaint));
}

void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error("twell: " + status.message());
}

void require_contiguous(const Argument& argument) {
  if (argument.tensor.is_contiguous()) return;
  const auto strides = argument.tensor.strides();
  refuse(argument.name, "has shape " + to_string(shape_of(argument.tensor)) + " with strides " +
                            to_string({strides.data(), strides.size()}) +
                            "; it must be contiguous (call .contiguous())");
}

void require_dim(const Argument& argument, std::int64_t dim) {
  if (argument.tensor.dim() == dim) return;
  refuse(argument.name, "has shape " + to_string(shape_of(argument.tensor)) + "; it must have " +
                            std::to_string(dim) + " dimensions");
}

void require_dtype(const Argument& argument, ScalarType dtype) {
  if (argument.tensor.scalar_type() == dtype) return;
  refuse(argument.name, std::string("has dtype ") + toString(argument.tensor.scalar_type()) +
                            "; it must be " + toString(dtype));
}

void require_shape(const Argument& argument, std::span<const std::int64_t> shape,
                   std::string_view meaning) {
  const auto actual = shape_of(argument.tensor);
  if (std::equal(actual.begin(), actual.end(), shape.begin(), shape.end())) return;
  refuse(argument.name, "has shape " + to_string(actual) + "; it must be " + std::string(meaning) +
                            " = " + to_string(shape));
}

void require_same_device(const Argument& argument, const Argument& reference) {
  const std::string actual = device_of(argument.tensor);
  const std::string expected = device_of(reference.tensor);
  if (actual == expected) return;
  refuse(argument.name, "is on " + actual + "; it must be on the device of " +
                            std::string(reference.name) + ", " + expected);
}

DType require_core_dtype(std::string_view argument, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      refuse(argument, std::string("has dtype ") + toString(dtype) +
                           "; it must be BFloat16, Float or Double");
  }
}

void require_bf16_matrix(const Argument& argument) {
  require_dtype(argument, ScalarType::BFloat16);
  require_dim(argument, 2);
  require_contiguous(argument);
}

TwellShape require_twell_shape(std::int64_t rows, std::int64_t columns, std::int64_t slots) {
  if (!std::in_range<int>(slots)) {
    refuse("slots", "is " + std::to_string(slots) + "; it must be 8, 16, 32, 64 or 128");
  }
  const TwellShape shape{rows, columns, static_cast<int>(slots)};
  require(validate(shape));
  return shape;
}

}  // namespace twell::ops
