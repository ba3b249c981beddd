"""Blocks of a chosen shape and density, and what they compute in float64."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Block:
    """Operands of one block; ``gate`` is None for a plain one."""

    x: Tensor  # [M, K]
    gate: Tensor | None  # [N, K]
    up: Tensor  # [N, K]
    down: Tensor  # [N, K]

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.x, self.gate, self.up, self.down

    def to(self, *args, **kwargs) -> "Block":
        return Block(*(None if t is None else t.to(*args, **kwargs) for t in self.operands))

    def requires_grad_(self) -> "Block":
        for t in self.operands:
            if t is not None:
                t.requires_grad_()
        return self


def make_block(
    tokens: int,
    hidden: int,
    neurons: int,
    *,
    kind: str = "gated",
    density: float = 0.1,
    dtype: torch.dtype = torch.bfloat16,
) -> Block:
    """A random block in which a share ``density`` of (token, neuron) pairs is active.

    Column 0 of x is 1, so column 0 of the gate is a bias, which moves the pre-activations' quantile
    to zero.
    """
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    x[:, 0] = 1
    gate, up, down = (
        torch.randn(neurons, hidden, dtype=torch.float64) / hidden**0.5 for _ in range(3)
    )
    selector = gate if kind == "gated" else up
    selector[:, 0] = 0
    if tokens > 0:
        pre = x.to(dtype).double() @ selector.to(dtype).double().T
        if density <= 0:
            bias = -pre.max() - 1
        elif density >= 1:
            bias = 1 - pre.min()
        else:
            bias = -torch.quantile(pre.flatten()[:1_000_000], 1 - density)
        selector[:, 0] = bias
    return Block(x, gate if kind == "gated" else None, up, down).to(dtype)


def reference(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and the pre-activation that decides, in float64 from the operands as they are."""
    x, gate, up, down = (None if t is None else t.double() for t in block.operands)
    pre = x @ (up if gate is None else gate).T
    h = pre.relu() if gate is None else pre.relu() * (x @ up.T)
    return h @ down, h, pre


def dense(block: Block) -> Tensor:
    """y as PyTorch's own products in the operands' dtype give it."""
    x, gate, up, down = block.operands
    h = (x @ up.T).relu() if gate is None else (x @ gate.T).relu() * (x @ up.T)
    return h @ down


def relative_error(y: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    difference = (y.double() - expected).norm()
    return (difference / norm).item() if norm > 0 else difference.item()
