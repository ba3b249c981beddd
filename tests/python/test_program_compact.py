"""`twell compact`, against a count of the firing neurons by `transformers`."""

import json
import math

import pytest
import torch
from program import needs_program, refusal, twell, twell_json, write_text, write_tokenizer
from safetensors.torch import load_file
from test_program_bench import SIZES, bench
from test_program_generate import encode, write_model
from test_program_train import kill_and_resume, metrics, start
from transformers import AutoModelForCausalLM

from twell import from_pretrained

pytestmark = needs_program

NEURONS = 136
DEAD = {0: 80, 1: 60}  # neurons per layer whose gate row is zero


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_tokenizer(folder / "tokenizer.json", write_text(folder / "text"), bos=True)
    (folder / "data.txt").write_text((folder / "text" / "3.h").read_text()[:600])
    return folder / "data.txt", tokenizer


def write_sparse_model(folder, tokenizer, kind="llama", dead=DEAD, **changes):
    """A random model in which some neurons cannot fire; returned in evaluation mode."""
    model = write_model(folder, tokenizer, kind, **changes)
    with torch.no_grad():
        for layer, count in dead.items():
            order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(layer))
            model.model.layers[layer].mlp.gate_proj.weight[order[:count]] = 0
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


def compact(folder, text, out, *options):
    return twell_json(
        "compact", folder, "--data", text, "--out", out, "--dtype", "float32", *options
    )


