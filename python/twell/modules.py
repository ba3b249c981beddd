"""The sparse feed-forward block as modules."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from twell import functional
from twell.planning import path_ranges, plan

Path = Literal["auto", "dense", "twell"]

# With path="auto" the density is measured after 1, 2, 4, … calls and then after every so many. A
# measurement counts from half as many calls later on: by then it has long reached the host, so that
# nothing waits for the device, and the choice depends on no timing.
_CALLS_BETWEEN_MEASUREMENTS = 16

# Weight of the newest measurement in the running means.
_MOMENTUM = 0.5

# Tokens that share a union.
_TILE = 128


class _Readback:
    """Numbers on their way from the device to the host; nobody waits for them until values()."""

    def __init__(self, numbers: Tensor):
        on_gpu = numbers.is_cuda
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self._host.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.current_stream(numbers.device).record_event() if on_gpu else None

    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class _Projection(nn.Module):
    """One weight, [neurons, hidden]; in checkpoints it is called ``<name>.weight``."""

    def __init__(self, neurons: int, hidden: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(neurons, hidden, **factory))

    def extra_repr(self) -> str:
        return f"neurons={self.weight.shape[0]}, hidden={self.weight.shape[1]}"


class _DownProjection(_Projection):
    """A weight that is [neurons, hidden] in memory and [hidden, neurons] in checkpoints."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight"] = weight.t()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "weight"
        if key in state_dict:
            state_dict[key] = state_dict[key].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)


