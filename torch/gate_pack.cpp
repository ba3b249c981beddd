#include "twell/gate_pack.h"

#include <array>

#include "check.h"
#include "device.h"
#include "operators.h"

namespace twell::ops {

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

}  // namespace twell::ops
