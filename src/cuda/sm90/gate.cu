// The gate projection of a chunk on Hopper: a persistent, warp-specialised GEMM of 128 x 256
// tiles whose epilogue keeps only the columns that some token of a half tile uses. Each of the
// two consumer warpgroups owns one half (64 tokens) and never waits for the other, so that the
// epilogue of one runs under the products of the other.

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
  static constexpr int kStages = 4;
  static constexpr int kCluster = 2;  // two token tiles share each block of neurons
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kBand = 8;  // clusters down the tokens before the next neuron block
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kStageBytes = (kTileTokens + kBlockNeurons) * kTileHidden * 2;
};

struct alignas(1024) Shared {
  __nv_bfloat16 x[Config::kStages][kTileTokens * kTileHidden];
  __nv_bfloat16 weight[Config::kStages][kBlockNeurons * kTileHidden];
  std::uint64_t full[Config::kStages];
  std::uint64_t empty[Config::kStages];
  // [turn, half, warp]: the columns that the warp's 16 tokens use
  alignas(16) std::uint32_t masks[2][Config::kConsumers][4][kMaskWords];
};

// The piece of work `item` of a cluster: a pair of token tiles and a block of neurons. Bands of
// pairs go over all blocks in turn, so that both operands are read again from L2.
struct Piece {
  int pair;
  int block;

  __device__ Piece(int item, int pairs, int blocks) {
    const int band = item / (Config::kBand * blocks);
    const int height = min(Config::kBand, pairs - band * Config::kBand);
    const int rest = item - band * Config::kBand * blocks;
    block = rest / height;
    pair = band * Config::kBand + rest - block * height;
  }
};

// A row of x with a NaN or an infinity makes every sum of its row non-finite, and must reach the
// later products with all its neurons.
__device__ __forceinline__ bool is_finite(float value) {
  return fabsf(value) < __int_as_float(0x7f800000);
}

__device__ __forceinline__ void produce(Shared& shared, const ForwardChunk& chunk,
                                        const CUtensorMap& x_map, const CUtensorMap& weight_map,
                                        int first_token, int clusters) {
  const int rank = static_cast<int>(ptx::cluster_cta_rank());
  const int pairs = (chunk.tiles + 1) / 2;
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  constexpr int kShare = kBlockNeurons / Config::kCluster;
  Ring<Config::kStages> ring;
#pragma unroll 1
  for (int item = blockIdx.x / Config::kCluster; item < pairs * chunk.blocks; item += clusters) {
    const Piece piece(item, pairs, chunk.blocks);
    const int token = first_token + (piece.pair * Config::kCluster + rank) * kTileTokens;
    const int neuron = piece.block * kBlockNeurons + rank * kShare;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      ptx::mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(&shared.full[stage], Config::kStageBytes);
      ptx::tma_load(shared.x[stage], &x_map, &shared.full[stage], step * kTileHidden, token);
      ptx::tma_load_multicast(shared.weight[stage] + rank * kShare * kTileHidden, &weight_map,
                              &shared.full[stage], step * kTileHidden, neuron,
                              (1 << Config::kCluster) - 1);
    }
  }
}

// Stores the columns of this warpgroup's half that any of its tokens uses.
__device__ __forceinline__ void store_columns(const float (&acc)[kBlockNeurons / 2],
                                              std::uint32_t (&warp_masks)[4][kMaskWords],
                                              const ForwardChunk& chunk, int half_tile, int block,
                                              int consumer) {
  const int warp = threadIdx.x / 32 % 4;
  const int row = threadIdx.x % 32 / 4;
  const int quad = threadIdx.x % 4;

  std::uint32_t used[2] = {0, 0};  // bit j: column 8 j + 2 quad + parity
  if (!is_finite(acc[0]) || !is_finite(acc[2])) used[0] = used[1] = ~0u;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      // Not <=: a NaN counts as active.
      if (!(ptx::max_nan(acc[4 * j + parity], acc[4 * j + 2 + parity]) <= 0)) {
        used[parity] |= 1u << j;
      }
    }
  }
  const int groups = (chunk.neurons - block * kBlockNeurons) / 8;
  const std::uint32_t exists = groups >= 32 ? ~0u : (1u << groups) - 1;
