"""The planner: what would run for a shape, and which path is predicted to be faster."""

import functools
import json
from typing import Any, Literal

import torch

from twell import _library  # noqa: F401  (defines torch.ops.twell)


def plan(
    hidden: int,
    neurons: int,
    tokens: int,
    *,
    kind: Literal["gated", "plain"] = "gated",
    dtype: torch.dtype = torch.bfloat16,
    path: Literal["auto", "dense", "twell"] = "auto",
    training: bool = False,
    expected_active: float | None = None,
    expected_union: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The plan for a block, without running anything.

    Args:
        hidden, neurons, tokens: the shape: x [tokens, hidden], weights [neurons, hidden].
        kind, dtype, device: the problem and where it runs.
        path: "auto" lets the planner choose by predicted time.
        training: the forward pass saves for a backward pass, and predicted times include it.
        expected_active: mean active neurons per token, if known.
        expected_union: mean active neurons per tile of 128 tokens, if known.

    Returns:
        The plan's fields; among them "path" ("dense" or "twell"), "predicted_dense_ms",
        "predicted_sparse_ms", "workspace_bytes" and "saved_bytes".

    Raises:
        RuntimeError: what is not supported, by name.
    """
    text = torch.ops.twell.ffn_plan(
        kind,
        dtype,
        tokens,
        hidden,
        neurons,
        path,
        training,
        -1.0 if expected_active is None else expected_active,
        -1.0 if expected_union is None else expected_union,
        str(device),
    )
    return json.loads(text)


@torch.compiler.assume_constant_result
def faster_path(
    kind: Literal["gated", "plain"],
    hidden: int,
    neurons: int,
    tokens: int,
    dtype: torch.dtype,
    training: bool,
    expected_active: int,
    device: torch.device,
) -> Literal["dense", "twell"]:
    """The planner's choice, remembered; a constant while torch.compile traces.

    ``expected_active`` < 0: unknown.
    """
    threads = torch.get_num_threads()
    return _faster_path(
        kind, hidden, neurons, tokens, dtype, training, expected_active, device, threads
    )


@functools.lru_cache(maxsize=4096)
def _faster_path(kind, hidden, neurons, tokens, dtype, training, expected_active, device, threads):
    return plan(
        hidden,
        neurons,
        tokens,
        kind=kind,
        dtype=dtype,
        training=training,
        expected_active=None if expected_active < 0 else expected_active,
        device=device,
    )["path"]
