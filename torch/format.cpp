#include "twell/format.h"

#include <array>

#include "check.h"
#include "device.h"
#include "operators.h"

namespace twell::ops {
std::tuple<Tensor, Tensor> twell_encode(const Tensor& values, std::int64_t slots) {
  require_bf16_matrix({"values", values});
  const TwellShape shape = require_twell_shape(values.size(0), values.size(1), slots);
  const Execution execution(values);
  Tensor words = execution.empty({shape.rows, shape.tiles(), shape.slots}, ScalarType::Int);
  Tensor overflow = execution.empty({}, ScalarType::Long);
  const TwellOverflow found = require(twell::twell_encode(
      shape,
      {static_cast<const bf16*>(values.const_data_ptr()), static_cast<std::size_t>(values.numel())},
      {static_cast<std::uint32_t*>(words.mutable_data_ptr()),
       static_cast<std::size_t>(words.numel())}));
  *static_cast<std::int64_t*>(overflow.mutable_data_ptr()) = found.tile_rows;
  return {words, overflow};
}

Tensor twell_decode(const Tensor& words, std::int64_t columns) {
  const Argument words_argument{"words", words};
  require_dtype(words_argument, ScalarType::Int);
  require_dim(words_argument, 3);
  require_contiguous(words_argument);
  const TwellShape shape = require_twell_shape(words.size(0), columns, words.size(2));
  require_shape(words_argument, std::array{shape.rows, shape.tiles(), words.size(2)},
                "[rows, ceil(columns / 256), slots]");
  Tensor values = Execution(words).empty({shape.rows, columns}, ScalarType::BFloat16);
  require(twell::twell_decode(
      shape,
      {static_cast<const std::uint32_t*>(words.const_data_ptr()),
       static_cast<std::size_t>(words.numel())},
      {static_cast<bf16*>(values.mutable_data_ptr()), static_cast<std::size_t>(values.numel())}));
  return values;
}

}  // namespace twell::ops
