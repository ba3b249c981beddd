#include "twell/ffn.h"

#include <cstdint>

#include "cpu/ffn.h"
#include "cuda/ffn.h"

namespace twell {

const char* name_of(FfnKind kind) { return kind == FfnKind::kGated ? "gated" : "plain"; }

const char* name_of(FfnPath path) {
  switch (path) {
    case FfnPath::kAuto:
      return "auto";
    case FfnPath::kDense:
      return "dense";
    case FfnPath::kSparse:
      return "sparse";
  }
  return "unknown";
}

namespace {

Status invalid(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }

// Collects the first complaint about a call's arguments.
class ArgumentCheck {
 public:
  ArgumentCheck(const char* function, const FfnPlan& plan) : function_(function) {
    if (plan.path != FfnPath::kSparse) {
      fail("plan.path", name_of(plan.path),
           "sparse; the dense path is the caller's own three products");
    } else if (plan.device.type == DeviceType::kCpu && plan.device.isa > detect_cpu_isa()) {
      status_ = {StatusCode::kUnsupported,
                 std::string(function_) + ": plan.device.isa is " + name_of(plan.device.isa) +
                     "; this machine offers at most " + name_of(detect_cpu_isa())};
    }
  }

  void require(const char* name, const void* pointer, bool needed = true) {
    if (needed && !pointer) fail(name, "null", "a pointer to data");
  }
  void require_null(const char* name, const void* pointer, const char* why) {
    if (pointer) fail(name, "not null", why);
  }
  void require_aligned(const char* name, const void* pointer, bool needed) {
    if (!needed) return;
    require(name, pointer);
    const auto rest = reinterpret_cast<std::uintptr_t>(pointer) % 64;
    if (rest != 0) {
      fail(name, "at an address of remainder " + std::to_string(rest) + " modulo 64",
           "64-byte aligned memory");
    }
  }
  const Status& status() const { return status_; }

 private:
  void fail(const char* name, const std::string& value, const char* permitted) {
    if (!status_.ok()) return;
    status_ = invalid(std::string(function_) + ": " + name + " is " + value +
                      "; permitted: " + permitted);
  }

  const char* function_;
  Status status_;
};

}  // namespace

Status ffn_forward(const FfnPlan& plan, const FfnForwardArgs& args) {
  const bool any = plan.problem.tokens > 0;
  const bool gated = plan.problem.kind == FfnKind::kGated;
  ArgumentCheck check("ffn_forward", plan);
  check.require("x", args.x, any);
  check.require("y", args.y, any);
  check.require("weights.gate", args.weights.gate, any && gated);
  if (!gated) check.require_null("weights.gate", args.weights.gate, "null for a plain block");
  check.require("weights.up", args.weights.up, any);
  check.require("weights.down", args.weights.down, any);
  check.require_aligned("workspace", args.workspace, plan.workspace_bytes > 0);
  check.require_aligned("saved", args.saved, plan.training && plan.saved_bytes > 0);
  if (!plan.training) check.require_null("saved", args.saved, "null unless plan.training");
  if (!check.status().ok()) return check.status();
  if (plan.device.type == DeviceType::kCpu) return cpu::forward(plan, args);
  return cuda::forward(plan, args);
}

Status ffn_backward(const FfnPlan& plan, const FfnBackwardArgs& args) {
  const bool any = plan.problem.tokens > 0;
  const bool gated = plan.problem.kind == FfnKind::kGated;
  ArgumentCheck check("ffn_backward", plan);
  check.require("grad_y", args.grad_y, any);
  check.require("x", args.x, any);
  check.require("weights.gate", args.weights.gate, any && gated);
  if (!gated) {
    check.require_null("weights.gate", args.weights.gate, "null for a plain block");
    check.require_null("grad_gate", args.grad_gate, "null for a plain block");
  }
  check.require("weights.up", args.weights.up, any);
  check.require("weights.down", args.weights.down, any);
  check.require_aligned("saved", args.saved, plan.saved_bytes > 0);
  check.require_aligned("workspace", args.workspace, plan.backward_workspace_bytes > 0);
  if (!check.status().ok()) return check.status();
  if (!plan.training) {
    return invalid("ffn_backward: plan.training is false; permitted: a plan made for training");
  }
  if (plan.device.type == DeviceType::kCpu) return cpu::backward(plan, args);
  return cuda::backward(plan, args);
}

}  // namespace twell
