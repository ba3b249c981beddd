#include "twell/gate_pack.h"

#include <cstdint>
#include <string>

#include "cpu/gate_pack.h"
#include "cuda/gate_pack.h"

namespace twell {
namespace {

Status invalid(const std::string& name, const std::string& value, const std::string& permitted) {
  return {StatusCode::kInvalidArgument,
          "gate_pack: " + name + " is " + value + "; permitted: " + permitted};
}

Status check_sizes(const TwellShape& shape, std::int64_t hidden, const Device& device) {
  constexpr std::int64_t kMaxHidden = 1 << 20;
  if (Status status = validate(shape); !status.ok()) return status;
  if (hidden <= 0 || hidden % 8 != 0 || hidden > kMaxHidden) {
    return invalid("hidden", std::to_string(hidden), "a positive multiple of 8, at most 1048576");
  }
  if (device.type == DeviceType::kCuda) return {};
  if (device.threads < 1) {
    return invalid("device.threads", std::to_string(device.threads), "1 or more");
  }
  if (device.isa > detect_cpu_isa()) {
    return {StatusCode::kUnsupported, std::string("gate_pack: device.isa is ") +
                                          name_of(device.isa) + "; this machine offers at most " +
                                          name_of(detect_cpu_isa())};
  }
  return {};
}

}  // namespace

Result<std::size_t> gate_pack_workspace_bytes(const TwellShape& shape, std::int64_t hidden,
                                              const Device& device) {
  if (Status status = check_sizes(shape, hidden, device); !status.ok()) return status;
  if (device.type == DeviceType::kCuda) return cuda::gate_pack_workspace_bytes(shape, device);
  return cpu::gate_pack_workspace_bytes(shape, hidden, device);
}

Status gate_pack(const TwellShape& shape, const Device& device, const GatePackArgs& args) {
  if (Status status = check_sizes(shape, args.hidden, device); !status.ok()) return status;
  if (!args.overflow_tile_rows) return invalid("overflow_tile_rows", "null", "a pointer to data");
  if (shape.rows > 0) {
    if (!args.x) return invalid("x", "null", "a pointer to data");
    if (!args.gate) return invalid("gate", "null", "a pointer to data");
    if (!args.words) return invalid("words", "null", "a pointer to data");
    if (!args.workspace || reinterpret_cast<std::uintptr_t>(args.workspace) % 64 != 0) {
      return invalid("workspace", args.workspace ? "not 64-byte aligned" : "null",
                     "64-byte aligned memory");
    }
  }
  if (device.type == DeviceType::kCuda) return cuda::gate_pack(shape, device, args);
  cpu::gate_pack(shape, device, args);
  return {};
}

}  // namespace twell
