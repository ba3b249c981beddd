#include "simulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The bounds of the section in which device.h puts static shared memory.
extern "C" {
extern std::byte __start_cuda_sim_shared __attribute__((weak));
extern std::byte __stop_cuda_sim_shared __attribute__((weak));
}

namespace cuda_sim {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kGuardBytes = 1024;
constexpr int kPoison = 0xFF;
constexpr int kGuard = 0xA5;

struct Copy {
  std::uint32_t address;
  const void* source;
};
using Group = std::vector<Copy>;

// A point where threads meet. It opens, once, when `generation` moves on.
struct Meeting {
  const char* name = "";
  std::uint64_t generation = 0;
  int arrived = 0;
  void* slots[kWarpLanes] = {};  // of a warp's lanes
};

// One thread's stack and where it stands. It serves one thread after the other.
struct Fiber {
  void* stack = nullptr;
  jmp_buf position;
  bool started = false;
  bool ended = false;
  const Meeting* meeting = nullptr;  // that it waits at
  std::uint64_t generation = 0;      // of the meeting when it came
  uint3 index = {};
  Group open;                // copies not yet committed
  std::deque<Group> groups;  // committed, not yet waited for

  bool waits() const { return meeting && meeting->generation == generation; }
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps;
  Meeting block;
  const std::function<void()>* thread = nullptr;
  int threads = 0;
  int live = 0;
  int current = 0;
  jmp_buf scheduler;
  bool faulted = false;
  std::string fault;
  std::vector<std::byte> shared;
  std::byte* dynamic = nullptr;
  std::size_t dynamic_bytes = 0;
  std::map<const void*, std::size_t> limits;  // of kernels' dynamic shared memory

  Fiber& fiber() { return *fibers[current]; }
};

Machine machine;

[[noreturn]] __attribute__((noinline)) void leave_for_good() { _longjmp(machine.scheduler, 1); }

__attribute__((noinline)) void switch_to_scheduler() {
  if (_setjmp(machine.fiber().position) == 0) leave_for_good();
}

void wait_at(Meeting& meeting) {
  Fiber& fiber = machine.fiber();
  fiber.meeting = &meeting;
  fiber.generation = meeting.generation;
  switch_to_scheduler();
  fiber.meeting = nullptr;
}

void open_meeting(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
}

void end_thread() {
  Fiber& fiber = machine.fiber();
  for (const Group& group : fiber.groups) {
    if (!group.empty()) fault("it ended without waiting for its asynchronous copies");
  }
  if (!fiber.open.empty()) fault("it ended with asynchronous copies that it did not commit");
  fiber.groups.clear();
  fiber.ended = true;
  --machine.live;
  if (machine.live > 0 && machine.block.arrived == machine.live) open_meeting(machine.block);
}

void fiber_main() {
  for (;;) {
    (*machine.thread)();
    end_thread();
    switch_to_scheduler();
  }
}

__attribute__((noinline)) void resume(int index) {
  machine.current = index;
  Fiber& fiber = machine.fiber();
  threadIdx = fiber.index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.position, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  // Not all stacks begin at the same offset in a page, which would make them share few cache lines.
  context.uc_stack.ss_size = kStackBytes - index % 61 * 448;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

void prepare(dim3 block, std::size_t shared_bytes) {
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(machine.fibers.size()) < machine.threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    machine.fibers.push_back(std::move(fiber));
  }
  constexpr std::size_t kAlignment = 1024;
  machine.shared.resize(shared_bytes + kGuardBytes + kAlignment);
  const auto rest = reinterpret_cast<std::uintptr_t>(machine.shared.data()) % kAlignment;
  machine.dynamic = machine.shared.data() + (kAlignment - rest) % kAlignment;
  machine.dynamic_bytes = shared_bytes;
}

void start_block() {
  std::memset(machine.dynamic, kPoison, machine.dynamic_bytes);
  std::memset(machine.dynamic + machine.dynamic_bytes, kGuard, kGuardBytes);
  if (&__start_cuda_sim_shared) {
    std::memset(&__start_cuda_sim_shared, kPoison,
                static_cast<std::size_t>(&__stop_cuda_sim_shared - &__start_cuda_sim_shared));
  }
  machine.warps.assign((machine.threads + kWarpLanes - 1) / kWarpLanes, {});
  machine.block = {};
  machine.block.name = "__syncthreads";
  machine.live = machine.threads;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.ended = false;
    fiber.meeting = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    const unsigned thread = static_cast<unsigned>(i);
    fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                   thread / blockDim.x / blockDim.y};
  }
}

// A fault of the whole block.
void note_fault(const std::string& what) {
  machine.faulted = true;
  machine.fault =
      "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "): " + what;
}

// Gives every thread of a warp that can move a turn, until none can or one faults. So warps drift
// as far apart as the block's barriers let them. Returns whether any moved.
bool run_warp(int warp) {
  const int first = warp * kWarpLanes;
  const int lanes = std::min(kWarpLanes, machine.threads - first);
  for (bool any = false;; any = true) {
    bool moved = false;
    for (int lane = 0; lane < lanes; ++lane) {
      const int index = first + (settings.descending ? lanes - 1 - lane : lane);
      const Fiber& fiber = *machine.fibers[index];
      if (fiber.ended || fiber.waits()) continue;
      moved = true;
      resume(index);
      if (machine.faulted) return true;
    }
    if (!moved) return any;
  }
}

