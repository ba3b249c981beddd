#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/decode.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;  // neurons, and summed elements, that are multiplied together

// The rows of a weight and of x pass through a ring of slots. A slot holds a piece of all of them:
// kPiece summed elements. kBulk: filled by bulk copies, which want long pieces.
// kRows: as many rows of the weight as fit.
template <int kTokens, bool kBulk, int kRows>
struct Ring {
  static constexpr int kPiece = kBulk ? 256 : 128;
  static constexpr int kRow = kPiece + 8;  // so that 8 rows lie in different banks
  static constexpr int kBytes = (kRows + kTokens) * kRow * 2;  // of a slot
  static constexpr int kSlots = static_cast<int>((kBulk ? kBulkRing : kRing) / kBytes);

  struct Slot {
    __nv_bfloat16 rows[kRows][kRow];
    __nv_bfloat16 x[kTokens][kRow];
  } slots[kSlots];
};

// Warps share a product: kSumWarps parts of the summed dimension by kTokenWarps parts of the
// tokens.
template <int kTokens>
struct Split {
  static constexpr int kTokenWarps = kTokens > 32 ? 2 : 1;
  static constexpr int kSumWarps = kWarps / kTokenWarps;
  static constexpr int kTokens8 = kTokens / kTokenWarps / 8;  // groups of 8 tokens of a warp
};

template <int kTokens, bool kBulk>
struct Shared {
  using Ring = twell::cuda::Ring<kTokens, kBulk, kMaxDecodeUnit>;
  using FewRows = twell::cuda::Ring<kTokens, kBulk, kTile>;  // more slots
  union {
    Ring ring;
    FewRows few;
    float sums[Split<kTokens>::kSumWarps][kMaxDecodeUnit][kTokens];
  };
  std::uint64_t filled[Ring::kSlots];
  std::uint64_t few_filled[FewRows::kSlots];
  std::uint16_t g[kMaxDecodeUnit][kTokens];
  std::uint8_t list[kMaxDecodeUnit];  // the unit's neurons that are multiplied
  std::uint32_t in_use[2];
  float l1[kWarps];
};

