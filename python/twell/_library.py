"""Loads the operators of ``libtwell_ops.so`` and teaches PyTorch their shapes and gradients.

Importing this module defines ``torch.ops.twell.*``. The library does all checks of arguments; the
fake implementations below only say what comes out of good ones.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("libtwell_ops.so")
if not _LIBRARY.exists():
    raise ImportError(
        f"twell: {_LIBRARY} does not exist; build it with scripts/build, or install the package "
        "with `pip install .`"
    )
torch.ops.load_library(_LIBRARY)

TILE_COLUMNS = 256


def l1_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of Σ|h| for operands of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _saved_bytes(x: Tensor, gate: Tensor | None, up: Tensor) -> int | torch.SymInt:
    tokens, hidden, neurons = *x.shape, up.shape[0]
    if not all(isinstance(size, int) for size in (tokens, hidden, neurons)):
        return torch.library.get_ctx().new_dynamic_size()
    kind = "plain" if gate is None else "gated"
    plan = torch.ops.twell.ffn_plan(
        kind, x.dtype, tokens, hidden, neurons, "twell", True, -1.0, -1.0, str(x.device)
    )
    return json.loads(plan)["saved_bytes"]


@torch.library.register_fake("twell::ffn_forward")
def _(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, save: bool, count: bool = True):
    scalar = () if count else (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(scalar, dtype=torch.int64),
        x.new_empty(scalar, dtype=l1_dtype(x.dtype)),
        x.new_empty(up.shape[0] if count else 0, dtype=torch.int32),
        x.new_empty(_saved_bytes(x, gate, up) if save else 0, dtype=torch.uint8),
    )


@torch.library.register_fake("twell::ffn_backward")
def _(grad_y, grad_l1, x, gate, up, down, saved):
    return (
        x.new_empty(x.shape),
        up.new_empty((0, up.shape[1]) if gate is None else up.shape),
        up.new_empty(up.shape),
        down.new_empty(down.shape),
    )


@torch.library.register_fake("twell::ffn_backward_accumulate")
def _(grad_y, grad_l1, x, gate, up, down, saved, grad_gate, grad_up, grad_down):
    return x.new_empty(x.shape)


def _words(rows: int, columns: int, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
    tiles = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    return (
        like.new_empty((rows, tiles, slots), dtype=torch.int32),
        like.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("twell::gate_pack")
def _(x: Tensor, gate: Tensor, slots: int):
    return _words(x.shape[0], gate.shape[0], slots, x)


@torch.library.register_fake("twell::twell_encode")
def _(values: Tensor, slots: int):
    return _words(*values.shape, slots, values)


@torch.library.register_fake("twell::twell_decode")
def _(words: Tensor, columns: int):
    return words.new_empty((words.shape[0], columns), dtype=torch.bfloat16)


def _ffn_setup_context(ctx, inputs, output):
    x, gate, up, down, save, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.saves = save
    ctx.save_for_backward(x, gate, up, down, output[4])


def _ffn_backward(ctx, grad_y, grad_l0, grad_l1, grad_activity, grad_saved):
    if not ctx.saves:
        raise RuntimeError(
            "twell::ffn_forward ran with save=False, so it cannot be differentiated; it must run "
            "with save=True"
        )
    x, gate, up, down, saved = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
    grad_x, grad_gate, grad_up, grad_down = torch.ops.twell.ffn_backward(
        grad_y, grad_l1, x, gate, up, down, saved
    )
    return grad_x, None if gate is None else grad_gate, grad_up, grad_down, None, None


torch.library.register_autograd(
    "twell::ffn_forward", _ffn_backward, setup_context=_ffn_setup_context
)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "twell::ffn_backward cannot be differentiated: the FFN has no second derivative"
    )


torch.library.register_autograd("twell::ffn_backward", _no_second_derivative)
