"""`twell compact`, against a count of the firing neurons by `transformers`."""

import math

import pytest
import torch
from program import needs_program, refusal, twell, twell_json, write_text, write_tokenizer
from safetensors.torch import load_file
from test_program_generate import encode, write_model
from transformers import AutoModelForCausalLM

pytestmark = needs_program

NEURONS = 136
DEAD = {0: 80, 1: 60}  # neurons per layer whose gate row is zero


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_tokenizer(folder / "tokenizer.json", write_text(folder / "text"), bos=True)
    (folder / "data.txt").write_text((folder / "text" / "3.h").read_text()[:600])
    return folder / "data.txt", tokenizer


def write_sparse_model(folder, tokenizer, kind="llama", **changes):
    """A random model in which some neurons cannot fire; returned in evaluation mode."""
    model = write_model(folder, tokenizer, kind, **changes)
    with torch.no_grad():
        for layer, dead in DEAD.items():
            order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(layer))
            model.model.layers[layer].mlp.gate_proj.weight[order[:dead]] = 0
    model.save_pretrained(folder)
    return model


def fired(model, ids):
    """Per layer, whether each neuron's gate is above zero for any of the tokens `ids`."""
    seen = []
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, __, gate: seen.append((gate > 0).flatten(0, 1).any(0))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("multiple", [8, 32])
def test_removes_what_never_fires_and_nothing_else(tmp_path, data, kind, multiple):
    text, tokenizer = data
    folder, out = tmp_path / "whole", tmp_path / "small"
    model = write_sparse_model(folder, tokenizer, kind, tied=kind == "qwen2", num_hidden_layers=2)
    ids = torch.tensor([*encode(tokenizer, text.read_text()), 0])[:129]
    assert len(ids) > 64
    alive, before = fired(model, ids[:-1])
    kept = [int(neurons.sum()) for neurons in alive]
    assert all(count <= NEURONS - DEAD[layer] for layer, count in enumerate(kept))

    report = twell_json(
        "compact", folder, "--data", text, "--out", out, "--multiple", multiple,
        "--max-tokens", len(ids) - 1, "--dtype", "float32",
    )  # fmt: skip
    width = -(-max(kept) // multiple) * multiple
    assert report["kept_per_layer"] == kept
    assert report["neurons_before"] == NEURONS and report["neurons_after"] == width

    small = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert small.config.intermediate_size == width and small.config.hidden_act == "relu"
    for layer, neurons in enumerate(alive):
        for name in ("gate_proj", "up_proj", "down_proj"):
            old, new = (getattr(m.model.layers[layer].mlp, name).weight for m in (model, small))
            if name == "down_proj":
                old, new = old.T, new.T
            assert torch.equal(new[: kept[layer]], old[neurons])
            assert not new[kept[layer] :].any()
    after = small(ids[None, :-1]).logits[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

    loss = torch.nn.functional.cross_entropy(before, ids[1:]).item()
    assert math.isclose(report["loss_before"], loss, rel_tol=1e-4)
    assert math.isclose(report["loss_after"], report["loss_before"], rel_tol=1e-6)
    assert math.isclose(report["perplexity_after"], math.exp(report["loss_after"]))
    for when, parameters in (("before", model), ("after", small)):
        count = sum(p.numel() for p in parameters.parameters())
        assert report[f"parameters_{when}"] == count
        assert report[f"bytes_{when}"] == 4 * count
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_keeps_the_dtype_and_says_what_it_did(tmp_path, data):
    text, tokenizer = data
    folder, out = tmp_path / "whole", tmp_path / "small"
    write_sparse_model(folder, tokenizer).bfloat16().save_pretrained(folder)
    lines = twell("compact", folder, "--data", text, "--out", out, "--multiple", 8).stdout
    assert f"of {NEURONS} neurons per layer" in lines and "perplexity" in lines
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    perplexity = {}
    for name, model in (("after", out), ("before", folder)):
        report = twell_json("eval", "--model", model, "--data", text, "--ffn", "dense")
        perplexity[name] = report["perplexity"]
    assert math.isclose(perplexity["after"], perplexity["before"], rel_tol=2e-3)  # bf16
    assert f"perplexity {perplexity['after']:.4f}, before {perplexity['before']:.4f}" in lines


def test_refuses_by_name(tmp_path, data):
    text, tokenizer = data
    folder, out = tmp_path / "whole", tmp_path / "small"
    write_sparse_model(folder, tokenizer)
    command = ["compact", folder, "--data", text, "--out", out]
    assert "nothing to remove" in refusal(*command, "--multiple", 136)
    assert not out.exists()
    assert str(folder) in refusal("compact", folder, "--data", text, "--out", folder)
    assert "--multiple" in refusal(*command, "--multiple", 12, code=2)
    assert "--out" in refusal("compact", folder, "--data", text, code=2)
    silu = tmp_path / "silu"
    write_model(silu, tokenizer, activation="silu")
    line = refusal("compact", silu, "--data", text, "--out", out)
    assert "silu" in line and "relu" in line
    assert "Examples" in twell("compact", "--help").stdout