// The products of the tokens with rows of a weight.
template <int kTokens, bool kBulk>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(Shared<kTokens, kBulk>& shared, const __nv_bfloat16* x,
                                        int tokens, int hidden)
      : shared_(shared), x_(x), tokens_(tokens), hidden_(hidden) {}

  // shared.sums ← each warp's part of the tokens' products with the first `count` neurons of
  // shared.list, whose rows are in `weights`. For all threads; shared.sums may be read at once.
  // With a kRows of kTile only once.
  template <int kRows>
  __device__ __forceinline__ void run(const __nv_bfloat16* weights, int count) {
    const int pieces = (hidden_ + kPiece - 1) / kPiece;
#pragma unroll 1
    for (int p = 0; p < kSlots<kRows>; ++p) fill<kRows>(weights, count, p, pieces);
    constexpr int kTiles = kRows / kTile;
    float acc[kTiles][kTokens8][4] = {};
#pragma unroll 1
    for (int p = 0; p < pieces; ++p) {
      wait<kRows>(p);
      multiply<kRows>(acc, count, p);
      if (p + kSlots<kRows> < pieces) __syncthreads();
      fill<kRows>(weights, count, p + kSlots<kRows>, pieces);
    }
    if constexpr (kRows == kMaxDecodeUnit) done_ += pieces;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokens8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = (token_warp() * kTokens8 + n) * 8 + lane_ % 4 * 2;
          float* out = &shared_.sums[sum_warp()][m * kTile + lane_ / 4 + half * 8][token];
          *reinterpret_cast<float2*>(out) =
              make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
        }
      }
    }
    __syncthreads();
  }

  // The sum over all warps; before the next run, let_reuse and a barrier.
  __device__ __forceinline__ float total(int row, int token) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < Split<kTokens>::kSumWarps; ++w) sum += shared_.sums[w][row][token];
    return sum;
  }
  __device__ __forceinline__ void let_reuse() const {
    if constexpr (kBulk) ptx::fence_async_proxy();
  }

 private:
  using All = Shared<kTokens, kBulk>;
  static constexpr int kPiece = All::Ring::kPiece;
  static constexpr int kRow = All::Ring::kRow;
  template <int kRows>
  static constexpr int kSlots = Ring<kTokens, kBulk, kRows>::kSlots;
  static constexpr int kTokens8 = Split<kTokens>::kTokens8;

  __device__ __forceinline__ int sum_warp() const { return warp_ / Split<kTokens>::kTokenWarps; }
  __device__ __forceinline__ int token_warp() const { return warp_ % Split<kTokens>::kTokenWarps; }

  template <int kRows>
  __device__ __forceinline__ auto& slot_of(int p) const {
    if constexpr (kRows == kMaxDecodeUnit) {
      return shared_.ring.slots[(done_ + p) % kSlots<kRows>];
    } else {
      return shared_.few.slots[p % kSlots<kRows>];
    }
  }
  template <int kRows>
  __device__ __forceinline__ std::uint64_t* barrier_of(int p) const {
    return kRows == kMaxDecodeUnit ? &shared_.filled[(done_ + p) % kSlots<kRows>]
                                   : &shared_.few_filled[p % kSlots<kRows>];
  }

  // Starts to fill the slot of piece p, if there is one.
  template <int kRows>
  __device__ __forceinline__ void fill(const __nv_bfloat16* weights, int count, int p, int pieces) {
    const int first = p * kPiece;
    auto& target = slot_of<kRows>(p);
    if constexpr (kBulk) {
      if (p >= pieces || p % kWarps != warp_) return;
      const std::uint32_t bytes = min(kPiece, hidden_ - first) * 2;
      std::uint64_t* filled = barrier_of<kRows>(p);
      if (lane_ == 0) ptx::mbarrier_arrive_expect(filled, (tokens_ + count) * bytes);
      for (int token = lane_; token < tokens_; token += 32) {
        ptx::copy_bulk(target.x[token], from(x_, token, first), bytes, filled);
      }
      for (int i = lane_; i < count; i += 32) {
        ptx::copy_bulk(target.rows[i], from(weights, shared_.list[i], first), bytes, filled);
      }
    } else {
      constexpr int kLanes = kPiece / 8;  // of a row, 16 bytes each
      const int k = static_cast<int>(threadIdx.x) % kLanes * 8;
      if (p < pieces && first + k < hidden_) {
        for (int i = threadIdx.x / kLanes; i < tokens_ + count; i += kThreads / kLanes) {
          const int row = i - tokens_;
          ptx::copy_async_16(
              ptx::shared_address(row < 0 ? &target.x[i][k] : &target.rows[row][k]),
              row < 0 ? from(x_, i, first + k) : from(weights, shared_.list[row], first + k), true);
        }
      }
      ptx::copy_async_commit();
    }
  }

  __device__ __forceinline__ const __nv_bfloat16* from(const __nv_bfloat16* rows, int row,
                                                       int element) const {
    return rows + static_cast<std::size_t>(row) * hidden_ + element;
  }

  template <int kRows>
  __device__ __forceinline__ void wait(int p) {
    if constexpr (kBulk) {
      const int at = kRows == kMaxDecodeUnit ? done_ + p : p;
      ptx::mbarrier_wait(barrier_of<kRows>(p), at / kSlots<kRows> % 2);
    } else {
      ptx::copy_async_wait<kSlots<kRows> - 1>();
      __syncthreads();
    }
  }

  // acc[neuron, token] += over this warp's part of piece p. What lies in the slot beyond the rows
  // and tokens reaches only sums that nobody uses; beyond the summed elements it must not count.
  template <int kRows>
  __device__ __forceinline__ void multiply(float (&acc)[kRows / kTile][kTokens8][4], int count,
                                           int p) {
    const auto& slot = slot_of<kRows>(p);
    const int token = token_warp() * kTokens8 * 8 + lane_ / 16 * 8 + lane_ % 8;
    const std::uint32_t rows =
        ptx::shared_address(&slot.rows[lane_ % 16][sum_warp() * kTile + lane_ / 16 * 8]);
    const std::uint32_t x =
        ptx::shared_address(&slot.x[token % kTokens][sum_warp() * kTile + lane_ / 8 % 2 * 8]);
#pragma unroll
    for (int s = 0; s < kPiece / (Split<kTokens>::kSumWarps * kTile); ++s) {
      const int offset = s * Split<kTokens>::kSumWarps * kTile;
      const int left = hidden_ - p * kPiece - offset - sum_warp() * kTile;
      if (left <= 0) break;
      std::uint32_t b[(kTokens8 + 1) / 2][4];  // of 16 tokens; of 8 twice
#pragma unroll
      for (int n = 0; n < (kTokens8 + 1) / 2; ++n) {
        ptx::load_matrices<false>(b[n], x + (n * 16 * kRow + offset) * 2);
        if (left < kTile) b[n][1] = b[n][3] = 0;
      }
#pragma unroll
      for (int m = 0; m < kRows / kTile; ++m) {
        if (m * kTile >= count) break;
        std::uint32_t a[4];
        ptx::load_matrices<false>(a, rows + (m * kTile * kRow + offset) * 2);
        if (left < kTile) a[2] = a[3] = 0;
#pragma unroll
        for (int n = 0; n < kTokens8; ++n) {
          ptx::mma_16x8x16(acc[m][n], a, {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
        }
      }
    }
  }

  Shared<kTokens, kBulk>& shared_;
  const __nv_bfloat16* x_;
  const int tokens_;
  const int hidden_;
  const int warp_ = static_cast<int>(threadIdx.x) / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  int done_ = 0;  // pieces of earlier runs
};

// Positive, or not finite: a row of x with a NaN or an infinity makes every sum non-finite, and
// must reach the later products with all its neurons.
__device__ __forceinline__ bool keeps_active(float value) {
  const int bits = __float_as_int(value);
  return bits != 0 && bits >= static_cast<int>(0xff800000u);
}

// The CTA of a unit of neurons. The gate's values decide which rows of U it reads, so that no list
// beyond its own is needed.
template <int kTokens, bool kBulk>
__device__ __forceinline__ void compute_unit(const DecodeCall& call) {
  auto& shared = *ptx::dynamic_shared<Shared<kTokens, kBulk>>();
  const int thread = threadIdx.x;
  const int unit = blockIdx.x;
  const int first = unit * call.unit_neurons;
  const int exist = min(call.unit_neurons, call.neurons - first);
  const bool gated = call.gate != nullptr;
  const std::size_t hidden = call.hidden;
  const std::size_t offset = first * hidden;  // of the unit's rows
  const auto* deciding = static_cast<const __nv_bfloat16*>(gated ? call.gate : call.up) + offset;
  const auto* up = static_cast<const __nv_bfloat16*>(call.up) + offset;
  const auto* down = static_cast<const __nv_bfloat16*>(call.down) + offset;
  const std::uint32_t row_bytes = call.hidden * 2;

  // While the previous kernel still runs, memory can be read as far as L2, where its writes arrive.
  ptx::let_next_kernel_start();
  if (thread < exist) ptx::prefetch_l2(deciding + thread * hidden, row_bytes);
  if (thread < kMaxDecodeUnit) shared.list[thread] = static_cast<std::uint8_t>(thread);
  if (thread < 2) shared.in_use[thread] = 0;
  if constexpr (kBulk) {
    using All = Shared<kTokens, kBulk>;
    if (thread < All::Ring::kSlots) ptx::mbarrier_init(&shared.filled[thread], 1);
    if (thread < All::FewRows::kSlots) ptx::mbarrier_init(&shared.few_filled[thread], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();

  Multiplier<kTokens, kBulk> products(shared, static_cast<const __nv_bfloat16*>(call.x),
                                      call.tokens, call.hidden);
  products.template run<kMaxDecodeUnit>(deciding, exist);
  for (int i = thread; i < kMaxDecodeUnit * kTokens; i += kThreads) {  // warps as a whole
    const int neuron = i / kTokens;
    const int token = i % kTokens;
    const float sum = products.total(neuron, token);
    const bool active = neuron < exist && token < call.tokens && keeps_active(sum);
    const std::uint32_t g = ptx::pack_relu(sum, 0);
    shared.g[neuron][token] = static_cast<std::uint16_t>(g);
    // Of this thread's neuron and the 8 tokens that it shares with its neighbours.
    const auto vote = [&](bool value) {
      return __ballot_sync(~0u, value) >> (thread % 32 / 8 * 8) & 0xffu;
    };
    const std::uint32_t users = vote(active);
    const std::uint32_t counted = vote(active && !(ptx::low_half(g) <= 0));
    if (users == 0 || thread % 8 != 0) continue;
    atomicOr(&shared.in_use[neuron / 32], 1u << (neuron % 32));
    if (call.activity && counted != 0) atomicAdd(&call.activity[first + neuron], __popc(counted));
  }
  products.let_reuse();
  __syncthreads();

  const std::uint64_t rows = shared.in_use[0] | static_cast<std::uint64_t>(shared.in_use[1]) << 32;
  const int count = __popcll(rows);
  if (thread < kMaxDecodeUnit && (rows >> thread & 1) != 0) {
    const int before = __popcll(rows & ((std::uint64_t{1} << thread) - 1));
    shared.list[before] = static_cast<std::uint8_t>(thread);
    ptx::prefetch_l2(down + thread * hidden, row_bytes);
  }
  if (thread == 0) call.masks[unit] = rows;
  __syncthreads();

  if (gated && count > kTile) {
    products.template run<kMaxDecodeUnit>(up, count);
  } else if (gated && count > 0) {
    products.template run<kTile>(up, count);
  }
  float l1 = 0;
  for (int i = thread; i < count * kTokens; i += kThreads) {
    const int row = i / kTokens;
    const int token = i % kTokens;
    const int neuron = shared.list[row];
    const float g = ptx::low_half(shared.g[neuron][token]);
    const float u = gated ? products.total(row, token) : 1;
    const std::uint32_t packed = token < call.tokens ? ptx::pack(g * u, 0) : 0;
    call.h[static_cast<std::size_t>(first + neuron) * kTokens + token] =
        static_cast<std::uint16_t>(packed);
    l1 += fabsf(ptx::low_half(packed));
  }

  if (!call.activity) return;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) l1 += __shfl_xor_sync(~0u, l1, lanes);
  if (thread % 32 == 0) shared.l1[thread / 32] = l1;
  __syncthreads();
  if (thread == 0) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.l1[w];
    call.partial_l1[unit] = sum;
  }
}

template <int kTokens, bool kBulk>
__global__ void __launch_bounds__(kThreads) hidden_kernel(const DecodeCall call) {
  if constexpr (!kBulk || ptx::kHasBulkCopies) compute_unit<kTokens, kBulk>(call);
}

template <int kTokens, bool kBulk>
Status launch_with(const DecodeCall& call, cudaStream_t stream) {
  // Before it there may be a memset of the counts, which it cannot overlap.
  return launch_kernel(call.overlap && !call.activity, hidden_kernel<kTokens, kBulk>, call.units,
                       kThreads, sizeof(Shared<kTokens, kBulk>), stream, call);
}

template <int kTokens>
Status launch_hidden(const DecodeCall& call, cudaStream_t stream) {
  return call.bulk ? launch_with<kTokens, true>(call, stream)
                   : launch_with<kTokens, false>(call, stream);
}

}  // namespace

Status launch_decode_hidden(const DecodeCall& call, cudaStream_t stream) {
  switch (call.tile_tokens) {
    case 8:
      return launch_hidden<8>(call, stream);
    case 16:
      return launch_hidden<16>(call, stream);
    case 32:
      return launch_hidden<32>(call, stream);
    default:
      return launch_hidden<64>(call, stream);
  }
}

}  // namespace twell::cuda
