// The gate projection of a chunk on Hopper: a persistent, warp-specialised GEMM of 128 tokens by a
// region of 256 or, for few tiles, 128 neurons, that keeps only the columns that some token of a
// half tile uses. Each of the two consumer warpgroups owns one half (64 tokens). A finished half is
// packed to bf16 in registers and stored under the products of the next one.

#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/products.h"
#include "cuda/tensor_map.h"

namespace twell::cuda::sm90 {
namespace {

struct Config {
  static constexpr int kCluster = 2;  // two token tiles share each region of neurons
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kBand = 8;  // clusters down the tokens before the next region
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};

template <int kRegion>
struct alignas(1024) Shared {
  static constexpr int kStages = kRegion == kBlockNeurons ? 4 : 6;
  static constexpr int kStageBytes = (kTileTokens + kRegion) * kTileHidden * 2;

  __nv_bfloat16 x[kStages][kTileTokens * kTileHidden];
  __nv_bfloat16 weight[kStages][kRegion * kTileHidden];
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  // [turn, half, warp]: the columns that the warp's 16 tokens use
  alignas(16) std::uint32_t masks[2][Config::kConsumers][4][kMaskWords];
};

// The piece of work `item` of a cluster: a pair of token tiles and a region of neurons. Bands of
// pairs go over all regions in turn, so that both operands are read again from L2.
struct Piece {
  int pair;
  int region;

  __device__ Piece(int item, int pairs, int regions) {
    const int band = item / (Config::kBand * regions);
    const int height = min(Config::kBand, pairs - band * Config::kBand);
    const int rest = item - band * Config::kBand * regions;
    region = rest / height;
    pair = band * Config::kBand + rest - region * height;
  }
};

template <int kRegion>
__device__ __forceinline__ int count_regions(const ForwardChunk& chunk) {
  return chunk.blocks * (kBlockNeurons / kRegion);
}

// A row of x with a NaN or an infinity makes every sum of its row non-finite, and must reach the
// later products with all its neurons.
__device__ __forceinline__ bool is_finite(float value) {
  return fabsf(value) < __int_as_float(0x7f800000);
}

template <int kRegion>
__device__ __forceinline__ void produce(Shared<kRegion>& shared, const ForwardChunk& chunk,
                                        const CUtensorMap& x_map, const CUtensorMap& weight_map,
                                        int first_token, int clusters) {
  const int rank = static_cast<int>(ptx::cluster_cta_rank());
  const int pairs = (chunk.tiles + 1) / 2;
  const int regions = count_regions<kRegion>(chunk);
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  constexpr int kShare = kRegion / Config::kCluster;
  Ring<Shared<kRegion>::kStages> ring;
#pragma unroll 1
  for (int item = blockIdx.x / Config::kCluster; item < pairs * regions; item += clusters) {
    const Piece piece(item, pairs, regions);
    const int token = first_token + (piece.pair * Config::kCluster + rank) * kTileTokens;
    const int neuron = piece.region * kRegion + rank * kShare;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(&shared.full[stage], shared.kStageBytes);
      ptx::tma_load(shared.x[stage], &x_map, &shared.full[stage], step * kTileHidden, token);
      ptx::tma_load_multicast(shared.weight[stage] + rank * kShare * kTileHidden, &weight_map,
                              &shared.full[stage], step * kTileHidden, neuron,
                              (1 << Config::kCluster) - 1);
    }
  }
}

// A half tile whose products are done: the columns that some of its tokens use are stored part by
// part, each part under a stage of the next products.
template <int kRegion>
class Columns {
 public:
  static constexpr int kStores = 8;
  static constexpr int kParts = 2 + kStores;

  __device__ __forceinline__ void take(const float (&acc)[kRegion / 2], int half_tile, int region) {
    half_tile_ = half_tile;
    region_ = region;
    finite_ = is_finite(acc[0]) && is_finite(acc[2]);
#pragma unroll
    for (int i = 0; i < kRegion / 4; ++i) {
      const float* values = acc + 4 * (i / 2) + i % 2;
      values_[i] = ptx::pack_relu(values[0], values[2]);
    }
  }

  // All threads of the warpgroup call, for each part in turn.
  template <int kPart>
  __device__ __forceinline__ void store(std::uint32_t (&warp_masks)[4][kMaskWords],
                                        const ForwardChunk& chunk, int consumer) {
    if (half_tile_ < 0) return;
    if constexpr (kPart == 0) {
      find_used(warp_masks, chunk);
    } else if constexpr (kPart == 1) {
      ptx::named_barrier_sync(1 + consumer, 128);
      count(warp_masks, chunk);
    } else if (half_tile_ < 2 * chunk.tiles) {
      store_groups<kPart - 2>(chunk);
    }
  }

