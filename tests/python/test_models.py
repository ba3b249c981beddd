"""twell.from_pretrained: models whose layers differ in width, against models of one width.

The oracle is a model of transformers alone, in which the neurons that a layer lacks are zero.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_huggingface import MODELS, SIZES, TOKENS, logits, make_model

import twell

pytestmark = pytest.mark.parametrize("family", MODELS)

WIDTHS = [8, 136, 64]


def cut(name, tensor):
    """The tensor `name` of a model of one width, without the neurons that its layer lacks."""
    if ".mlp." not in name:
        return tensor
    width = WIDTHS[int(name.split(".")[2])]
    return tensor[:, :width].contiguous() if "down_proj" in name else tensor[:width].contiguous()


def write_checkpoint(family, folder, **changes):
    """A checkpoint of the widths WIDTHS in `folder`, and the model of one width like it."""
    torch.manual_seed(5)
    model = make_model(family)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn(value.shape) / 8)
            if ".mlp." in name:
                neurons = value.T if "down_proj" in name else value
                neurons[WIDTHS[int(name.split(".")[2])] :] = 0
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    cuts = {name: cut(name, tensor) for name, tensor in weights.items()}
    save_file(cuts, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": f"twell_{family}", "intermediate_size": WIDTHS} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_loads_layers_of_different_widths(family, tmp_path):
    expected = write_checkpoint(family, tmp_path)
    model = twell.from_pretrained(tmp_path).eval()
    widths = [layer.mlp.gate_proj.weight.shape[0] for layer in model.model.layers]
    assert widths == WIDTHS == model.config.intermediate_size
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)

    summary = twell.apply(model, "twell")
    assert summary.neurons == tuple(WIDTHS) and "(64 × 8 to 136)" in str(summary)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **arguments), expected.generate(TOKENS, **arguments))
    assert twell.restore(model) == 3
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


def test_saves_what_it_loaded(family, tmp_path):
    write_checkpoint(family, tmp_path / "before")
    model = twell.from_pretrained(tmp_path / "before", dtype=torch.float32)
    twell.apply(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("before", "after"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    config = json.loads((tmp_path / "after/config.json").read_text())
    assert config["model_type"] == f"twell_{family}" and config["intermediate_size"] == WIDTHS
    again = twell.from_pretrained(tmp_path / "after")
    assert torch.equal(logits(again), logits(twell.from_pretrained(tmp_path / "before")))


def test_new_models_are_drawn_as_transformers_draws_them(family):
    from twell.models import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | {"intermediate_size": WIDTHS, "initializer_range": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(f"twell_{family}", **sizes))
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            assert abs(projection.weight.std().item() - 0.5) < 0.1
    assert model.model.layers[0].self_attn.config is model.config
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_loads_what_transformers_loads(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    loaded = twell.from_pretrained(tmp_path)
    assert type(loaded) is MODELS[family][1]
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize(
    "widths, complaint",
    [
        ([136, 64], "2 entries.* num_hidden_layers = 3"),
        ([], "0 entries"),
        ([136, 0, 64], r"intermediate_size\[1\] is 0; .*multiples of 8"),
        ([136, 64, -8], r"intermediate_size\[2\] is -8"),
        ([12, 64, 64], r"intermediate_size\[0\] is 12"),
        ("wide", "intermediate_size"),
        ([8, 8, None], "intermediate_size"),
    ],
)
def test_bad_widths_are_named(family, tmp_path, widths, complaint):
    write_checkpoint(family, tmp_path, intermediate_size=widths)
    with pytest.raises(Exception, match=complaint):
        twell.from_pretrained(tmp_path)


def test_transformers_alone_refuses(family, tmp_path):
    """In a process without twell.models: by its model type, and as a Llama or Qwen2 by the list."""
    write_checkpoint(family, tmp_path)
    for loader, complaint in (
        ("AutoModelForCausalLM", f"has model type `twell_{family}`"),
        (MODELS[family][1].__name__, "'intermediate_size' expected int, got list"),
    ):
        code = f"import transformers; transformers.{loader}.from_pretrained({str(tmp_path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0 and complaint in done.stderr, done.stderr
