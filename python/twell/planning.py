"""The planner: what would run for a shape, and which path is predicted to be faster."""

import functools
import itertools
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
        kind, dtype, device: the problem and where it runs. Instead of a device of this machine, a
            GPU described by its compute capability and number of multiprocessors: "sm_90x132".
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


# The planner is asked at both ends of the ranges that begin with these numbers of tokens. They
# begin where its kernels change, and else double.
_FIRST_TOKENS = (0, 2, 3, 5, 9, 17, 33, 65, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)


@torch.compiler.assume_constant_result
def path_ranges(
    kind: Literal["gated", "plain"],
    hidden: int,
    neurons: int,
    dtype: torch.dtype,
    training: bool,
    expected_active: float | None,
    expected_union: float | None,
    device: torch.device | str,
) -> tuple[tuple[int, str], ...]:
    """From which number of tokens on to take which path: (tokens, path), descending, to 0.

    "twell" where the planner says so at both ends of a range, so that few ranges, and not every
    number of tokens, need a compiled graph of their own. Neighbours differ. A constant while
    torch.compile traces.
    """
    threads = torch.get_num_threads()
    return _path_ranges(
        kind,
        hidden,
        neurons,
        dtype,
        training,
        expected_active,
        expected_union,
        str(device),
        threads,
    )


@functools.lru_cache(maxsize=4096)
def _path_ranges(
    kind, hidden, neurons, dtype, training, expected_active, expected_union, device, threads
):
    planned = functools.partial(
        plan,
        hidden,
        neurons,
        kind=kind,
        dtype=dtype,
        training=training,
        expected_active=expected_active,
        expected_union=expected_union,
        device=device,
    )
    ranges = []
    for first, following in itertools.pairwise((*_FIRST_TOKENS, None)):
        last = first if following is None else following - 1
        ends = {planned(max(1, tokens))["path"] for tokens in (first, last)}
        path = "twell" if ends == {"twell"} else "dense"
        if not ranges or ranges[-1][1] != path:
            ranges.append((first, path))
    return tuple(reversed(ranges))