 private:
  static constexpr int kAllGroups = kRegion / 8;  // of 8 columns
  static constexpr int kGroups = kAllGroups / kStores;

  // Which columns the warp's 16 tokens use.
  __device__ __forceinline__ void find_used(std::uint32_t (&warp_masks)[4][kMaskWords],
                                            const ForwardChunk& chunk) const {
    std::uint32_t used[2] = {0, 0};  // bit j: column 8 j + 2 quad + parity
    if (!finite_) used[0] = used[1] = ~0u;
#pragma unroll
    for (int j = 0; j < kAllGroups; ++j) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        if ((values_[2 * j + parity] & 0x7fff7fffu) != 0) used[parity] |= 1u << j;
      }
    }
    const int groups = min(max(0, chunk.neurons / 8 - region_ * kAllGroups), kAllGroups);
    const std::uint32_t exists = groups == 32 ? ~0u : (1u << groups) - 1;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      used[parity] &= exists;
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        used[parity] |= __shfl_xor_sync(~0u, used[parity], lanes);
      }
    }
    if (threadIdx.x % 32 < 4) {
      *reinterpret_cast<uint2*>(&warp_masks[threadIdx.x / 32 % 4][2 * (threadIdx.x % 4)]) =
          make_uint2(used[0], used[1]);
    }
  }

  // Lane j looks after the columns 8 j to 8 j + 7: which are used, and how many are before them.
  __device__ __forceinline__ void count(const std::uint32_t (&warp_masks)[4][kMaskWords],
                                        const ForwardChunk& chunk) {
    const int lane = threadIdx.x % 32;
    std::uint32_t words[kMaskWords] = {};
#pragma unroll
    for (int i = 0; i < 4 * kMaskWords; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(&warp_masks[0][0] + i);
      words[i % kMaskWords] |= four.x;
      words[i % kMaskWords + 1] |= four.y;
      words[i % kMaskWords + 2] |= four.z;
      words[i % kMaskWords + 3] |= four.w;
    }
    std::uint32_t mine = 0;
    int before = 0;
#pragma unroll
    for (int w = 0; w < kMaskWords; ++w) {
      mine |= ((words[w] >> lane) & 1u) << w;
      before += __popc(words[w] & ((1u << lane) - 1));
    }
    if (half_tile_ < 2 * chunk.tiles && threadIdx.x / 32 % 4 == 0 && lane < kAllGroups) {
      reinterpret_cast<std::uint8_t*>(chunk.masks)[place(chunk) * kAllGroups + lane] =
          static_cast<std::uint8_t>(mine);
    }
    groups_ = mine | static_cast<std::uint32_t>(before) << 8;
  }

  template <int kStore>
  __device__ __forceinline__ void store_groups(const ForwardChunk& chunk) const {
    const int quad = threadIdx.x % 4;
    const int word = threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;
    std::uint32_t* out = chunk.columns + place(chunk) * kRegion * kColumnWords + word;
    std::uint32_t groups[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      groups[i] = __shfl_sync(~0u, groups_, kStore * kGroups + i);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if ((groups[i] & 0xffu) == 0) continue;
      const std::uint32_t* values = values_ + 2 * (kStore * kGroups + i);
      const std::uint32_t pair = groups[i] >> (2 * quad);
      const int rank = (groups[i] >> 8) + __popc(groups[i] & ((1u << (2 * quad)) - 1));
      std::uint32_t* column = out + rank * kColumnWords;
      if (pair & 1u) {
        *column = values[0];
        column += kColumnWords;
      }
      if (pair & 2u) *column = values[1];
    }
  }

  __device__ __forceinline__ std::size_t place(const ForwardChunk& chunk) const {
    return static_cast<std::size_t>(half_tile_) * count_regions<kRegion>(chunk) + region_;
  }

  int half_tile_ = -1;  // none
  int region_;
  bool finite_;           // the sums of this thread's two tokens
  std::uint32_t groups_;  // a bit for each of the lane's columns; from bit 8 on how many are before
  std::uint32_t values_[kRegion / 4];  // [2 j + parity]: column 8 j + 2 quad + parity
};

template <int kParts, int kPart = 0, class Do>
__device__ __forceinline__ void for_each_part(Do&& make) {
  if constexpr (kPart < kParts) {
    make.template operator()<kPart>();
    for_each_part<kParts, kPart + 1>(make);
  }
}

