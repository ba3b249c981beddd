#pragma once
// Where a model is sparse: as JSON, as text for a terminal and as a web page.

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "app/trace/trace.h"

namespace twell::app {

// What the speed-up is predicted for.
struct InspectTarget {
  std::int64_t hidden = 2048;
  torch::Device device = torch::kCPU;
};

// {"source", "tokens", "hidden", "layers": [{"layer", "neurons", "active_mean", "active_p99",
// "active_max", "silent", "union_mean": {tokens: neurons}, "overflow_share": {slots: share of tile
// rows}, "rate_histogram", "active_histogram", "predicted": {"prefill_512", "decode_1"}}]}. A
// prediction is the planner's dense time over its sparse time, bf16, on the target's device.
nlohmann::ordered_json inspect_report(const std::string& source, std::span<const Trace> traces,
                                      const InspectTarget& target);

std::string draw_text(const nlohmann::ordered_json& report);
std::string draw_html(const nlohmann::ordered_json& report);  // one file, nothing fetched

}  // namespace twell::app
