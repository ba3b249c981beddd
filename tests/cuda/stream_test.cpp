// The CUDA forward and backward run again and again: the same bits, and in a CUDA graph.

#include <gtest/gtest.h>

#include <cstring>
#include <string>
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

class CudaStream : public GpuTest, public ::testing::WithParamInterface<int> {
 protected:
  // run(device) for each.
  template <class Run>
  void on_every_device(Run&& run) {
    for (const Device& device : devices) {
      SCOPED_TRACE("as sm_" + std::to_string(device.compute_capability));
      run(device);
    }
  }
};

INSTANTIATE_TEST_SUITE_P(FewAndMany, CudaStream, ::testing::Values(1, 16, 64, 300, 1500));

TEST_P(CudaStream, IsBitwiseReproducible) {
  const Block block(FfnKind::kGated, GetParam(), 264, 2056, 0.05);
  on_every_device([&](const Device& device) {
    Call call(sparse_plan(block.problem, device), block);
    std::vector<bf16> first_y;
    std::vector<float> first_l1;
    for (int run = 0; run < 20; ++run) {
      call.y.poison();
      call.workspace.poison();
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

TEST_P(CudaStream, TrainingReplaysInAGraph) {
  const TrainingBlock block(FfnKind::kGated, GetParam(), 136, 776, 0.05);
  on_every_device([&](const Device& device) {
    TrainingCall call(training_plan(block.problem, device), block);
    ASSERT_TRUE(call.run().ok());
    const auto want = call.gradients();
    const Captured captured([&](cudaStream_t stream) { return call.run(stream); });
    for (int run = 0; run < 20; ++run) {
      for (DeviceBuffer* buffer : {&call.grad_x, &call.grad_gate, &call.grad_up, &call.grad_down,
                                   &call.saved, &call.workspace, &call.forward.workspace}) {
        buffer->poison();
      }
      captured.replay();
      EXPECT_EQ(call.gradients(), want);
    }
  });
}

TEST_P(CudaStream, ReplaysInAGraphWithChangingInputs) {
  const Block sparse(FfnKind::kGated, GetParam(), 136, 776, 0.01);
  const Block dense(FfnKind::kGated, GetParam(), 136, 776, 0.6);
  on_every_device([&](const Device& device) {
    Call call(sparse_plan(sparse.problem, device), sparse);
    const Captured captured([&](cudaStream_t stream) { return call.run(stream); });
    for (const Block* block : {&sparse, &dense, &sparse}) {
      call.x.upload(block->x);
      call.gate.upload(block->gate);
      call.up.upload(block->up);
      call.down.upload(block->down);
      call.y.poison();
      captured.replay();
      EXPECT_LE(relative_error(call.y.download<bf16>(), block->output()), 0.0027);
    }
  });
}

// Kernels that start before the previous one ends, behind a copy and behind each other: each layer
// reads what the one before it wrote, in the same workspace.
TEST_P(CudaStream, LayersFollowEachOtherInAGraph) {
  constexpr int kLayers = 6;
  const Block block(FfnKind::kGated, GetParam(), 264, 2056, 0.05);
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
        args.weights = {call.gate.as(), call.up.as(), call.down.as()};
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
