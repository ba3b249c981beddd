// The simulator itself: the tensor cores' layouts against plain products, and that it notices
// mistakes. The kernels here are host code from the start.

#include "simulator.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "twell/types.h"

namespace cuda_sim {
namespace {

namespace ptx = twell::cuda::ptx;
using twell::bf16;
using twell::to_float;

cudaError_t run_block(int threads, std::size_t shared_bytes, const std::function<void()>& thread) {
  return run({1, 1, 1}, dim3(threads), shared_bytes, thread);
}

std::vector<bf16> random_matrix(int rows, int columns) {
  std::mt19937 random(rows * 100 + columns);
  std::uniform_int_distribution<int> small(-8, 8);
  std::vector<bf16> out(rows * columns);
  for (bf16& value : out) value = twell::to_bf16(static_cast<float>(small(random)));
  return out;
}

// c = a b of a [16, 16] and b [16, 8], the operands in shared memory with the summed dimension
// contiguous or not; small integers, so that every sum is exact.
void check_product(bool transposed) {
  const std::vector<bf16> a = random_matrix(16, 16), b = random_matrix(16, 16);
  std::vector<float> c(16 * 16, -1);
  const cudaError_t error = run_block(32, 1024, [&] {
    const int lane = threadIdx.x;
    auto* shared = ptx::dynamic_shared<bf16>();
    for (int i = lane; i < 256; i += 32) {
      const int row = i / 16, column = i % 16;
      shared[transposed ? column * 16 + row : i] = a[i];
      shared[256 + (transposed ? i : column * 16 + row)] = b[i];
    }
    __syncthreads();
    const int r = lane % 8, m = lane / 8;
    std::uint32_t left[4], right[4];
    const auto load = [&](auto& registers, int base, int outer, int inner) {
      const int row = (transposed ? inner : outer) + r;
      const std::uint32_t address = (base + row * 16 + (transposed ? outer : inner)) * 2;
      if (transposed) {
        ptx::load_matrices<true>(registers, address);
      } else {
        ptx::load_matrices<false>(registers, address);
      }
    };
    load(left, 0, m % 2 * 8, m / 2 * 8);
    load(right, 256, m / 2 * 8, m % 2 * 8);
    for (int half = 0; half < 2; ++half) {
      float sums[4] = {};
      ptx::mma_16x8x16(sums, left, {right[2 * half], right[2 * half + 1]});
      for (int i = 0; i < 4; ++i) {
        c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sums[i];
      }
    }
  });
  ASSERT_EQ(error, cudaSuccess) << last_fault();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float want = 0;
      for (int k = 0; k < 16; ++k) want += to_float(a[row * 16 + k]) * to_float(b[k * 16 + column]);
      EXPECT_EQ(c[row * 16 + column], want) << row << ", " << column;
    }
  }
}

TEST(CudaSim, MultipliesFragments) {
  check_product(false);
  check_product(true);
}

TEST(CudaSim, ShufflesAndVotes) {
  std::vector<int> up(32), across(32), from(32);
  std::uint32_t votes = 0;
  const cudaError_t error = run_block(32, 0, [&] {
    const int lane = threadIdx.x;
    up[lane] = __shfl_up_sync(~0u, lane, 3, 8);
    across[lane] = __shfl_xor_sync(~0u, lane, 5);
    from[lane] = __shfl_sync(~0u, lane, 7);
    votes = __ballot_sync(~0u, lane % 3 == 0);
  });
  ASSERT_EQ(error, cudaSuccess) << last_fault();
  EXPECT_EQ(votes, 0x49249249u);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(up[lane], lane % 8 >= 3 ? lane - 3 : lane);
    EXPECT_EQ(across[lane], lane ^ 5);
    EXPECT_EQ(from[lane], 7);
  }
}

TEST(CudaSim, ConvertsAsPtx) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(ptx::pack(1.0f, -2.0f), 0xC0003F80u);
  EXPECT_EQ(ptx::pack_relu(-1.0f, nan), 0x7FFF0000u);
  EXPECT_TRUE(std::isnan(ptx::max_nan(1.0f, nan)));
}

void expect_fault(const cudaError_t error, const std::string& what) {
  EXPECT_EQ(error, cudaErrorLaunchFailure);
  EXPECT_NE(last_fault().find(what), std::string::npos) << last_fault();
  EXPECT_EQ(run_block(32, 0, [] {}), cudaErrorLaunchFailure);
  recover();
}

