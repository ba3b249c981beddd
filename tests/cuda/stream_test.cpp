// The CUDA forward and backward run again and again: the same bits, and in a CUDA graph.

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "backward_call.h"

namespace twell {
namespace {

// What `run` launches on a stream, as a graph.
class Captured {
 public:
  template <class Run>
  explicit Captured(Run&& run) {
    require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    require_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    const Status status = run(stream_);
    require_cuda(cudaStreamEndCapture(stream_, &graph_));
    EXPECT_TRUE(status.ok()) << status.message();
    require_cuda(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  ~Captured() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  // After all that was launched before; waits for the end.
  void replay() const {
    require_cuda(cudaDeviceSynchronize());
    require_cuda(cudaGraphLaunch(executable_, stream_));
    require_cuda(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

class CudaStream : public GpuTest,
                   public ::testing::WithParamInterface<std::tuple<FfnKind, std::int64_t>> {
 protected:
  // run(device) for each.
  template <class Run>
  void on_every_device(Run&& run) {
    for (const Device& device : devices) {
      SCOPED_TRACE("as sm_" + std::to_string(device.compute_capability));
      run(device);
    }
  }

  const FfnKind kind_ = std::get<0>(GetParam());
  const std::int64_t tokens_ = std::get<1>(GetParam());
};

INSTANTIATE_TEST_SUITE_P(FewAndMany, CudaStream,
                         ::testing::Combine(::testing::Values(FfnKind::kGated, FfnKind::kPlain),
                                            ::testing::Values(1, 16, 64, 300, 1500)));

TEST_P(CudaStream, IsBitwiseReproducible) {
  const Block block(kind_, tokens_, 264, 2056, 0.05);
  on_every_device([&](const Device& device) {
    Call call(sparse_plan(block.problem, device), block);
    std::vector<bf16> first_y;
    std::vector<float> first_l1;
    for (int run = 0; run < 20; ++run) {
      call.poison();
      ASSERT_TRUE(call.run().ok());
      const std::vector<bf16> y = call.y.download<bf16>();
      const std::vector<float> l1 = call.l1.download<float>();
      if (run == 0) {
        first_y = y;
        first_l1 = l1;
      }
      EXPECT_EQ(std::memcmp(y.data(), first_y.data(), y.size() * sizeof(bf16)), 0);
      EXPECT_EQ(l1, first_l1);
    }
  });
}

constexpr double kListed = 0.01, kDense = 0.6;  // densities at which a pass has lists or is dense

TEST_P(CudaStream, TrainingReplaysInAGraph) {
  for (const double density : {kListed, kDense}) {
    const TrainingBlock block(kind_, tokens_, 136, 776, density);
    const std::int64_t active = block.active_pairs();
    on_every_device([&](const Device& device) {
      TrainingCall call(training_plan(block.problem, device), block);
      EXPECT_EQ(has_lists(call.forward.plan, active),
                cuda::is_hopper(device) && density == kListed);
      ASSERT_TRUE(call.run().ok());
      const auto want = call.gradients();
      const Captured captured([&](cudaStream_t stream) { return call.run(stream); });
      for (int run = 0; run < 20; ++run) {
        call.poison();
        captured.replay();
        EXPECT_EQ(call.gradients(), want);
        expect_lists(call, active);
      }
    });
  }
}

// One graph for passes with lists and dense ones.
TEST_P(CudaStream, TrainingReplaysInAGraphWithChangingInputs) {
  const TrainingBlock listed(kind_, tokens_, 136, 776, kListed);
  const TrainingBlock dense(kind_, tokens_, 136, 776, kDense);
  on_every_device([&](const Device& device) {
    const FfnPlan plan = training_plan(listed.problem, device);
    TrainingCall call(plan, listed);
    const Captured captured([&](cudaStream_t stream) { return call.run(stream); });
    for (const TrainingBlock* block : {&listed, &dense, &listed}) {
      TrainingCall uncaptured(plan, *block);
      ASSERT_TRUE(uncaptured.run().ok());
      call.upload(*block);
      call.poison();
      captured.replay();
      EXPECT_EQ(call.forward.y.download<std::uint16_t>(),
                uncaptured.forward.y.download<std::uint16_t>());
      EXPECT_EQ(call.gradients(), uncaptured.gradients());
    }
  });
}

TEST_P(CudaStream, ReplaysInAGraphWithChangingInputs) {
  const Block sparse(kind_, tokens_, 136, 776, 0.01);
  const Block dense(kind_, tokens_, 136, 776, 0.6);
  const std::vector<double> want_sparse = sparse.output(), want_dense = dense.output();
  on_every_device([&](const Device& device) {
    Call call(sparse_plan(sparse.problem, device), sparse);
    const Captured captured([&](cudaStream_t stream) { return call.run(stream); });
    for (const Block* block : {&sparse, &dense, &sparse}) {
      call.upload(*block);
      call.poison();
      captured.replay();
      EXPECT_LE(relative_error(call.y.download<bf16>(), block == &dense ? want_dense : want_sparse),
                kManyTolerance);
    }
  });
}

// Kernels that start before the previous one ends, behind a copy and behind each other: each layer
// reads what the one before it wrote, in the same workspace.
TEST_P(CudaStream, LayersFollowEachOtherInAGraph) {
  constexpr int kLayers = 6;
  const Block block(kind_, tokens_, 264, 2056, 0.05);
  on_every_device([&](const Device& device) {
    Call call(sparse_plan(block.problem, device), block);
    const DeviceBuffer source(block.x);
    const std::size_t bytes = block.x.size() * sizeof(bf16);
    const auto run = [&](cudaStream_t stream, bool wait) {
      require_cuda(
          cudaMemcpyAsync(call.x.as(), source.as(), bytes, cudaMemcpyDeviceToDevice, stream));
      for (int layer = 0; layer < kLayers; ++layer) {
        FfnForwardArgs args;
        args.x = layer % 2 == 0 ? call.x.as() : call.y.as();
        args.weights = call.weights();
        args.y = layer % 2 == 0 ? call.y.as() : call.x.as();
        args.workspace = call.workspace.as();
        args.stream = stream;
        const Status status = ffn_forward(call.plan, args);
        if (!status.ok()) return status;
        if (wait) require_cuda(cudaDeviceSynchronize());
      }
      return Status();
    };
    ASSERT_TRUE(run(nullptr, true).ok());
    const auto want = call.x.download<std::uint16_t>();
    const Captured captured([&](cudaStream_t stream) { return run(stream, false); });
    for (int repeat = 0; repeat < 20; ++repeat) {
      call.workspace.poison();
      captured.replay();
      EXPECT_EQ(call.x.download<std::uint16_t>(), want);
    }
  });
}

}  // namespace
}  // namespace twell
