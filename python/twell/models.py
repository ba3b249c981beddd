"""Llama and Qwen2 models of the transformers library whose layers differ in width.

Importing this module registers their configurations and models with transformers' Auto classes.
"""

import copy

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_WIDTH_UNIT = 8  # widths are multiples of it, as twell's blocks want


class _PerLayerWidths:
    """Makes ``intermediate_size`` a list with an entry for each layer."""

    def __post_init__(self, **keywords):
        super().__post_init__(**keywords)
        widths, layers = self.intermediate_size, self.num_hidden_layers
        if isinstance(widths, int):
            self.intermediate_size = widths = [widths] * layers
        if len(widths) != layers:
            raise ValueError(
                f"intermediate_size has {len(widths)} entries; permitted: one for each layer, "
                f"num_hidden_layers = {layers}"
            )
        for layer, width in enumerate(widths):
            if width < _WIDTH_UNIT or width % _WIDTH_UNIT:
                raise ValueError(
                    f"intermediate_size[{layer}] is {width}; permitted: multiples of "
                    f"{_WIDTH_UNIT} from {_WIDTH_UNIT} on"
                )


class _PerLayerMLPs:
    """Gives each layer an MLP of its own width."""

    def __init__(self, config):
        widths = config.intermediate_size
        # The base class knows one width, and all its modules must hold this very config.
        config.intermediate_size = _WIDTH_UNIT
        try:
            super().__init__(config)
        finally:
            config.intermediate_size = widths
        for layer, width in zip(self.model.layers, widths, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = type(layer.mlp)(own)
        self.post_init()


@strict
class TwellLlamaConfig(_PerLayerWidths, LlamaConfig):
    model_type = "twell_llama"
    intermediate_size: int | list[int] = 11008


@strict
class TwellQwen2Config(_PerLayerWidths, Qwen2Config):
    model_type = "twell_qwen2"
    intermediate_size: int | list[int] = 22016


class TwellLlamaForCausalLM(_PerLayerMLPs, LlamaForCausalLM):
    config_class = TwellLlamaConfig


class TwellQwen2ForCausalLM(_PerLayerMLPs, Qwen2ForCausalLM):
    config_class = TwellQwen2Config


for _model in (TwellLlamaForCausalLM, TwellQwen2ForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