TEST(CudaSim, NoticesThreadsThatDoNotMeet) {
  expect_fault(run_block(64, 0,
                         [] {
                           if (threadIdx.x < 32) __shfl_xor_sync(~0u, 1, 1 + threadIdx.x % 2);
                           if (threadIdx.x == 40) __shfl_xor_sync(~0u, 1, 1);
                         }),
               "thread 40 waits for ever at __shfl_xor_sync");
  expect_fault(run_block(32, 0,
                         [] {
                           if (threadIdx.x % 2 == 0) {
                             __shfl_xor_sync(~0u, 1, 2);
                           } else {
                             __ballot_sync(~0u, true);
                           }
                         }),
               "other lanes of its warp at");
  std::vector<int> order;
  EXPECT_EQ(run_block(64, 0, [&] { order.push_back(threadIdx.x); }), cudaSuccess);
  EXPECT_EQ(order.size(), 64u) << "a launch after a fault runs every thread";
}

TEST(CudaSim, NoticesSharedMemoryThatIsNotTheBlocks) {
  expect_fault(run_block(32, 64, [] { ptx::dynamic_shared<char>()[64 + threadIdx.x] = 0; }),
               "it wrote behind its dynamic shared memory of 64 bytes");
  expect_fault(run_block(32, 64,
                         [] {
                           std::uint32_t registers[4];
                           ptx::load_matrices<false>(registers, threadIdx.x * 16);
                         }),
               "shared address 64 for 16 bytes");
  EXPECT_EQ(run_block(32, kMaxShared + 1, [] {}), cudaErrorInvalidConfiguration);
}

void no_kernel() {}

TEST(CudaSim, NoticesALimitOfSharedMemoryThatChanges) {
  const auto limit = [](int bytes) {
    return cudaFuncSetAttribute(no_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  EXPECT_EQ(limit(kMaxShared + 1), cudaErrorInvalidValue);
  EXPECT_EQ(limit(4096), cudaSuccess);
  EXPECT_EQ(limit(4096), cudaSuccess);
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = {1, 1, 1};
  config.dynamicSmemBytes = 4096;
  EXPECT_EQ(cudaLaunchKernelEx(&config, no_kernel), cudaSuccess);
  config.dynamicSmemBytes = 4097;
  EXPECT_EQ(cudaLaunchKernelEx(&config, no_kernel), cudaErrorInvalidValue);
  expect_fault(limit(2048), "limit of shared memory was 4096 bytes and was set to 2048");
}

// A ring of two stages, of which the thread's neighbour reads each. `pending` and `barrier` are
// what a correct kernel needs: 0 and true.
template <int kPending>
std::vector<std::uint32_t> through_shared(const std::vector<uint4>& source, bool barrier) {
  std::vector<std::uint32_t> got;
  const cudaError_t error = run_block(64, 64 * 16, [&] {
    const std::uint32_t address = threadIdx.x * 16;
    ptx::copy_async_16(address, &source[threadIdx.x], true);
    ptx::copy_async_commit();
    ptx::copy_async_wait<kPending>();
    if (barrier) __syncthreads();
    got.push_back(ptx::dynamic_shared<std::uint32_t>()[(threadIdx.x ^ 1) * 4]);
    ptx::copy_async_wait<0>();
  });
  EXPECT_EQ(error, cudaSuccess) << last_fault();
  std::sort(got.begin(), got.end());
  return got;
}

TEST(CudaSim, ShowsAMissingWaitOrBarrier) {
  std::vector<uint4> source(64);
  std::vector<std::uint32_t> want(64);
  for (unsigned i = 0; i < 64; ++i) source[i].x = want[i] = i;
  EXPECT_EQ(through_shared<0>(source, true), want);
  EXPECT_NE(through_shared<0>(source, false), want);
  if (!settings.early_copies) {
    EXPECT_NE(through_shared<1>(source, true), want);
  }
  expect_fault(run_block(32, 512,
                         [&] {
                           ptx::copy_async_16(threadIdx.x * 16, &source[0], true);
                           ptx::copy_async_commit();
                         }),
               "without waiting for its asynchronous copies");
}

TEST(CudaSim, PoisonsSharedMemoryBeforeEveryBlock) {
  int stale = 0;
  const cudaError_t error = run({3, 1, 1}, dim3(32), 128, [&] {
    __shared__ std::uint32_t fixed[32];
    auto* dynamic = ptx::dynamic_shared<std::uint32_t>();
    stale += fixed[threadIdx.x] != ~0u || dynamic[threadIdx.x] != ~0u;
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 0;
  });
  ASSERT_EQ(error, cudaSuccess) << last_fault();
  EXPECT_EQ(stale, 0);
}

}  // namespace
}  // namespace cuda_sim
