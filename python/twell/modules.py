"""The sparse feed-forward block as modules."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from twell import functional
from twell.planning import faster_path, plan

Path = Literal["auto", "dense", "twell"]

# With path="auto" the planner is asked at the largest of these that is no more than the number of
# tokens, so that few ranges of tokens, and not every length, need a compiled graph of their own.
_PLANNED_TOKENS = (4096, 512, 64, 8, 1)

# Weight of the newest call in the running mean of active neurons.
_MOMENTUM = 0.1

# With path="auto" the running mean is read after 1, 2, 4, … calls and then after every so many.
_CALLS_BETWEEN_READS = 1024


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
            planner predicts to be faster from a running mean of the active neurons. The mean stays
            on the device: it is read after 1, 2, 4, … 1024 calls and then after every 1024, and in
            a compiled module or a CUDA graph only by ``replan()``.
        device, dtype: of the weights; bfloat16, float32 or float64.

    Attributes:
        up, down: the weights, [neurons, hidden].
        path: as above; may be changed at any time.
        l0, l1, activity: of the last call, as in ``twell.functional.FfnOutput``; None before it.
            ``l1`` carries gradients, so a training loss may add it (under activation checkpointing,
            with ``use_reentrant=False``).
        mean_active: the running mean of active neurons per token (a buffer, not saved); negative
            if unknown. Only kept with path="auto".

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
        mean_active = torch.empty((), dtype=torch.float32, device=device)
        self.register_buffer("mean_active", mean_active, persistent=False)
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
        self._calls = 0
        self._expected_active = -1

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → y [..., hidden]."""
        tokens = x.numel() // self.hidden
        path = self._faster_path(x, tokens) if self.path == "auto" else self.path
        out = self._run(x, path)
        self.l0, self.l1, self.activity = out.l0, out.l1, out.activity
        if self.path == "auto" and tokens > 0:
            self._observe(out.l0.detach() / tokens)
        return out.y

    def replan(self) -> None:
        """Reads the running mean (which waits for the device) and plans with it from now on.

        Only of use with path="auto" in a compiled module or a CUDA graph; else it happens by
        itself. A compiled module is compiled again if the mean has changed by more than √2.
        """
        mean = self.mean_active.item()
        # In steps of √2: a small change is no reason to plan, or to compile, again.
        self._expected_active = -1 if mean < 0 else round(2 ** (round(2 * math.log2(mean + 1)) / 2))

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, neurons={self.neurons}, path={self.path!r}"

    def __getstate__(self):
        # Copies and pickles leave behind the last call: it belongs to a graph.
        return {**self.__dict__, "l0": None, "l1": None, "activity": None}

    def _run(self, x: Tensor, path: functional.Path) -> functional.FfnOutput:
        return functional.ffn(x, self.up, self.down, path)

    def _forget(self) -> None:
        self.l0: Tensor | None = None
        self.l1: Tensor | None = None
        self.activity: Tensor | None = None

    def _faster_path(self, x: Tensor, tokens: int) -> functional.Path:
        planned_tokens = next((t for t in _PLANNED_TOKENS if t <= tokens), 1)
        training = torch.is_grad_enabled()
        return faster_path(
            self.kind,
            self.hidden,
            self.neurons,
            planned_tokens,
            self.up.dtype,
            training,
            self._expected_active,
            x.device,
        )

    @torch.no_grad()
    def _observe(self, active: Tensor) -> None:
        known = torch.lerp(self.mean_active, active.to(torch.float32), _MOMENTUM)
        self.mean_active.copy_(torch.where(self.mean_active < 0, active, known))
        if torch.compiler.is_compiling():
            return
        self._calls += 1
        due = self._calls & (self._calls - 1) == 0 or self._calls % _CALLS_BETWEEN_READS == 0
        if due and not (active.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.replan()


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
