#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <optional>

namespace twell::app {

// The most memory that was in use at a time during run(), in bytes, what was there before included:
// on a GPU by the statistics of PyTorch's allocator, on the CPU the resident set of the process.
// Nothing where the system does not say (Linux without /proc/self/clear_refs).
std::optional<std::int64_t> peak_bytes(const torch::Device& device,
                                       const std::function<void()>& run);

}  // namespace twell::app
