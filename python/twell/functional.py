"""The sparse feed-forward block as functions.

    gated:  g = relu(x gateᵀ)   u = x upᵀ   h = g ⊙ u   y = h down
    plain:                                  h = relu(x upᵀ)   y = h down

All weights are neuron-major, [neurons, hidden]: ``down`` is the transpose of the usual
``down_proj.weight``.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from twell._library import l1_dtype

Path = Literal["dense", "twell"]


class FfnOutput(NamedTuple):
    """What a block computes.

    Attributes:
        y: [..., hidden], in the dtype of the operands.
        l0: int64 scalar, the number of (token, neuron) pairs that are active.
        l1: Σ|h|, float32 scalar (float64 for float64 operands); differentiable.
        activity: int32 [neurons], the number of tokens for which each neuron is active.
    """

    y: Tensor
    l0: Tensor
    l1: Tensor
    activity: Tensor


def gated_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, path: Path = "twell") -> FfnOutput:
    """y = (relu(x gateᵀ) ⊙ x upᵀ) down, and how sparse it was.

    Differentiable in x and the weights, once. Under autocast the operands are cast to autocast's
    dtype, except float64, as in ``torch.nn.functional.linear``; autocast to float16 is refused.

    Args:
        x: [..., hidden], bfloat16, float32 or float64, on the CPU or a CUDA device. Copied if it is
            not contiguous.
        gate: [neurons, hidden], contiguous, with the dtype and the device of x, as are the others.
        up: [neurons, hidden].
        down: [neurons, hidden], neuron-major.
        path: "twell" runs the sparse kernels, "dense" PyTorch's dense products.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout; hidden or neurons is
            not a positive multiple of 8; neurons exceeds 65,536. The message names it.
        ValueError: path is neither "dense" nor "twell".
    """
    return _ffn(x, gate, up, down, path)


def ffn(x: Tensor, up: Tensor, down: Tensor, path: Path = "twell") -> FfnOutput:
    """y = relu(x upᵀ) down, and how sparse it was; arguments and errors as of ``gated_ffn``."""
    return _ffn(x, None, up, down, path)


def _ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, path: Path) -> FfnOutput:
    x, gate, up, down = _autocast(x, gate, up, down)
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # [M, K]
    if path == "twell":
        save = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, gate, up, down)
        )
        y, l0, l1, activity, _ = torch.ops.twell.ffn_forward(rows, gate, up, down, save)
    elif path == "dense":
        y, l0, l1, activity = _dense(rows, gate, up, down)
    else:
        raise ValueError(f"twell: path is {path!r}; it must be 'dense' or 'twell'")
    return FfnOutput(y.reshape(x.shape), l0, l1, activity)


def _dense(rows: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> FfnOutput:
    g = relu(linear(rows, up if gate is None else gate))  # [M, N]
    h = g if gate is None else g * linear(rows, up)  # [M, N]
    with torch.no_grad():
        active = g != 0  # NaN counts as active
        activity = active.sum(0, dtype=torch.int32)
    l1 = torch.linalg.vector_norm(h, 1, dtype=l1_dtype(h.dtype))
    return FfnOutput(h @ down, activity.sum(dtype=torch.int64), l1, activity)


def _autocast(x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *weights))