template <int kRegion>
__device__ __forceinline__ void consume(Shared<kRegion>& shared, const ForwardChunk& chunk,
                                        int consumer, int clusters) {
  constexpr int kParts = Columns<kRegion>::kParts;
  const int rank = static_cast<int>(ptx::cluster_cta_rank());
  const int lane = threadIdx.x % 32;
  const int pairs = (chunk.tiles + 1) / 2;
  const int regions = count_regions<kRegion>(chunk);
  const int items = pairs * regions;
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  const auto x = [&](int stage) { return shared.x[stage] + consumer * kHalfTokens * kTileHidden; };
  const auto weight = [&](int stage) { return shared.weight[stage]; };
  const auto release = [&](int stage) {
    if (lane < Config::kCluster) ptx::mbarrier_arrive_cluster(&shared.empty[stage], lane);
  };
  float acc[kRegion / 2];
  Columns<kRegion> columns;
  Ring<Shared<kRegion>::kStages> ring;
  int turn = 0;
#pragma unroll 1
  for (int item = blockIdx.x / Config::kCluster;; item += clusters, turn ^= 1) {
    std::uint32_t(&masks)[4][kMaskWords] = shared.masks[turn][consumer];
    const bool exists = item < items;
    const bool beside = exists && steps >= kParts;
#pragma unroll
    for (float& value : acc) value = 0;
    if (beside) {
      for_each_part<kParts>([&]<int kPart>() {
        start_stage<kRegion, ptx::Major::kInner, ptx::Major::kInner, Filler::kTma>(
            acc, ring, shared.full, x, weight);
        columns.template store<kPart>(masks, chunk, consumer);
        finish_stage(ring, release);
      });
    } else {
      for_each_part<kParts>(
          [&]<int kPart>() { columns.template store<kPart>(masks, chunk, consumer); });
    }
    if (!exists) return;
    accumulate<kRegion, ptx::Major::kInner, ptx::Major::kInner, Filler::kTma>(
        acc, ring, beside ? steps - kParts : steps, shared.full, x, weight, release);
    const Piece piece(item, pairs, regions);
    const int tile = piece.pair * Config::kCluster + rank;
    columns.take(acc, 2 * tile + consumer, piece.region);
  }
}

template <int kRegion>
__global__ void __cluster_dims__(Config::kCluster) __launch_bounds__(Config::kThreads, 1)
    gate_kernel(const ForwardChunk chunk, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap weight_map, int first_token) {
  extern __shared__ std::uint8_t raw[];
  auto& shared = aligned_shared<Shared<kRegion>>(raw);
  const int clusters = gridDim.x / Config::kCluster;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < shared.kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], Config::kCluster * Config::kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
    if (blockIdx.x == 0) chunk.schedule->finished = 0;
  }
  ptx::cluster_sync();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::register_decrease<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce(shared, chunk, x_map, weight_map, first_token, clusters);
  } else {
    ptx::register_increase<Config::kConsumerRegisters>();
    consume(shared, chunk, warpgroup - 1, clusters);
  }
  __syncwarp();
  ptx::cluster_sync();  // the other CTA may still write to, or arrive at, this one's memory
}

template <int kRegion>
Status launch_regions(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                      int multiprocessors, cudaStream_t stream) {
  CUtensorMap x_map, gate_map;
  if (Status status = make_tensor_map(x_map, x.x, x.rows, chunk.hidden, kTileTokens);
      !status.ok()) {
    return status;
  }
  if (Status status =
          make_tensor_map(gate_map, gate, chunk.neurons, chunk.hidden, kRegion / Config::kCluster);
      !status.ok()) {
    return status;
  }
  const int items = ceil_div(chunk.tiles, 2) * chunk.blocks * (kBlockNeurons / kRegion);
  const int clusters = std::min(items, multiprocessors / Config::kCluster);
  return launch(gate_kernel<kRegion>, clusters * Config::kCluster, Config::kThreads,
                sizeof(Shared<kRegion>) + alignof(Shared<kRegion>), stream, chunk, x_map, gate_map,
                x.first);
}

}  // namespace

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream) {
  return chunk.region == kBlockNeurons
             ? launch_regions<kBlockNeurons>(chunk, x, gate, multiprocessors, stream)
             : launch_regions<kSmallRegion>(chunk, x, gate, multiprocessors, stream);
}

}  // namespace twell::cuda::sm90