def kept_neurons(alive, width):
    """Those that fired, and so many of the others, from the first on, as fill the width."""
    silent = (~alive).nonzero().flatten()[: width - int(alive.sum())]
    return torch.cat([alive.nonzero().flatten(), silent]).sort().values


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [[], ["--one-width"]])
@pytest.mark.parametrize("multiple", [8, 32])
def test_removes_what_never_fires_and_nothing_else(tmp_path, data, kind, multiple, options):
    text, tokenizer = data
    folder, out = tmp_path / "whole", tmp_path / "small"
    model = write_sparse_model(folder, tokenizer, kind, tied=kind == "qwen2", num_hidden_layers=2)
    ids = torch.tensor([*encode(tokenizer, text.read_text()), 0])[:129]
    assert len(ids) > 64
    alive, before = fired(model, ids[:-1])
    counts = [int(neurons.sum()) for neurons in alive]
    assert all(count <= NEURONS - DEAD[layer] for layer, count in enumerate(counts))

    rounding = ["--multiple", multiple, *options]
    report = compact(folder, text, out, "--max-tokens", len(ids) - 1, *rounding)
    widths = [-(-count // multiple) * multiple for count in counts]
    assert widths[0] < widths[1]
    if options:
        widths = [max(widths)] * 2
    layers = report["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert [layer["fired"] for layer in layers] == counts
    assert [layer["neurons_after"] for layer in layers] == widths
    assert all(layer["neurons_before"] == NEURONS for layer in layers)
    assert report["neurons_before"] == 2 * NEURONS and report["neurons_after"] == sum(widths)
    assert report["one_width"] is bool(options)

    load = AutoModelForCausalLM.from_pretrained if options else from_pretrained
    small = load(out, dtype=torch.float32).eval()
    assert small.config.intermediate_size == (widths[0] if options else widths)
    assert small.config.hidden_act == "relu"
    for layer, neurons in enumerate(alive):
        bytes_before = bytes_after = 0
        for name in ("gate_proj", "up_proj", "down_proj"):
            old, new = (getattr(m.model.layers[layer].mlp, name).weight for m in (model, small))
            bytes_before, bytes_after = bytes_before + old.nbytes, bytes_after + new.nbytes
            if name == "down_proj":
                old, new = old.T, new.T
            assert torch.equal(new, old[kept_neurons(neurons, widths[layer])])
        assert layers[layer]["bytes_before"] == bytes_before
        assert layers[layer]["bytes_after"] == bytes_after
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


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    """A model of three layers and what is left of it: in the first nothing ever fires."""
    text, tokenizer = data
    folder = tmp_path_factory.mktemp("pair")
    dead = {0: NEURONS, 1: 80, 2: 40}
    write_sparse_model(folder / "whole", tokenizer, dead=dead, num_hidden_layers=3)
    report = compact(folder / "whole", text, folder / "small", "--multiple", 16)
    widths = [layer["neurons_after"] for layer in report["layers"]]
    assert report["layers"][0]["fired"] == 0
    assert widths[0] == 16 and widths[0] < widths[1] < widths[2]
    return folder / "whole", folder / "small", widths


def test_a_checkpoint_of_uneven_layers_says_so(pair):
    _, small, widths = pair
    config = json.loads((small / "config.json").read_text())
    assert config["model_type"] == "twell_llama" and config["intermediate_size"] == widths


@pytest.mark.parametrize("ffn", ["dense", "twell", "auto"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_evaluates_and_generates_as_before(data, pair, tmp_path, ffn, dtype, tolerance):
    text, _ = data
    run = ["--ffn", ffn, "--dtype", dtype]
    reports, logits, ids = [], [], []
    for number, folder in enumerate(pair[:2]):
        path = tmp_path / str(number)
        command = ["eval", "--model", folder, "--data", text, *run, "--save-logits", path]
        reports.append(twell_json(*command))
        logits.append(load_file(path)["logits"])
        prompt = ["--prompt", "int f1(int", "--temperature", 0, "--max-tokens", 20]
        ids.append(twell_json("generate", "--model", folder, *prompt, *run)["ids"])
    whole, small = reports
    assert math.isclose(small["perplexity"], whole["perplexity"], rel_tol=tolerance)
    assert whole["neurons"] == NEURONS and small["neurons"] == pair[2]
    assert math.isclose(small["active_share"], 3 * small["active"] / sum(pair[2]))
    if dtype == "float32":
        assert small["active_per_layer"] == pytest.approx(whole["active_per_layer"], rel=1e-3)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        assert ids[1] == ids[0]


def test_inspects_and_benches_uneven_layers(data, pair, tmp_path):
    text, tokenizer = data
    whole, small, widths = pair
    traces = tmp_path / "traces"
    window = ["--data", text, "--max-tokens", 64, "--context", 64, "--dtype", "float32"]
    before = twell_json("inspect", "--model", whole, *window)["layers"]
    after = twell_json("inspect", "--model", small, *window, "--save-trace", traces)["layers"]
    assert [layer["neurons"] for layer in after] == widths
    for old, new in zip(before, after, strict=True):
        assert new["active_mean"] == pytest.approx(old["active_mean"], rel=1e-2)
        assert new["union_mean"] == pytest.approx(old["union_mean"], rel=1e-2)
        assert new["silent"] == old["silent"] - (NEURONS - new["neurons"])
    drawn = twell("inspect", "--model", small, *window).stdout
    assert f"neurons of each: {widths[0]} to {widths[2]}" in drawn

    checkpoint = ["--checkpoint", small, "--data", tokenizer.parent / "text"]
    trace = ["--trace", traces, "--layers", 3, *SIZES[2:4], *SIZES[6:]]
    for source in (checkpoint, trace):
        _, _, result = bench(tmp_path / "r.json", *source, "--ffn", "dense,twell,auto")
        assert result["neurons"] == widths


def test_trains_uneven_layers_further(data, pair, tmp_path):
    _, tokenizer = data
    _, small, widths = pair
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    run = ["--data", tokenizer.parent / "text", "--init", small, "--context", 32, "--batch", 4]
    run += ["--heldout", 0.2, "--target-active", "50%", "--steps", 40, "--checkpoint-every", 3]
    run += ["--revive-after", 4, "--log-every", 1]
    summary = twell_json("train", *run, "--out", whole)
    assert summary["neurons"] == widths
    assert math.isclose(summary["target_active"], sum(widths) / 6)
    assert math.isclose(summary["active_share"], 3 * summary["active"] / sum(widths))
    assert summary["revived"] >= widths[0]
    first = metrics(whole)[0]
    assert first["silent_per_layer"][0] == widths[0] and first["active_per_layer"][0] == 0
    assert math.isclose(first["share"], sum(first["active_per_layer"]) / sum(widths))
    config = json.loads((whole / "config.json").read_text())
    assert config["model_type"] == "twell_llama" and config["intermediate_size"] == widths
    # It goes on after kills, too, to the same bits.
    kill_and_resume(start("train", *run, "--out", folder), folder, kills=2)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_compacts_what_it_compacted(data, pair, tmp_path):
    text, _ = data
    whole, small, widths = pair
    again = ["compact", small, "--data", text, "--out", tmp_path / "again", "--dtype", "float32"]
    assert "nothing to remove" in refusal(*again, "--multiple", 16)
    # On less text fewer fire.
    fewer = compact(small, text, tmp_path / "fewer", "--multiple", 8, "--max-tokens", 4)
    assert fewer["neurons_before"] == sum(widths) and fewer["neurons_after"] < sum(widths)
    assert math.isclose(fewer["loss_after"], fewer["loss_before"], rel_tol=1e-3)
    # With one width for all, transformers loads it: zeros fill up.
    one = compact(small, text, tmp_path / "one", "--multiple", 16, "--one-width")
    assert {layer["neurons_after"] for layer in one["layers"]} == {widths[2]} and one["one_width"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    ids = torch.tensor([encode(data[1], text.read_text())[:64]])
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


def test_keeps_the_dtype_and_says_what_it_did(tmp_path, data):
    text, tokenizer = data
    folder, out = tmp_path / "whole", tmp_path / "small"
    write_sparse_model(folder, tokenizer).bfloat16().save_pretrained(folder)
    command = ["compact", folder, "--data", text, "--multiple", 8]
    lines = twell(*command, "--out", out).stdout
    assert f"of {2 * NEURONS} neurons" in lines and "perplexity" in lines
    assert "transformers needs --one-width" in lines
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    perplexity = {}
    for name, model in (("after", out), ("before", folder)):
        report = twell_json("eval", "--model", model, "--data", text, "--ffn", "dense")
        perplexity[name] = report["perplexity"]
    assert math.isclose(perplexity["after"], perplexity["before"], rel_tol=2e-3)  # bf16
    assert f"perplexity {perplexity['after']:.4f}, before {perplexity['before']:.4f}" in lines
    lines = twell(*command, "--one-width", "--out", tmp_path / "one").stdout
    assert "transformers loads it" in lines


def test_bad_widths_are_named(pair, tmp_path):
    _, small, widths = pair
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    config = json.loads((small / "config.json").read_text())
    for change, complaint in (
        (widths[:2], "an array of num_hidden_layers = 3"),
        ([widths[0], 0, widths[2]], "intermediate_size[1]"),
        ([widths[0], widths[1] + 4, widths[2]], "multiple of 8"),
        ([widths[0], widths[1] + 8, widths[2]], "model.layers.1.mlp"),
        (widths[2], "an array"),
    ):
        changed = config | {"intermediate_size": change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert complaint in refusal("generate", "--model", tmp_path, "--prompt", "x")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "must be an integer" in refusal("generate", "--model", tmp_path, "--prompt", "x")


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
