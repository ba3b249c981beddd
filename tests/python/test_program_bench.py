"""`twell bench model` in tiny sizes."""

import json
import math

import pytest
import torch
from program import needs_program, refusal, twell, twell_json, write_text, write_tokenizer
from test_program_generate import write_model

pytestmark = needs_program

SIZES = ["--layers", 2, "--hidden", 64, "--neurons", 136, "--heads", 4, "--kv-heads", 2]
SIZES += ["--vocabulary", 64]
SHAPE = ["--batch", 2, "--tokens", 48, "--seconds", 0]


def bench(out, *arguments, **keywords):
    done = twell("bench", "model", *arguments, *SHAPE, "--json", out, **keywords)
    report = json.loads(out.read_text())
    assert set(report) == {"machine", "results"} and len(report["results"]) == 1
    return done.stdout, report["machine"], report["results"][0]


@pytest.mark.parametrize("mode", ["forward", "eval", "train"])
def test_random_model_with_a_given_density(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("TWELL_COMMIT", "abc123")
    text, machine, result = bench(
        tmp_path / "r.json", "--density", 0.05, *SIZES, "--mode", mode, "--ffn", "dense,twell"
    )
    assert machine["commit"] == "abc123" and machine["threads"] == 1
    assert result["mode"] == mode and result["pattern_verified"] is True
    assert result["rounds"] >= 3
    assert result["ratio"] == result["dense_ms"] / result["twell_ms"]
    assert result["loss_difference"] <= 2e-3
    assert math.isclose(result["loss"]["twell"], result["loss"]["dense"], rel_tol=2e-3)
    for layer in result["active_per_layer"]:
        assert 0.02 * 136 < layer < 0.1 * 136
    assert result["ffn_per_layer"] == {"dense": ["dense"] * 2, "twell": ["sparse"] * 2}
    assert result["energy_mj_per_token"] == {"dense": None, "twell": None}
    assert "CUDA" in result["energy_missing"]
    peaks = result["peak_bytes"].values()
    assert all(peak is None or peak > 4 * result["parameters"] for peak in peaks)
    assert "dense / twell" in text and "tokens/s" in text


def test_kernels_are_those_of_a_gpu():
    command = ["bench", "model", "--density", 0.05, *SIZES, *SHAPE, "--kernels"]
    done = twell(*command, check=False)
    assert done.returncode != 0 and "--kernels needs --device cuda" in done.stderr


def test_checkpoint_has_the_loss_that_eval_gives(tmp_path):
    text = write_text(tmp_path / "text", 1)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", text)
    folder = tmp_path / "model"
    model = write_model(folder, tokenizer)
    _, _, result = bench(
        tmp_path / "r.json", "--checkpoint", folder, "--data", text, "--ffn", "dense,twell,auto"
    )
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["pattern_verified"] is False and result["neurons"] == 136
    report = twell_json("eval", "--model", folder, "--data", text, "--context", 48)
    assert math.isclose(result["loss"]["dense"], report["loss"], rel_tol=0.15)  # four windows of it
    assert result["ratio"] == result["dense_ms"] / result["auto_ms"]


def test_trace_gives_its_activity(tmp_path):
    text = write_text(tmp_path / "text", 2)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", text)
    write_model(tmp_path / "model", tokenizer)
    traces = tmp_path / "traces"
    inspect = ["inspect", "--model", tmp_path / "model", "--data", text, "--save-trace", traces]
    twell(*inspect, "--max-tokens", 64, "--context", 64)
    sizes = [*SIZES[:4], *SIZES[6:]]  # without --neurons
    _, _, result = bench(tmp_path / "r.json", "--trace", traces, *sizes, "--mode", "train")
    assert result["neurons"] == 136 and result["source"] == f"trace {traces}"
    # 32 of the trace's rows are used: half of the hidden size.
    for layer, active in enumerate(result["active_per_layer"]):
        pointers = (traces / f"layer{layer}.rowptr.u32").read_bytes()
        rows = torch.frombuffer(bytearray(pointers), dtype=torch.int32)
        counts = [(rows[i + 1] - rows[i]).item() for i in range(32)]
        windows = [[(start + i) % 32 for i in range(48)] for start in (0, 16)]
        mean = sum(counts[row] for window in windows for row in window) / 96
        assert math.isclose(active, mean)


def test_refuses_by_name(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", write_text(tmp_path / "text", 1))
    model = tmp_path / "model"
    write_model(model, tokenizer, activation="silu")
    data = ["--data", tmp_path / "text"]
    assert "--density" in refusal("bench", "model", *SIZES, *SHAPE)
    assert "--density" in refusal("bench", "model", "--density", 0.1, "--checkpoint", model)
    assert "--data" in refusal("bench", "model", "--checkpoint", model, *SHAPE)
    assert "--data" in refusal("bench", "model", "--density", 0.1, *data, *SHAPE)
    line = refusal("bench", "model", "--checkpoint", model, *data, "--layers", 2)
    assert "--layers" in line
    assert "silu" in refusal("bench", "model", "--checkpoint", model, *data, *SHAPE)
    twice = refusal("bench", "model", "--density", 0.1, *SIZES, *SHAPE, "--ffn", "dense,dense")
    assert "twice" in twice
    assert "--ffn" in refusal("bench", "model", "--density", 0.1, "--ffn", "sparse", code=2)
    assert "--mode" in refusal("bench", "model", "--density", 0.1, "--mode", "both", code=2)
    assert "--heads" in refusal("bench", "model", "--density", 0.1, "--hidden", 60, "--heads", 7)
    assert "Examples" in twell("bench", "model", "--help").stdout
