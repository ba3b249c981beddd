#pragma once
// What the tests of the CUDA gate-and-pack share.

#include "support.h"
#include "twell/gate_pack.h"

namespace twell {

// A gate-and-pack of a block's x and gate on the device, with poisoned outputs and workspace.
struct GatePackCall {
  Device device;
  std::int64_t hidden;
  TwellShape shape;
  DeviceBuffer x, gate, words, overflow, workspace;

  GatePackCall(const Device& d, const Block& block, int slots)
      : device(d),
        hidden(block.problem.hidden),
        shape{block.problem.tokens, block.problem.neurons, slots},
        x(block.x),
        gate(block.gate),
        words(static_cast<std::size_t>(shape.words()) * 4),
        overflow(8),
        workspace(workspace_bytes(shape, hidden, device)) {}

  void poison(cudaStream_t stream) {
    for (DeviceBuffer* buffer : {&words, &overflow, &workspace}) buffer->poison(stream);
  }

  Status run(cudaStream_t stream = nullptr) {
    GatePackArgs args;
    args.x = x.as<bf16>();
    args.gate = gate.as<bf16>();
    args.hidden = hidden;
    args.words = words.as<std::uint32_t>();
    args.overflow_tile_rows = overflow.as<std::int64_t>();
    args.workspace = workspace.as();
    args.stream = stream;
    return gate_pack(shape, device, args);
  }

 private:
  static std::size_t workspace_bytes(const TwellShape& shape, std::int64_t hidden,
                                     const Device& device) {
    const Result<std::size_t> bytes = gate_pack_workspace_bytes(shape, hidden, device);
    EXPECT_TRUE(bytes.ok()) << bytes.status().message();
    return bytes.value();
  }
};

}  // namespace twell
