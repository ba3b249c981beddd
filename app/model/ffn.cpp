#include "app/model/ffn.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "app/error.h"

namespace twell::app {
namespace {

using torch::Tensor;

// Handles of twell's operators (see torch/); found by name once.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> call_forward(const Tensor& x,
                                                                const FfnWeights& w, bool save,
                                                                bool count) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("twell::ffn_forward", "").typed<Signature>();
  return op.call(x, w.gate, w.up, w.down, save, count);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> call_backward(const Tensor& grad_y,
                                                         const std::optional<Tensor>& grad_l1,
                                                         const Tensor& x, const FfnWeights& w,
                                                         const Tensor& saved) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const std::optional<Tensor>&, const Tensor&, const std::optional<Tensor>&,
      const Tensor&, const Tensor&, const Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("twell::ffn_backward", "").typed<Signature>();
  return op.call(grad_y, grad_l1, x, w.gate, w.up, w.down, saved);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Outputs y, l1, l0, activity. The sparse path saves twell's compact form, the dense path g, u, h.
struct ReluFfn : torch::autograd::Function<ReluFfn> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& gate,
                               const Tensor& up, const Tensor& down, bool sparse, FfnCounts counts,
                               bool save) {
    ctx->saved_data["sparse"] = sparse;
    ctx->set_materialize_grads(false);
    Tensor y, l1, l0, activity;
    if (sparse) {
      Tensor saved;
      std::tie(y, l0, l1, activity, saved) =
          call_forward(x, {gate, up, down}, save, counts != FfnCounts::kNone);
      if (save) ctx->save_for_backward({x, gate, up, down, saved});
    } else {
      const Tensor g = gate_product(x, gate);  // [tokens, neurons]
      const Tensor u = torch::mm(x, up.t());   // [tokens, neurons]
      GatedRelu middle = gated_relu(g, u, counts, save);
      y = torch::mm(middle.h, down);
      l1 = middle.l1;
      l0 = middle.l0;
      activity = middle.activity;
      if (save) ctx->save_for_backward({x, gate, up, down, g, u, middle.h});
    }
    for (Tensor* count : {&l1, &l0, &activity}) {  // autograd wants every output
      if (!count->defined()) *count = torch::empty({0}, y.options());
    }
    ctx->mark_non_differentiable({l0, activity});
    return {y, l1, l0, activity};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const FfnWeights w{saved[1], saved[2], saved[3]};
    const Tensor grad_y = grads[0].defined() ? grads[0].contiguous() : torch::zeros_like(x);
    const Tensor& grad_l1 = grads[1];
    const Tensor none;
    if (ctx->saved_data["sparse"].toBool()) {
      const auto [dx, dg, du, dd] = call_backward(
          grad_y, grad_l1.defined() ? std::optional(grad_l1) : std::nullopt, x, w, saved[4]);
      return {dx, dg, du, dd, none, none, none};
    }
    const Tensor grad_h = torch::mm(grad_y, w.down.t());
    const auto [dg, du] = gated_relu_backward(grad_h, grad_l1, saved[4], saved[5]);
    return {torch::mm(dg, w.gate).addmm_(du, w.up),
            torch::mm(dg.t(), x),
            torch::mm(du.t(), x),
            torch::mm(saved[6].t(), grad_y),
            none,
            none,
            none};
  }
};

DType core_dtype(torch::ScalarType type) {
  switch (type) {
    case torch::kBFloat16:
      return DType::kBf16;
    case torch::kFloat32:
      return DType::kFloat32;
    case torch::kFloat64:
      return DType::kFloat64;
    default:
      throw Error(std::string("twell's FFN runs in bfloat16, float32 or float64, not in ") +
                  c10::toString(type));
  }
}

Device core_device(const torch::Device& device) {
  if (device.is_cpu()) return cpu_device(at::get_num_threads());
  Result<Device> found = cuda_device(device.has_index() ? device.index() : 0);
  if (!found.ok()) throw Error(found.status().message());
  return std::move(found).value();
}

}  // namespace

