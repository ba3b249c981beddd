"""One line for a model of the transformers library: ``twell.apply(model)``."""

import dataclasses
import os

import torch
from torch import Tensor, nn

from twell.modules import GatedFFN, Path

_CHECKED_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Summary:
    """What ``apply`` did.

    Attributes:
        modules: the names of the blocks that were replaced.
        hidden: their hidden size.
        neurons: the neurons of each.
        largest_error: the largest relative difference ‖y_twell − y‖ / ‖y‖ that the check saw.
    """

    modules: tuple[str, ...]
    hidden: int
    neurons: tuple[int, ...]
    largest_error: float

    def __str__(self) -> str:
        least, most = min(self.neurons), max(self.neurons)
        neurons = f"{least} to {most}" if least < most else f"{most}"
        return (
            f"twell: replaced {len(self.modules)} feed-forward blocks "
            f"({self.hidden} × {neurons}), {self.modules[0]} to {self.modules[-1]}; "
            f"largest relative difference {self.largest_error:.1e}"
        )


class HuggingFaceFFN(GatedFFN):
    """A ``GatedFFN`` in the place of a transformers MLP, which ``restore`` can put back."""

    def __init__(self, mlp: nn.Module, path: Path):
        weight = mlp.gate_proj.weight
        super().__init__(
            weight.shape[1], weight.shape[0], path=path, device="meta", dtype=weight.dtype
        )
        self.original_class = type(mlp)
        self.config = mlp.config
        self.gate_proj.weight = mlp.gate_proj.weight
        self.up_proj.weight = mlp.up_proj.weight
        self.down_proj.weight = _transposed(mlp.down_proj.weight)
        for mean in ("mean_active", "mean_union"):
            setattr(self, mean, torch.full((), -1.0, device=weight.device))
        self.train(mlp.training)

    def original(self) -> nn.Module:
        """The MLP that this module stands for, with the present weights."""
        with torch.device("meta"):
            mlp = self.original_class(self.config)
        mlp.gate_proj.weight = self.gate
        mlp.up_proj.weight = self.up
        mlp.down_proj.weight = _transposed(self.down)
        return mlp.train(self.training)


def from_pretrained(name: str | os.PathLike, **keywords) -> nn.Module:
    """Loads a causal language model as ``transformers.AutoModelForCausalLM.from_pretrained`` does.

    That class alone refuses a checkpoint of ``twell compact`` whose layers differ in width: its
    model type is twell's own, "twell_llama" or "twell_qwen2". Here it loads, and what
    ``save_pretrained`` writes is such a checkpoint again. The FFNs are those of transformers;
    ``apply`` swaps them.

    Args:
        name: a folder, or what else ``from_pretrained`` takes.
        keywords: its other arguments.
    """
    from twell.models import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, **keywords)


def apply(model: nn.Module, path: Path = "auto") -> Summary:
    """Replaces every feed-forward block of a transformers Llama or Qwen2 model, in place.

    gate and up keep their Parameters; down_proj is transposed into a new Parameter, one block at a
    time, so an optimizer must be made after this call. ``state_dict`` and ``save_pretrained`` write
    the names and layouts they wrote before, and ``from_pretrained`` loads them. Each block is
    compared with the original on a small random input before it takes its place. All blocks are
    replaced, or, if this raises, none.

    Args:
        model: a LlamaForCausalLM, a Qwen2ForCausalLM, or any module that holds such MLPs.
        path: as of ``twell.GatedFFN``.

    Returns:
        A summary; print it.

    Raises:
        ValueError: there is no such block, or one has an activation other than ReLU, a bias, a
            projection that is no plain ``torch.nn.Linear``, a dtype or a size that is not
            supported, or weights that are not loaded. The message names module and reason.
        RuntimeError: a block's result differs from the original's by more than rounding.
    """
    mlps = {name: m for name, m in model.named_modules() if isinstance(m, _mlp_classes())}
    if not mlps:
        raise ValueError(
            f"twell.apply: {type(model).__name__} holds no feed-forward block to replace; "
            f"supported are {', '.join(c.__name__ for c in _mlp_classes())}"
        )
    for name, mlp in mlps.items():
        _require_supported(name, mlp)
    largest_error = 0.0
    replaced = []
    try:
        for name in mlps:
            mlp = model.get_submodule(name)
            ffn = _replacement(name, mlp, path)
            largest_error = max(largest_error, _compare(name, mlp, ffn))
            model.set_submodule(name, ffn)
            replaced.append(name)
            mlps[name] = mlp = None  # frees the original down_proj
    except Exception:
        _put_back(model, replaced)
        raise
    ffns = [model.get_submodule(name) for name in replaced]
    neurons = tuple(ffn.neurons for ffn in ffns)
    return Summary(tuple(replaced), ffns[0].hidden, neurons, largest_error)


def restore(model: nn.Module) -> int:
    """Undoes ``apply`` in place, with the present weights; returns the number of blocks."""
    names = [name for name, m in model.named_modules() if isinstance(m, HuggingFaceFFN)]
    _put_back(model, names)
    return len(names)


def _mlp_classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    return LlamaMLP, Qwen2MLP


def _transposed(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)


def _put_back(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.set_submodule(name, model.get_submodule(name).original())


def _require_supported(name: str, mlp: nn.Module) -> None:
    def refuse(complaint: str):
        raise ValueError(f"twell.apply: {name}: {complaint}")

    if not isinstance(mlp.act_fn, nn.ReLU):
        refuse(
            f"activation {mlp.config.hidden_act!r} ({type(mlp.act_fn).__name__}) is not supported; "
            "supported is 'relu'"
        )
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, projection)
        if type(linear) is not nn.Linear:
            refuse(f"{projection} is a {type(linear).__name__}; supported is torch.nn.Linear")
        if linear.bias is not None:
            refuse(f"{projection} has a bias, which is not supported (mlp_bias must be false)")
        if linear.weight.is_meta:
            refuse(f"{projection} is on the meta device; load its weights first")


def _replacement(name: str, mlp: nn.Module, path: Path) -> HuggingFaceFFN:
    try:
        return HuggingFaceFFN(mlp, path)
    except RuntimeError as error:
        raise ValueError(f"twell.apply: {name}: {error}") from error


@torch.no_grad()
def _compare(name: str, mlp: nn.Module, ffn: HuggingFaceFFN) -> float:
    weight = ffn.gate
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    x = torch.randn(_CHECKED_TOKENS, ffn.hidden, generator=generator).to(weight)
    expected = mlp(x).double()
    difference = (ffn._run(x, "twell").y.double() - expected).norm()
    norm = expected.norm()
    permitted = _rounding(weight) * norm
    if not difference <= permitted:  # NaN is no agreement
        raise RuntimeError(
            f"twell.apply: {name}: ‖y_twell − y‖ = {difference:.2e} on a random input, more than "
            f"the {permitted:.2e} that rounding explains (‖y‖ = {norm:.2e}); the model is as it was"
        )
    return (difference / norm).item() if norm > 0 else 0.0


def _rounding(weight: Tensor) -> float:
    """Relative error of two evaluations of a block: g, u, h and y are rounded to the dtype, and the
    products are accumulated in float32 or better."""
    neurons, hidden = weight.shape
    accumulated = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    return 2 * torch.finfo(weight.dtype).eps + (hidden + neurons) ** 0.5 * accumulated
