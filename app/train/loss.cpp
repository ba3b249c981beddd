#include "app/train/loss.h"

#include <algorithm>

namespace twell::app {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Tokens whose logits are alive at once. A chunk adds to a gradient as large as the head, in
// float32.
constexpr int64_t kChunk = 512, kCudaChunk = 4096;

// Whether the products below go through one call: PyTorch's CPU products round to their own dtype.
bool widens(const Tensor& a, torch::ScalarType wide) {
  return a.is_cuda() && a.scalar_type() != wide;
}

// a b in a wider dtype.
Tensor wide_product(const Tensor& a, const Tensor& b, torch::ScalarType wide) {
  return widens(a, wide) ? torch::mm(a, b, wide) : torch::mm(a, b).to(wide);
}

// sum += a b, of a wider dtype.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  if (widens(a, sum.scalar_type())) {
    torch::addmm_out(sum, sum, a, b, sum.scalar_type());
  } else {
    sum += torch::mm(a, b);
  }
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& head,
                        const Tensor& targets, bool save) {
    const int64_t tokens = hidden.size(0);
    const auto wide = head.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    Tensor grad_hidden, grad_head;
    if (save) {
      grad_hidden = torch::empty_like(hidden);
      grad_head = torch::zeros_like(head, wide);
    }
    Tensor sum = torch::zeros({}, hidden.options().dtype(torch::kFloat64));
    const int64_t chunk = hidden.is_cuda() ? kCudaChunk : kChunk;
    for (int64_t first = 0; first < tokens; first += chunk) {
      const int64_t count = std::min(chunk, tokens - first);
      const Tensor part = hidden.narrow(0, first, count);
      const Tensor target = targets.narrow(0, first, count).unsqueeze(1);
      const Tensor log_p =
          torch::log_softmax(wide_product(part, head.t(), wide), 1);  // [count, vocab]
      const Tensor of_target = log_p.gather(1, target);
      sum -= of_target.sum(torch::kFloat64);
      if (!save) continue;
      // d/dlogits of the sum: softmax - onehot(target).
      Tensor grad = torch::empty(log_p.sizes(), head.options());
      torch::exp_out(grad, log_p);
      grad.scatter_(1, target, of_target.expm1().to(grad.scalar_type()));
      Tensor grad_part = grad_hidden.narrow(0, first, count);
      torch::mm_out(grad_part, grad, head);
      add_product(grad_head, grad.t(), part);
    }
    if (save) ctx->save_for_backward({grad_hidden, grad_head.to(head.scalar_type())});
    ctx->saved_data["tokens"] = tokens;
    return (sum / static_cast<double>(tokens)).to(wide);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor scale = grads[0] / static_cast<double>(ctx->saved_data["tokens"].toInt());
    return {(saved[0] * scale).to(saved[0].scalar_type()),
            (saved[1] * scale).to(saved[1].scalar_type()), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& head, const Tensor& targets) {
  const bool save =
      torch::GradMode::is_enabled() && (hidden.requires_grad() || head.requires_grad());
  return LinearCrossEntropy::apply(hidden, head, targets, save);
}

}  // namespace twell::app
