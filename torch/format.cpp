#include "twell/format.h"

#include <array>
#include <limits>
#include <string>

#include "check.h"
#include "device.h"
#include "operators.h"
#include "twell/gate_pack.h"

namespace twell::ops {
namespace {

int to_int(std::string_view argument, std::int64_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    refuse(argument, "is " + std::to_string(value) + "; it must be 8, 16, 32, 64 or 128");
  }
  return static_cast<int>(value);
}

TwellShape require_twell_shape(std::int64_t rows, std::int64_t columns, std::int64_t slots) {
  const TwellShape shape{rows, columns, to_int("slots", slots)};
  require(validate(shape));
  return shape;
}

void require_bf16_matrix(const Argument& argument) {
  require_dtype(argument, ScalarType::BFloat16);
  require_dim(argument, 2);
  require_contiguous(argument);
}

}  // namespace

std::tuple<Tensor, Tensor> gate_pack(const Tensor& x, const Tensor& gate, std::int64_t slots) {
  const Argument x_argument{"x", x};
  const Argument gate_argument{"gate", gate};
  require_bf16_matrix(x_argument);
  require_same_device(gate_argument, x_argument);
  require_bf16_matrix(gate_argument);
  require_shape(gate_argument, std::array{gate.size(0), x.size(1)}, "[neurons, hidden]");

  const TwellShape shape = require_twell_shape(x.size(0), gate.size(0), slots);
  const Execution execution(x);
  const std::size_t workspace_bytes =
      require(gate_pack_workspace_bytes(shape, x.size(1), execution.device()));

  Tensor words = execution.empty({shape.rows, shape.tiles(), shape.slots}, ScalarType::Int);
  Tensor overflow = execution.empty({}, ScalarType::Long);
  const Tensor workspace = execution.bytes(workspace_bytes);
  GatePackArgs args;
  args.x = static_cast<const bf16*>(x.const_data_ptr());
  args.gate = static_cast<const bf16*>(gate.const_data_ptr());
  args.hidden = x.size(1);
  args.words = static_cast<std::uint32_t*>(words.mutable_data_ptr());
  args.overflow_tile_rows = static_cast<std::int64_t*>(overflow.mutable_data_ptr());
  args.workspace = workspace.mutable_data_ptr();
  args.stream = execution.stream();
  require(twell::gate_pack(shape, execution.device(), args));
  return {words, overflow};
}

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