class FFN(nn.Module):
    """The plain block, y = relu(x upᵀ) downᵀ, with weights up and down.

    Checkpoints have the names and layouts of ``torch.nn.Linear`` layers: ``up_proj.weight``
    [neurons, hidden] and ``down_proj.weight`` [hidden, neurons]. In memory every weight is
    neuron-major, [neurons, hidden]; ``load_state_dict`` and ``state_dict`` transpose ``down_proj``.

    Args:
        hidden: width of x and y, a positive multiple of 8.
        neurons: width of the block, a positive multiple of 8, at most 65,536.
        path: "twell" runs the sparse kernels, "dense" PyTorch's dense products, "auto" what the
            planner predicts to be faster for the density that was measured, at first for all
            neurons active. It is measured on the device after 1, 2, 4, 8, 16 calls and then every
            16, and read some calls later, so that nothing waits. A compiled module and a CUDA graph
            measure in every call and read only in ``replan()``.
        device, dtype: of the weights; bfloat16, float32 or float64.

    Attributes:
        up, down: the weights, [neurons, hidden].
        path: as above; may be changed at any time.
        l0, l1, activity: of the last call, as in ``twell.functional.FfnOutput``; None before it.
            ``l1`` carries gradients, so a training loss may add it (under activation checkpointing,
            with ``use_reentrant=False``).
        mean_active: the running mean of active neurons per token (a buffer, not saved); negative
            if unknown. Only kept with path="auto".
        mean_union: likewise, of neurons active in a tile of 128 tokens, estimated from the share of
            at least 128 tokens for which each neuron was active, as if these were independent.

    Raises:
        RuntimeError: hidden, neurons or dtype is not supported; the message names it.
        ValueError: an unknown path.
    """

    kind: Literal["gated", "plain"] = "plain"

    def __init__(
        self,
        hidden: int,
        neurons: int,
        *,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if path not in ("auto", "dense", "twell"):
            raise ValueError(f"twell: path is {path!r}; it must be 'auto', 'dense' or 'twell'")
        plan(hidden, neurons, 1, kind=self.kind, dtype=dtype or torch.get_default_dtype())
        factory = {"device": device, "dtype": dtype}
        self.hidden = hidden
        self.neurons = neurons
        self.path = path
        if self.kind == "gated":
            self.gate_proj = _Projection(neurons, hidden, **factory)
        self.up_proj = _Projection(neurons, hidden, **factory)
        self.down_proj = _DownProjection(neurons, hidden, **factory)
        for name in ("mean_active", "mean_union"):
            mean = torch.empty((), dtype=torch.float32, device=device)
            self.register_buffer(name, mean, persistent=False)
        self._forget()
        self.reset_parameters()

    @property
    def up(self) -> nn.Parameter:
        return self.up_proj.weight

    @property
    def down(self) -> nn.Parameter:
        return self.down_proj.weight

    def reset_parameters(self) -> None:
        """Draws weights as ``torch.nn.Linear`` does and forgets what was observed."""
        for name, projection in self.named_children():
            fan_in = self.neurons if name == "down_proj" else self.hidden
            nn.init.uniform_(projection.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        nn.init.constant_(self.mean_active, -1.0)
        nn.init.constant_(self.mean_union, -1.0)
        self._calls = 0
        self._measured: _Readback | None = None
        self._expect(self.neurons, self.neurons)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → y [..., hidden]."""
        tokens = x.numel() // self.hidden
        in_graph = torch.compiler.is_compiling() or (
            x.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        # Inside a backward pass a checkpoint recomputes: what it measured would count twice.
        observes = self.path == "auto" and tokens > 0 and (in_graph or not _in_backward())
        if observes and not in_graph:
            self._take_measurement()
        path = self._faster_path(x, tokens) if self.path == "auto" else self.path
        out = self._run(x, path)
        self.l0, self.l1, self.activity = out.l0, out.l1, out.activity
        if observes and (in_graph or self._is_due()):
            self._measure(out, tokens)
            if not in_graph:
                self._measured = _Readback(torch.stack((self.mean_active, self.mean_union)))
        return out.y

    def replan(self) -> None:
        """Reads the density (which waits for the device) and plans with it from now on.

        Only of use with path="auto" in a compiled module or a CUDA graph; else it happens by
        itself. A compiled module is compiled again if the density has changed by a fifth.
        """
        self._measured = None
        self._expect(self.mean_active.item(), self.mean_union.item())

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, neurons={self.neurons}, path={self.path!r}"

    def __getstate__(self):
        # Copies and pickles leave behind the last call: it belongs to a graph.
        return {**self.__dict__, "l0": None, "l1": None, "activity": None, "_measured": None}

    def _run(self, x: Tensor, path: functional.Path) -> functional.FfnOutput:
        return functional.ffn(x, self.up, self.down, path)

    def _forget(self) -> None:
        self.l0: Tensor | None = None
        self.l1: Tensor | None = None
        self.activity: Tensor | None = None

    def _faster_path(self, x: Tensor, tokens: int) -> functional.Path:
        ranges = path_ranges(
            self.kind,
            self.hidden,
            self.neurons,
            self.up.dtype,
            torch.is_grad_enabled(),
            *self._expected,
            x.device,
        )
        return next(path for first, path in ranges if tokens >= first)

    def _expect(self, active: float, union: float) -> None:
        """Plans with these active neurons per token and per tile from now on; negative: unknown."""
        self._expected = tuple(
            None if mean < 0 else min(_in_steps(mean), self.neurons) for mean in (active, union)
        )

    def _interval(self) -> int:
        """Calls from one measurement to the next."""
        return min(1 << max(0, self._calls.bit_length() - 1), _CALLS_BETWEEN_MEASUREMENTS)

    def _is_due(self) -> bool:
        """Counts a call; whether to measure it."""
        self._calls += 1
        return self._calls % self._interval() == 0

    @torch.no_grad()
    def _measure(self, out: functional.FfnOutput, tokens: int) -> None:
        _move(self.mean_active, out.l0.to(torch.float32) / tokens)
        if tokens >= _TILE:  # of fewer no neuron's share is known well enough
            share = out.activity.to(torch.float32) / tokens
            silent = (1 - share) ** _TILE  # [neurons], in a whole tile
            _move(self.mean_union, self.neurons - silent.sum())

    def _take_measurement(self) -> None:
        interval = self._interval()
        if self._measured is not None and self._calls % interval == interval // 2:
            self._expect(*self._measured.values())
            self._measured = None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _in_steps(mean: float) -> int:
    """Rounded up in steps of a fifth: a small change is no reason to plan, or compile, again."""
    return math.ceil(2 ** (math.ceil(4 * math.log2(mean + 1)) / 4) - 1)


def _move(mean: Tensor, value: Tensor) -> None:
    """Moves a running mean, in place, to its newest value."""
    value = value.to(mean.dtype)
    mean.copy_(torch.where(mean < 0, value, torch.lerp(mean, value, _MOMENTUM)))


class GatedFFN(FFN):
    """The gated block, y = (relu(x gateᵀ) ⊙ x upᵀ) down, with weights gate, up and down.

    As ``FFN``, with one more weight: ``gate`` [neurons, hidden], in checkpoints
    ``gate_proj.weight`` [neurons, hidden]. The checkpoint of a Llama or Qwen2 MLP loads as it is.
    """

    kind = "gated"

    @property
    def gate(self) -> nn.Parameter:
        return self.gate_proj.weight

    def _run(self, x: Tensor, path: functional.Path) -> functional.FfnOutput:
        return functional.gated_ffn(x, self.gate, self.up, self.down, path)
