"""The program on CUDA in bf16: its sparse and its planned FFNs against dense ones and the CPU's,
and a run that is killed."""

import json
import math

import pytest
from program import needs_program, twell, twell_json, write_text, write_tokenizer
from safetensors.torch import load_file
from test_program_train import check_same_run, kill_and_resume, start, wait_for_steps

pytestmark = [pytest.mark.gpu, needs_program]

GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Lines that leave a model in doubt, and some that do not."""
    folder = write_text(tmp_path_factory.mktemp("cuda") / "text")
    for number in range(10):
        (folder / f"greek{number}.h").write_text(GREEK * 20)
    return folder


@pytest.fixture(scope="module")
def tokenizer(text):
    return write_tokenizer(text.parent / "tokenizer.json", text)


def training(text, tokenizer, folder, **flags):
    """The arguments that train a small model."""
    flags = {
        "data": text, "tokenizer": tokenizer, "out": folder,
        "layers": 2, "hidden": 64, "neurons": 256, "heads": 2, "kv-heads": 1, "context": 128,
        "batch": 4, "target-active": "10%", "heldout": 0.2, **flags,
    }  # fmt: skip
    words = ((f"--{name.replace('_', '-')}", value) for name, value in flags.items())
    return ["train", *(word for pair in words for word in pair)]


@pytest.fixture(scope="module")
def model(text, tokenizer):
    """A small model, trained on the CPU until it is sparse."""
    folder = text.parent / "model"
    twell(*training(text, tokenizer, folder, steps=150, log_every=50))
    return folder


def evaluate(model, data, device, ffn, *more):
    return twell_json(
        "eval", "--model", model, "--data", data, "--device", device, "--ffn", ffn, *more
    )


@pytest.mark.parametrize(
    "windows",
    [[], ["--context", 64, "--batch", 1, "--max-tokens", 1024]],
    ids=["many tokens at a time", "few"],
)
def test_evaluates_alike(model, text, windows):
    dense = evaluate(model, text, "cuda", "dense", *windows)
    assert dense["ffn_per_layer"] == ["dense", "dense"]
    assert 0 < dense["active"] < 0.3 * dense["neurons"]
    on_cpu = evaluate(model, text, "cpu", "twell", *windows)
    for ffn in ("twell", "auto"):
        report = evaluate(model, text, "cuda", ffn, *windows)
        assert report["dtype"] == "bfloat16" and report["tokens"] == dense["tokens"]
        if ffn == "twell":
            assert report["ffn_per_layer"] == ["sparse", "sparse"]
        for other in (dense, on_cpu):
            assert math.isclose(report["perplexity"], other["perplexity"], rel_tol=5e-4)
            assert report["active_per_layer"] == pytest.approx(other["active_per_layer"], rel=2e-2)


def logits(model, data, device, dtype, out):
    """Of the first window of `data`, dense: its tokens, and the logits of the token after each."""
    flags = ["--dtype", dtype, "--max-tokens", 128, "--save-logits", out]
    evaluate(model, data, device, "dense", *flags)
    saved = load_file(out)
    return saved["tokens"].tolist(), saved["logits"]


def test_generates_alike(model, tmp_path):
    """Greedily, as far as the likeliest token leads by more than bf16 can be wrong."""

    def generate(device, ffn, dtype="bfloat16"):
        flags = ["--max-tokens", 80, "--temperature", 0, "--dtype", dtype]
        where = ["--device", device, "--ffn", ffn]
        return twell_json("generate", "--model", model, "--prompt", GREEK, *where, *flags)

    want = generate("cpu", "dense", "float32")
    text = tmp_path / "text.txt"
    text.write_text(GREEK + want["text"])
    tokens, exact = logits(model, text, "cpu", "float32", tmp_path / "exact.safetensors")
    _, rounded = logits(model, text, "cuda", "bfloat16", tmp_path / "rounded.safetensors")
    # Either of two logits may be wrong, and by twice as much as those of the dense FFN are.
    allowed = 4 * (rounded - exact).abs().max()
    safe, first = 0, want["prompt_tokens"]
    places = zip(want["ids"], tokens[first:], exact[first - 1 :], strict=False)
    for token, encoded, choices in places:
        likeliest, second = choices.topk(2).values
        if token != encoded or likeliest - second <= allowed:
            break
        safe += 1
    assert safe >= 16
    for ffn in ("dense", "twell", "auto"):
        report = generate("cuda", ffn)
        assert report["prompt_tokens"] == first
        assert report["ids"][:safe] == want["ids"][:safe], ffn


def test_inspects_alike(model, text):
    sizes = ["--max-tokens", 1024, "--context", 64]
    found = {}
    for device in ("cuda", "cpu"):
        command = ["inspect", "--model", model, "--data", text, "--device", device, *sizes]
        report = twell_json(*command)
        assert report["tokens"] == 1024
        assert [layer["neurons"] for layer in report["layers"]] == [256, 256]
        for layer in report["layers"]:
            assert all(ratio > 0 for ratio in layer["predicted"].values())
        found[device] = [layer["active_mean"] for layer in report["layers"]]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=2e-2)
    counted = evaluate(model, text, "cuda", "twell", *sizes)["active_per_layer"]
    assert found["cuda"] == pytest.approx(counted, rel=2e-2)


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize(
    ("ffn", "tokens", "density", "path"),
    [
        ("twell", 1, 0.01, "twell"),
        ("twell", 300, 0.5, "twell"),
        ("auto", 1, 0.01, "twell"),
        ("auto", 300, 0.5, "dense"),
    ],
)
def test_times_a_block(tmp_path, kind, ffn, tokens, density, path):
    out = tmp_path / "ffn.json"
    flags = {
        "hidden": 256, "neurons": 1024, "tokens": tokens, "density": density, "ffn-kind": kind,
        "ffn": ffn, "device": "cuda", "seconds": 0, "json": out,
    }  # fmt: skip
    twell("bench", "ffn", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    report = json.loads(out.read_text())
    result = report["results"][0]
    assert result["pattern_verified"] is True
    assert result["path"] == path
    assert result["twell_error"] <= 1.1 * result["dense_error"]
    assert result["active_mean"] == pytest.approx(density * 1024, rel=0.2)
    assert min(result["dense_ms"], result["twell_ms"]) > 0


def test_kills_resume_to_the_same_bits(text, tokenizer, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    device = ["--device", "cuda"]

    def run(out):
        flags = {"steps": 300, "checkpoint_every": 7, "log_every": 1, "revive_after": 9}
        return [*training(text, tokenizer, out, ffn="twell", **flags), *device]

    twell(*run(whole))
    process = start(*run(folder))
    kill_and_resume(process, folder, 3, *device, wait=wait_for_steps, seconds=0.1)
    check_same_run(folder, whole)