#pragma unroll
  for (int parity = 0; parity < 2; ++parity) {
    used[parity] &= exists;
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      used[parity] |= __shfl_xor_sync(~0u, used[parity], lanes);
    }
  }
  if (row == 0) {
    *reinterpret_cast<uint2*>(&warp_masks[warp][2 * quad]) = make_uint2(used[0], used[1]);
  }
  ptx::named_barrier_sync(1 + consumer, 128);

  // Lane j looks after the columns 8 j to 8 j + 7: which are used, and how many are before them.
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
  if (half_tile >= 2 * chunk.tiles) return;
  const std::size_t place = static_cast<std::size_t>(half_tile) * chunk.blocks + block;
  if (warp == 0) {
    reinterpret_cast<std::uint8_t*>(chunk.masks + place * kMaskWords)[lane] =
        static_cast<std::uint8_t>(mine);
  }
  mine |= static_cast<std::uint32_t>(before) << 8;

  std::uint32_t* out = chunk.columns + place * kBlockNeurons * kColumnWords + warp * 8 + row;
  constexpr int kBatch = 8;
#pragma unroll
  for (int first = 0; first < 32; first += kBatch) {
    std::uint32_t groups[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) groups[i] = __shfl_sync(~0u, mine, first + i);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if ((groups[i] & 0xffu) == 0) continue;
      const float* values = acc + 4 * (first + i);
      const std::uint32_t pair = groups[i] >> (2 * quad);
      const int rank = (groups[i] >> 8) + __popc(groups[i] & ((1u << (2 * quad)) - 1));
      std::uint32_t* column = out + rank * kColumnWords;
      if (pair & 1u) {
        *column = ptx::pack_relu(values[0], values[2]);
        column += kColumnWords;
      }
      if (pair & 2u) *column = ptx::pack_relu(values[1], values[3]);
    }
  }
}

__device__ __forceinline__ void consume(Shared& shared, const ForwardChunk& chunk, int consumer,
                                        int clusters) {
  const int rank = static_cast<int>(ptx::cluster_cta_rank());
  const int lane = threadIdx.x % 32;
  const int pairs = (chunk.tiles + 1) / 2;
  const int steps = ceil_div(chunk.hidden, kTileHidden);
  float acc[kBlockNeurons / 2];
  Ring<Config::kStages> ring;
  int turn = 0;
#pragma unroll 1
  for (int item = blockIdx.x / Config::kCluster; item < pairs * chunk.blocks;
       item += clusters, turn ^= 1) {
    const Piece piece(item, pairs, chunk.blocks);
    multiply<kBlockNeurons, ptx::Major::kInner, ptx::Major::kInner, Filler::kTma>(
        acc, ring, steps, shared.full,
        [&](int stage) { return shared.x[stage] + consumer * kHalfTokens * kTileHidden; },
        [&](int stage) { return shared.weight[stage]; },
        [&](int stage) {
          if (lane < Config::kCluster) ptx::mbarrier_arrive_cluster(&shared.empty[stage], lane);
        });
    const int tile = piece.pair * Config::kCluster + rank;
    store_columns(acc, shared.masks[turn][consumer], chunk, 2 * tile + consumer, piece.block,
                  consumer);
  }
}

__global__ void __cluster_dims__(Config::kCluster) __launch_bounds__(Config::kThreads, 1)
    gate_kernel(const ForwardChunk chunk, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap weight_map, int first_token) {
  extern __shared__ std::uint8_t raw[];
  Shared& shared = aligned_shared<Shared>(raw);
  const int clusters = gridDim.x / Config::kCluster;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
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

}  // namespace

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream) {
  CUtensorMap x_map, gate_map;
  if (Status status = make_tensor_map(x_map, x.x, x.rows, chunk.hidden, kTileTokens);
      !status.ok()) {
    return status;
  }
  if (Status status = make_tensor_map(gate_map, gate, chunk.neurons, chunk.hidden,
                                      kBlockNeurons / Config::kCluster);
      !status.ok()) {
    return status;
  }
  const int items = ceil_div(chunk.tiles, 2) * chunk.blocks;
  const int clusters = std::min(items, multiprocessors / Config::kCluster);
  return launch(gate_kernel, clusters * Config::kCluster, Config::kThreads,
                sizeof(Shared) + alignof(Shared), stream, chunk, x_map, gate_map, x.first);
}

}  // namespace twell::cuda::sm90