FfnMode parse_ffn_mode(const std::string& name) {
  for (const FfnMode mode : {FfnMode::kDense, FfnMode::kTwell, FfnMode::kAuto}) {
    if (name == name_of(mode)) return mode;
  }
  throw Error("--ffn is '" + name + "'; permitted: dense, twell, auto");
}

const char* name_of(FfnMode mode) {
  switch (mode) {
    case FfnMode::kDense:
      return "dense";
    case FfnMode::kTwell:
      return "twell";
    case FfnMode::kAuto:
      return "auto";
  }
  return "?";
}

FfnOutput relu_ffn(const Tensor& x, const FfnWeights& weights, FfnPath path, FfnCounts counts) {
  const bool save =
      torch::GradMode::is_enabled() && (x.requires_grad() || weights.gate.requires_grad() ||
                                        weights.up.requires_grad() || weights.down.requires_grad());
  const variable_list out = ReluFfn::apply(x, weights.gate, weights.up, weights.down,
                                           path == FfnPath::kSparse, counts, save);
  return {out[0], out[1], out[2], out[3], path};
}

Tensor silu_ffn(const Tensor& x, const FfnWeights& weights) {
  const Tensor h =
      torch::silu(torch::matmul(x, weights.gate.t())) * torch::matmul(x, weights.up.t());
  return torch::matmul(h, weights.down);
}

Readback measure_density(const Tensor& x, const Tensor& gate) {
  constexpr int64_t kTile = 128, kMostTiles = 4, kShare = 8;
  const torch::NoGradGuard no_grad;
  const int64_t tokens = x.size(0);
  if (tokens == 0) return {};
  const int64_t tile = std::min(kTile, tokens);
  const int64_t count = std::clamp<int64_t>(tokens / (kShare * tile), 1, kMostTiles);
  std::vector<Tensor> tiles;
  for (int64_t i = 0; i < count; ++i) {  // in the middle of each part of the tokens
    tiles.push_back(x.narrow(0, (tokens * (2 * i + 1) / count - tile) / 2, tile));
  }
  const Tensor rows = count == 1 ? tiles[0] : torch::cat(tiles);  // [count * tile, hidden]
  const Tensor active = torch::mm(rows, gate.t()).gt(0).view({count, tile, gate.size(0)});
  return Readback(torch::stack({active.sum().to(torch::kFloat64) / (count * tile),
                                active.any(1).sum().to(torch::kFloat64) / count}));
}

FfnPlan plan_for(const Tensor& x, int64_t neurons, FfnPath path, bool training,
                 const FfnDensity& density) {
  const FfnProblem problem{FfnKind::kGated, core_dtype(x.scalar_type()), x.size(0), x.size(1),
                           neurons};
  const PlanOptions options{path, training, density.active, density.tile_union};
  Result<FfnPlan> plan = plan_ffn(problem, core_device(x.device()), options);
  if (!plan.ok()) throw Error(plan.status().message());
  return std::move(plan).value();
}

void FfnChooser::observe(const Tensor& x, const FfnWeights& weights, FfnMode mode) {
  if (mode != FfnMode::kAuto || calls++ % kInterval != 0) return;
  const auto take = [this](double memory) {
    if (!measured.defined()) return;
    const std::vector<double> now = std::exchange(measured, {}).values();
    density.active = memory * density.active + (1 - memory) * now[0];
    density.tile_union = memory * density.tile_union + (1 - memory) * now[1];
  };
  take(kMemory);
  measured = measure_density(x, weights.gate);
  if (density.active < 0) take(0);
}

FfnPath FfnChooser::choose(const Tensor& x, const FfnWeights& weights, FfnMode mode,
                           bool training) {
  if (mode == FfnMode::kDense) return FfnPath::kDense;
  if (mode == FfnMode::kTwell) return FfnPath::kSparse;
  const FfnPlan plan = plan_for(x, weights.gate.size(0), FfnPath::kAuto, training, density);
  if (density.active < 0) return plan.path;
  const double margin = sparse ? 0 : kMargin;
  sparse = plan.path == FfnPath::kSparse &&
           plan.predicted_sparse_ms * (1 + margin) <= plan.predicted_dense_ms;
  return sparse ? FfnPath::kSparse : FfnPath::kDense;
}

}  // namespace twell::app
