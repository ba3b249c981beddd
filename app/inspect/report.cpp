#include "app/inspect/report.h"

#include "app/error.h"
#include "app/model/ffn.h"
#include "app/trace/statistics.h"

namespace twell::app {
namespace {

constexpr std::int64_t kPrefillTokens = 512;

double predicted_ratio(std::int64_t tokens, const Trace& trace, const TraceStatistics& statistics,
                       const InspectTarget& target) {
  const torch::Tensor x =
      torch::empty({tokens, target.hidden},
                   torch::TensorOptions().dtype(torch::kBFloat16).device(target.device));
  // A single token is its own union.
  const double tile_union = tokens == 1 ? statistics.mean_active : statistics.mean_union(128);
  const FfnPlan plan = plan_for(x, trace.neurons, FfnPath::kSparse, /*training=*/false,
                                {statistics.mean_active, tile_union});
  return plan.predicted_dense_ms / plan.predicted_sparse_ms;
}

}  // namespace

nlohmann::ordered_json inspect_report(const std::string& source, std::span<const Trace> traces,
                                      const InspectTarget& target) {
  if (traces.empty()) throw Error(source + ": has no layer to look at");
  nlohmann::ordered_json report = {{"source", source},
                                   {"tokens", traces[0].tokens()},
                                   {"hidden", target.hidden},
                                   {"layers", nlohmann::ordered_json::array()}};
  for (const Trace& trace : traces) {
    const TraceStatistics s = trace_statistics(trace);
    nlohmann::ordered_json layer = {{"layer", trace.layer},         {"neurons", trace.neurons},
                                    {"active_mean", s.mean_active}, {"active_p99", s.p99_active},
                                    {"active_max", s.max_active},   {"silent", s.silent},
                                    {"max_in_tile", s.max_in_tile}};
    for (const auto& [tokens, neurons] : s.union_by_tokens) {
      layer["union_mean"][std::to_string(tokens)] = neurons;
    }
    for (const auto& [slots, rows] : s.overflow_by_slots) {
      layer["overflow_share"][std::to_string(slots)] =
          s.tile_rows ? static_cast<double>(rows) / static_cast<double>(s.tile_rows) : 0;
    }
    layer["rate_histogram"] = s.rate_histogram;
    layer["active_histogram"] = s.active_histogram;
    layer["predicted"] = {{"prefill_512", predicted_ratio(kPrefillTokens, trace, s, target)},
                          {"decode_1", predicted_ratio(1, trace, s, target)}};
    report["layers"].push_back(std::move(layer));
  }
  return report;
}

}  // namespace twell::app
