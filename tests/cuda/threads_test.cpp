// Two models at once: two threads, each with a stream, weights, plans and workspaces of its own.

#include <gtest/gtest.h>

#include <array>
#include <barrier>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "backward_call.h"
#include "gate_pack_call.h"

namespace twell {
namespace {

// A model's calls: a training step, a forward of few tokens, and gate-and-packs.
class Model {
 public:
  using Bits = std::vector<std::vector<std::uint16_t>>;

  Model(const Device& device, FfnKind kind, std::int64_t tokens, std::int64_t few_tokens,
        std::int64_t hidden, std::int64_t neurons, int slots)
      : training_(training(device, TrainingBlock(kind, tokens, hidden, neurons, 0.02))),
        few_(few(device, Block(kind, few_tokens, hidden, neurons, 0.02))),
        pack_(device, Block(FfnKind::kGated, tokens, hidden, neurons, 0.02), slots) {
    require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model() { cudaStreamDestroy(stream_); }

  // All that they write.
  Bits run() {
    training_.poison(stream_);
    few_.poison(stream_);
    pack_.poison(stream_);
    expect_ok(training_.run(stream_));
    expect_ok(few_.run(stream_));
    for (int i = 0; i < kPacks; ++i) expect_ok(pack_.run(stream_));
    require_cuda(cudaStreamSynchronize(stream_));
    Bits bits = training_.gradients();
    for (const Call* call : {&training_.forward, &few_}) {
      for (const DeviceBuffer* buffer : {&call->y, &call->l0, &call->l1, &call->activity}) {
        bits.push_back(buffer->download<std::uint16_t>());
      }
    }
    bits.push_back(pack_.words.download<std::uint16_t>());
    bits.push_back(pack_.overflow.download<std::uint16_t>());
    return bits;
  }

 private:
  // Its kernels' shared memory depends on `slots`: launched so often, the other thread's launches
  // fall between.
  static constexpr int kPacks = 50;

  static TrainingCall training(const Device& device, const TrainingBlock& block) {
    return TrainingCall(training_plan(block.problem, device), block);
  }
  static Call few(const Device& device, const Block& block) {
    return Call(sparse_plan(block.problem, device), block);
  }
  static void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

  TrainingCall training_;
  Call few_;
  GatePackCall pack_;
  cudaStream_t stream_ = nullptr;
};

class CudaThreads : public GpuTest {};

TEST_F(CudaThreads, RunTwoModelsAtOnce) {
  constexpr int kRounds = 20;
  for (const Device& device : devices) {
    SCOPED_TRACE("as sm_" + std::to_string(device.compute_capability));
    Model gated(device, FfnKind::kGated, 700, 40, 264, 1032, 8);
    Model plain(device, FfnKind::kPlain, 300, 7, 136, 2056, kTwellMaxSlots);
    const std::array<Model*, 2> models = {&gated, &plain};
    require_cuda(cudaDeviceSynchronize());  // what was uploaded is there for every stream
    std::array<Model::Bits, 2> want;
    for (int i = 0; i < 2; ++i) want[i] = models[i]->run();

    std::barrier start(2);
    const auto run = [&](int i) {
      require_cuda(cudaSetDevice(device.ordinal));
      for (int round = 0; round < kRounds; ++round) {
        start.arrive_and_wait();
        EXPECT_EQ(models[i]->run(), want[i]) << "model " << i << ", round " << round;
      }
    };
    std::thread first(run, 0), second(run, 1);
    first.join();
    second.join();
  }
}

}  // namespace
}  // namespace twell
