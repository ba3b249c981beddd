#pragma once

#include <cstddef>
#include <string>

#include "twell/status.h"

namespace twell {

enum class DeviceType { kCpu, kCuda };

// Instruction sets of the CPU kernels, each a superset of the ones before it.
enum class CpuIsa { kPortable, kAvx2, kAvx512Bf16, kAmxBf16 };

const char* name_of(CpuIsa isa);

// What the planner needs to know of a device. Plain data: a test can describe a device that the
// machine does not have.
struct Device {
  DeviceType type = DeviceType::kCpu;

  // CPU
  CpuIsa isa = CpuIsa::kPortable;
  int threads = 1;

  // CUDA
  int ordinal = 0;
  int compute_capability = 0;  // 10 * major + minor: 80, 90, 100, …
  int multiprocessors = 0;
  std::size_t shared_memory_bytes = 0;  // opt-in maximum per block
  std::size_t l2_bytes = 0;

  std::string to_string() const;
};

// The best instruction set that this processor and operating system offer (on Linux this asks
// for permission to use AMX tile registers).
CpuIsa detect_cpu_isa();

// This machine's CPU with `threads` threads (> 0).
Device cpu_device(int threads);

// CUDA device `ordinal`; kUnsupported, by name, if twell was built without CUDA or if there is no
// such device. One older than sm_80 runs no kernel of twell's: plans for it are dense or refused.
// Built with TWELL_CUDA_PORTABLE, a newer one is described as of sm_80.
Result<Device> cuda_device(int ordinal);

}  // namespace twell
