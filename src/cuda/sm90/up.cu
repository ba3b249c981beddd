// The up projection over the unions of a chunk on Hopper: h = columns ⊙ (x Uᵀ), and what is kept of
// both factors for the backward.

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/sm90/gather.cuh"
#include "cuda/sm90/products.h"

namespace twell::cuda::sm90 {
namespace {

template <int kMostSteps>
struct UpEpilogue {
  using Sources = std::uint32_t[kUnionItem];  // where an item's columns are, for one half
  static constexpr std::uint32_t kAbsent = ~0u;
  static constexpr int kMatrices = 1;
  static constexpr bool kFills = false;

  struct Scratch {
    Sources sources[2][Gather::kConsumers];  // by turn
  };
  using Stages = GatherStages<Scratch, kMostSteps>;

  class Consumer;

  __device__ static int count(const Schedule& schedule) { return schedule.item_count; }
};

template <int kMostSteps>
class UpEpilogue<kMostSteps>::Consumer {
 public:
  __device__ Consumer(const UpEpilogue&, const ForwardChunk& chunk, Stages& shared, int half)
      : chunk_(chunk), scratch_(shared.scratch), half_(half) {}

  // Each thread looks up two positions.
  __device__ __forceinline__ void look_ahead(GatherPart part) {
    const int first = 2 * static_cast<int>(threadIdx.x % 128);
    next_[0] = next_[1] = kAbsent;
    if (first >= part.steps() * kUnionStep) return;
    const uint4 pair = *reinterpret_cast<const uint4*>(
        chunk_.unions + static_cast<std::size_t>(part.tile()) * chunk_.capacity +
        part.first_position() + first);
    const UnionEntry entries[2] = {{pair.x, pair.y}, {pair.z, pair.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (entries[i].in_half(half_)) next_[i] = entries[i].source(half_);
    }
  }

  // Shares the look-ups of the warpgroup.
  __device__ __forceinline__ void begin() {
    turn_ ^= 1;
    reinterpret_cast<uint2*>(scratch_.sources[turn_][half_])[threadIdx.x % 128] =
        make_uint2(next_[0], next_[1]);
    ptx::named_barrier_sync(1 + half_, 128);
  }

  template <int kN>
  struct Held {
    std::uint32_t g[kN / 4];
    int count;  // of the union
    int base;   // of the half's columns in h
    int kept;   // and in the saved columns; -1: they are not kept
  };

  template <int kN>
  __device__ __forceinline__ Held<kN> before(GatherPart part) const {
    const Sources& sources = scratch_.sources[turn_][half_];
    const std::uint32_t* columns =
        chunk_.columns + half_tile(part) * chunk_.blocks * kBlockNeurons * kColumnWords + word();
    Held<kN> held;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const uint2 source = *reinterpret_cast<const uint2*>(&sources[8 * j + 2 * quad()]);
      held.g[2 * j] = source.x == kAbsent ? 0 : columns[source.x * kColumnWords];
      held.g[2 * j + 1] = source.y == kAbsent ? 0 : columns[source.y * kColumnWords];
    }
    held.count = chunk_.counts[part.tile()];
    held.base = chunk_.halves[half_tile(part)].base;
    held.kept = chunk_.kept_base(chunk_.place(part.tile()), part.tile(), half_);
    return held;
  }

  template <int kN>
  __device__ __forceinline__ void after(const float (&sums)[kN / 2], const Held<kN>& held,
                                        typename Stages::Ring&, GatherPart part) const {
    const int first = part.first_position() + 2 * quad();  // this thread's first position
    const auto at = [&](int base) { return (std::int64_t{base} + first) * kColumnWords + word(); };
    std::uint32_t* h = chunk_.h + at(held.base);
    if (chunk_.saved.active) count_active(held.g);
    const bool saves = held.kept >= 0;
    const std::int64_t saved = at(held.kept);
    std::uint32_t* saved_g = chunk_.saved.g + saved;
    std::uint32_t* saved_u = chunk_.saved.u + saved;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const float* u = sums + 4 * j + parity;
        const std::uint32_t g = held.g[2 * j + parity];
        const std::uint32_t value = ptx::pack(ptx::low_half(g) * u[0], ptx::high_half(g) * u[2]);
        const int position = 8 * j + parity;
        const bool in_use = first + position < held.count;  // padding is no 0 · inf
        h[position * kColumnWords] = in_use ? value : 0;
        if (saves) {
          saved_g[position * kColumnWords] = g;
          saved_u[position * kColumnWords] = ptx::pack(u[0], u[2]);
        }
      }
    }
  }

 private:
  // Those of tokens beyond the last one too, which a NaN in G can make.
  template <int kWords>
  __device__ __forceinline__ void count_active(const std::uint32_t (&g)[kWords]) const {
    int active = 0;
#pragma unroll
    for (const std::uint32_t pair : g) active += ((pair & 0x7fffu) != 0) + (pair >> 16 != 0);
    active = __reduce_add_sync(~0u, active);
    if (threadIdx.x % 32 == 0) atomicAdd(chunk_.saved.active, active);
  }
  __device__ __forceinline__ std::size_t half_tile(GatherPart part) const {
    return 2 * part.tile() + half_;
  }
  __device__ static __forceinline__ int quad() { return threadIdx.x % 4; }
  // Of a column: that of this thread's sums.
  __device__ static __forceinline__ int word() {
    return threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;
  }

  const ForwardChunk& chunk_;
  Scratch& scratch_;
  const int half_;
  int turn_ = 0;
  std::uint32_t next_[2] = {kAbsent, kAbsent};
};

template <int kMostSteps>
__global__ void __launch_bounds__(Gather::kThreads, 1)
    up_kernel(const ForwardChunk chunk, const __grid_constant__ GatherOperands<1> operands) {
  multiply_items(chunk, operands, UpEpilogue<kMostSteps>{});
}

}  // namespace

Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream) {
  GatherOperands<1> operands;
  if (Status status = make_operands<1>(operands, chunk, x, {up}); !status.ok()) return status;
  const auto launch_for = [&]<int kMostSteps>() {
    return launch(up_kernel<kMostSteps>, multiprocessors, Gather::kThreads,
                  kGatherBytes<UpEpilogue<kMostSteps>>, stream, chunk, operands);
  };
  return chunk.item_steps <= kSmallItem / kUnionStep
             ? launch_for.template operator()<kSmallItem / kUnionStep>()
             : launch_for.template operator()<kUnionItem / kUnionStep>();
}

}  // namespace twell::cuda::sm90
