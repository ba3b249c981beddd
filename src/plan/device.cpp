#include "twell/device.h"

#ifdef TWELL_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace twell {

const char* name_of(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
    case CpuIsa::kAmxBf16:
      return "amx_bf16";
  }
  return "unknown";
}

namespace {

#ifdef TWELL_X86

// Asks Linux for the AMX tile registers, which a process may not touch unasked. Idempotent.
bool amx_permitted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuIsa detect() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  if (!avx512) return CpuIsa::kAvx2;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBits) == kAmxBits;
  return amx && amx_permitted() ? CpuIsa::kAmxBf16 : CpuIsa::kAvx512Bf16;
}

#else

CpuIsa detect() { return CpuIsa::kPortable; }

#endif

}  // namespace

CpuIsa detect_cpu_isa() {
  static const CpuIsa isa = detect();  // cpuid is slow under virtualisation
  return isa;
}

Device cpu_device(int threads) {
  Device device;
  device.type = DeviceType::kCpu;
  device.isa = detect_cpu_isa();
  device.threads = threads;
  return device;
}

std::string Device::to_string() const {
  if (type == DeviceType::kCpu) {
    return "cpu, " + std::string(name_of(isa)) + ", " + std::to_string(threads) +
           (threads == 1 ? " thread" : " threads");
  }
  return "cuda:" + std::to_string(ordinal) + ", sm_" + std::to_string(compute_capability) + ", " +
         std::to_string(multiprocessors) + " multiprocessors";
}

}  // namespace twell
