"""Sparse feed-forward blocks (FFN) for large language models.

    twell.from_pretrained(folder)             # as transformers does; layers may differ in width
    twell.apply(model)                        # a transformers Llama or Qwen2 model with ReLU
    block = twell.GatedFFN(hidden, neurons)   # or the block alone
    out = twell.functional.gated_ffn(x, gate, up, down)
    twell.plan(hidden, neurons, tokens)       # what would run, and why

The operators themselves are in ``torch.ops.twell``.
"""

from twell import functional
from twell.huggingface import HuggingFaceFFN, Summary, apply, from_pretrained, restore
from twell.modules import FFN, GatedFFN
from twell.planning import plan

__all__ = [
    "FFN",
    "GatedFFN",
    "HuggingFaceFFN",
    "Summary",
    "apply",
    "from_pretrained",
    "functional",
    "plan",
    "restore",
]
