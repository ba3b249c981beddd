#pragma once
// Runs CUDA kernels on the host, so that those without Hopper's own instructions are tested where
// there is no GPU. Each CUDA thread is a fiber, which runs until it meets others at a barrier or
// in a warp's collective operation; blocks run one after the other.
//
// It checks what a GPU may let pass: shared memory is poisoned before each block (0xFF: NaN) and
// guarded behind its end, lanes of a warp must meet in the same operation, asynchronous copies must
// be waited for, and no thread may wait for ever. A fault ends the launch, and all launches until
// `recover`, with cudaErrorLaunchFailure, which cudaGetErrorString then explains.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_sim {

// What a GPU leaves open; a correct kernel gives the same results with all of them.
struct Settings {
  bool descending = false;    // warps, and their lanes, run from the last to the first
  bool early_copies = false;  // asynchronous copies happen when issued, not when waited for
};
inline Settings settings;

// Counts since they were last set to 0.
struct Counters {
  std::int64_t matrix_loads = 0;    // 8 x 8 matrices by ldmatrix
  std::int64_t bank_conflicts = 0;  // rows of them whose banks another row of the matrix needs too
};
inline Counters counters;

inline constexpr int kWarpLanes = 32;
inline constexpr std::size_t kMaxShared = 99 << 10;      // per block, on every GPU since sm_80
inline constexpr std::size_t kDefaultShared = 48 << 10;  // of a kernel without a limit of its own

// Runs `thread` for every thread of the grid.
cudaError_t run(dim3 grid, dim3 block, std::size_t shared_bytes,
                const std::function<void()>& thread);

// A kernel's limit of dynamic shared memory. It is the same for all threads of a process, and an
// error to set to another value than before: another thread may be about to launch the kernel.
cudaError_t limit_shared(const void* kernel, std::size_t bytes);
std::size_t shared_limit(const void* kernel);

// What the last fault was.
const std::string& last_fault();
void recover();

// The rest is for the threads of a running kernel.

[[noreturn]] void fault(const std::string& what);

// Waits for all threads of the block that have not ended.
void sync_block();

// Arrives at the warp's operation `name`. The last lane to arrive receives all lanes' slots, and
// must call release_warp when it has filled them; the others receive null once it has.
void* const* arrive_warp(const char* name, void* slot);
void release_warp();

// compute(lanes) sees the slots of all 32 lanes of the warp, once.
template <class Slot, class Compute>
void collective(const char* name, Slot& slot, Compute&& compute) {
  if (void* const* slots = arrive_warp(name, &slot)) {
    Slot* lanes[kWarpLanes];
    for (int lane = 0; lane < kWarpLanes; ++lane) lanes[lane] = static_cast<Slot*>(slots[lane]);
    compute(lanes);
    release_warp();
  }
}

// The block's dynamic shared memory, and `bytes` of it at an address, which must be inside and
// aligned to them.
std::byte* dynamic_shared();
std::byte* shared_at(std::uint32_t address, std::size_t bytes);

// cp.async of 16 bytes (zeros where source is null), commit_group and wait_group.
void copy_async(std::uint32_t address, const void* source);
void commit_copies();
void wait_for_copies(int pending_groups);

}  // namespace cuda_sim