void run_block() {
  start_block();
  const int warps = static_cast<int>(machine.warps.size());
  while (machine.live > 0) {
    bool moved = false;
    for (int turn = 0; turn < warps; ++turn) {
      moved |= run_warp(settings.descending ? warps - 1 - turn : turn);
      if (machine.faulted) return;
    }
    if (moved) continue;
    for (int i = 0; i < machine.threads; ++i) {
      const Fiber& fiber = *machine.fibers[i];
      if (fiber.ended) continue;
      return note_fault("thread " + std::to_string(i) + " waits for ever at " +
                        fiber.meeting->name);
    }
  }
  for (std::size_t i = 0; i < kGuardBytes; ++i) {
    if (machine.dynamic[machine.dynamic_bytes + i] != std::byte{kGuard}) {
      return note_fault("it wrote behind its dynamic shared memory of " +
                        std::to_string(machine.dynamic_bytes) + " bytes");
    }
  }
}

void make_copies(const Group& group) {
  for (const Copy& copy : group) {
    std::byte* target = shared_at(copy.address, 16);
    if (copy.source) {
      std::memcpy(target, copy.source, 16);
    } else {
      std::memset(target, 0, 16);
    }
  }
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, std::size_t shared_bytes,
                const std::function<void()>& thread) {
  if (machine.faulted) return cudaErrorLaunchFailure;
  if (block.x * block.y * block.z > 1024 || shared_bytes > kMaxShared) {
    return cudaErrorInvalidConfiguration;
  }
  machine.thread = &thread;
  gridDim = grid;
  blockDim = block;
  prepare(block, shared_bytes);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
        if (!machine.faulted) continue;
        for (auto& fiber : machine.fibers) fiber->started = false;  // their stacks are in disorder
        return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t limit_shared(const void* kernel, std::size_t bytes) {
  if (bytes > kMaxShared) return cudaErrorInvalidValue;
  const std::size_t limit = machine.limits.try_emplace(kernel, bytes).first->second;
  if (limit == bytes) return cudaSuccess;
  machine.faulted = true;
  machine.fault = "a kernel's limit of shared memory was " + std::to_string(limit) +
                  " bytes and was set to " + std::to_string(bytes);
  return cudaErrorLaunchFailure;
}

std::size_t shared_limit(const void* kernel) {
  const auto limit = machine.limits.find(kernel);
  return limit == machine.limits.end() ? kDefaultShared : limit->second;
}

const std::string& last_fault() { return machine.fault; }

void recover() { machine.faulted = false; }

void fault(const std::string& what) {
  note_fault("thread " + std::to_string(machine.current) + ": " + what);
  leave_for_good();
}

void sync_block() {
  Meeting& meeting = machine.block;
  if (++meeting.arrived == machine.live) {
    open_meeting(meeting);
  } else {
    wait_at(meeting);
  }
}

void* const* arrive_warp(const char* name, void* slot) {
  Meeting& meeting = machine.warps[machine.current / kWarpLanes];
  if (meeting.arrived > 0 && meeting.name != name && std::strcmp(meeting.name, name) != 0) {
    fault(std::string("it is at ") + name + ", other lanes of its warp at " + meeting.name);
  }
  meeting.name = name;
  meeting.slots[machine.current % kWarpLanes] = slot;
  if (++meeting.arrived == kWarpLanes) return meeting.slots;
  wait_at(meeting);
  return nullptr;
}

void release_warp() { open_meeting(machine.warps[machine.current / kWarpLanes]); }

std::byte* dynamic_shared() { return machine.dynamic; }

std::byte* shared_at(std::uint32_t address, std::size_t bytes) {
  if (address % bytes != 0 || address + bytes > machine.dynamic_bytes) {
    fault("shared address " + std::to_string(address) + " for " + std::to_string(bytes) +
          " bytes; permitted: aligned, within " + std::to_string(machine.dynamic_bytes) + " bytes");
  }
  return machine.dynamic + address;
}

void copy_async(std::uint32_t address, const void* source) {
  shared_at(address, 16);
  if (reinterpret_cast<std::uintptr_t>(source) % 16 != 0) {
    fault("an asynchronous copy from an address that is not 16-byte aligned");
  }
  if (settings.early_copies) make_copies({{address, source}});
  machine.fiber().open.push_back({address, source});
}

void commit_copies() {
  Fiber& fiber = machine.fiber();
  fiber.groups.push_back(std::exchange(fiber.open, {}));
}

void wait_for_copies(int pending_groups) {
  std::deque<Group>& groups = machine.fiber().groups;
  for (; static_cast<int>(groups.size()) > pending_groups; groups.pop_front()) {
    if (!settings.early_copies) make_copies(groups.front());
  }
}

}  // namespace cuda_sim
