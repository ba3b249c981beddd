"""`twell train`: what it writes, what it survives, what it refuses."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from program import (
    PROGRAM,
    needs_program,
    refusal,
    twell,
    twell_json,
    write_text,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file

pytestmark = needs_program

MODEL = ["--layers", 2, "--hidden", 64, "--neurons", 128, "--heads", 2, "--kv-heads", 1]
MODEL += ["--context", 32]
RUN = ["--batch", 4, "--log-every", 5, "--eval-every", 20, "--eval-tokens", 512]
RUN += ["--checkpoint-every", 7, "--heldout", 0.2, "--target-active", "10%"]
STEPS = ["--steps", 60]
FOREVER = ["--steps", 100000]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    text = write_text(folder / "text")
    tokenizer = write_tokenizer(folder / "tokenizer.json", text)
    return ["--data", text, "--tokenizer", tokenizer]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """An uninterrupted run: its folder and its summary."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, twell_json("train", *inputs, "--out", folder, *MODEL, *RUN, *STEPS)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_reports(trained):
    folder, summary = trained
    assert summary["heldout_loss"] < summary["unigram_loss"]
    assert summary["loss_unit"] == "nats per token"
    assert summary == json.loads((folder / "summary.json").read_text())
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    assert [line["step"] for line in lines if "heldout_loss" in line] == [20, 40, 60]
    for line in lines:
        assert len(line["active_per_layer"]) == len(line["silent_per_layer"]) == 2
        assert math.isclose(line["share"], sum(line["active_per_layer"]) / 2 / 128)
    assert lines[-1]["active"] < lines[0]["active"]


def test_transformers_loads_it_and_agrees(trained, inputs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.hidden_act == "relu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = folder / "logits.safetensors"
    report = twell_json(
        "eval", "--model", folder, "--data", inputs[1] / "3.h", "--max-tokens", 32, "--ffn",
        "dense", "--dtype", "float32", "--save-logits", logits,
    )  # fmt: skip
    ours = load_file(logits)
    ids = tokenizer((inputs[1] / "3.h").read_text())["input_ids"][:33]
    assert ours["tokens"].tolist() == ids[:32]
    with torch.no_grad():
        theirs = model(torch.tensor([ids[:32]])).logits[0]
    torch.testing.assert_close(ours["logits"], theirs, rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(ids[1:33])).item()
    assert math.isclose(report["loss"], loss, rel_tol=1e-5)


def test_dense_and_twell_evaluate_alike(trained, inputs):
    folder, _ = trained
    reports = [
        twell_json("eval", "--model", folder, *inputs[:2], "--ffn", ffn)
        for ffn in ("dense", "twell", "auto")
    ]
    for report in reports:
        assert math.isclose(report["perplexity"], reports[0]["perplexity"], rel_tol=5e-4)
        assert math.isclose(report["active"], reports[0]["active"], rel_tol=2e-2)
    assert reports[1]["ffn_per_layer"] == ["sparse", "sparse"]


def is_heldout(text, share):
    """FNV-1a, finished by MurmurHash3's mixer, as a share of 2^53: app/data/text.h."""
    value, mask = 0xCBF29CE484222325, 2**64 - 1
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & mask
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor & mask
    return ((value ^ value >> 33) >> 11) * 2.0**-53 < share


@pytest.mark.parametrize("bos", [False, True])
def test_evaluation_sees_the_tokens_that_training_held_out(tmp_path, bos):
    """Also where the tokenizer's template starts each document with a token."""
    text, heldout, run = write_text(tmp_path / "text"), tmp_path / "heldout", tmp_path / "run"
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", text, bos=bos)
    heldout.mkdir()
    for file in text.iterdir():
        if is_heldout(file.read_text(), 0.2):
            (heldout / file.name).write_bytes(file.read_bytes())
    data = ["--data", text, "--tokenizer", tokenizer, "--out", run, "--ffn", "dense"]
    run_options = ["--steps", 8, "--batch", 4, "--heldout", 0.2, "--target-active", "10%"]
    summary = twell_json("train", *data, *MODEL, *run_options)
    logits = tmp_path / "logits.safetensors"
    report = twell_json(
        "eval", "--model", run, "--data", heldout, "--ffn", "dense", "--context", 32,
        "--batch", 4, "--save-logits", logits,
    )  # fmt: skip
    assert report["tokens"] == summary["heldout_tokens"]
    assert math.isclose(report["loss"], summary["heldout_loss"], rel_tol=1e-4)
    first = load_file(logits)["tokens"][0].item()
    ids = json.loads((run / "tokenizer.json").read_text())["added_tokens"]
    assert (first == {token["content"]: token["id"] for token in ids}.get("<|bos|>")) == bos


def start(*arguments):
    command = [str(PROGRAM), *map(str, arguments), "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(process, folder):
    while not (folder / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def wait_for_steps(process, folder):
    """Until the run, just started, has written a checkpoint and gone on from it."""

    def wait_for_another(name, look):
        before = now = look(folder / name)
        while now == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
            now = look(folder / name)

    wait_for_another(
        "checkpoint.safetensors", lambda path: path.exists() and path.stat().st_mtime_ns
    )
    wait_for_another("metrics.jsonl", lambda path: path.stat().st_size)


def kill_and_resume(process, folder, kills, *more, wait=wait_for_checkpoint, seconds=0.6):
    """Kills the run at random moments, resumes it each time, and waits for its end."""
    moments = random.Random(kills)
    for _ in range(kills):
        wait(process, folder)
        time.sleep(moments.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start("train", "--resume", "--out", folder, *more)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def check_same_run(folder, whole):
    """The same bits of all that was trained and is needed to go on, and the same metrics."""
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (load_file(path / "checkpoint.safetensors") for path in (folder, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    ours, theirs = metrics(folder), metrics(whole)
    for name in ("step", "loss", "active_per_layer", "revived_per_layer"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name
    assert ours[-1]["heldout_loss"] == theirs[-1]["heldout_loss"]


def test_kill_at_random_moments_resumes_to_the_same_bits(trained, inputs, tmp_path):
    whole, _ = trained
    folder = tmp_path / "run"
    process = start("train", *inputs, "--out", folder, *MODEL, *RUN, *STEPS)
    kill_and_resume(process, folder, kills=5)
    check_same_run(folder, whole)


@pytest.fixture(scope="module")
def dead(trained, tmp_path_factory):
    """The trained model with a second layer that cannot fire."""
    folder = tmp_path_factory.mktemp("dead") / "model"
    shutil.copytree(trained[0], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_dead_layer_recovers_only_by_revival(dead, inputs, tmp_path):
    summaries = {}
    for after in (0, 6):
        out = tmp_path / str(after)
        run = ["--init", dead, "--out", out, *RUN, "--context", 32, "--steps", 40]
        summaries[after] = twell_json("train", *inputs[:2], *run, "--revive-after", after)
        lines = metrics(out)
        assert lines[0]["silent_per_layer"][1] == 128  # steps 1 to 5
        assert sum(sum(line["revived_per_layer"]) for line in lines) == summaries[after]["revived"]
        if after:
            assert lines[0]["revived_per_layer"][1] == 0
            assert lines[1]["revived_per_layer"][1] == 128  # all of them at step 6
    assert summaries[0]["revived"] == 0 and summaries[0]["silent_per_layer"][1] == 128
    assert summaries[6]["revived"] >= 128 and summaries[6]["silent_per_layer"][1] < 64
    assert summaries[6]["active_per_layer"][1] > 1


def test_revival_survives_kills_to_the_same_bits(dead, inputs, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    options = [*inputs[:2], "--init", dead, *RUN, "--context", 32, *STEPS, "--revive-after", 9]
    assert twell_json("train", *options, "--out", whole)["revived"] >= 128
    process = start("train", *options, "--out", folder)
    kill_and_resume(process, folder, kills=4)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    summary, other = (json.loads((f / "summary.json").read_text()) for f in (whole, folder))
    assert summary["revived"] == other["revived"]
    counters = [load_file(f / "checkpoint.safetensors")["idle"] for f in (whole, folder)]
    assert torch.equal(*counters) and counters[0].shape == (2 * 128,)


def test_accumulation_is_a_larger_batch(inputs, tmp_path):
    """The same windows in the same steps: what differs is the rounding of bf16 products alone."""
    options = ["--heldout", 0.2, "--target-active", "10%", "--steps", 4, "--log-every", 1]
    runs = {}
    for batch, parts in ((8, 1), (4, 2), (2, 4)):
        out = tmp_path / str(parts)
        split = ["--batch", batch, "--accumulate", parts]
        twell("train", *inputs, "--out", out, *MODEL, *options, *split, "--ffn", "dense")
        runs[parts] = metrics(out)
    for parts in (2, 4):
        for ours, whole in zip(runs[parts], runs[1], strict=True):
            assert ours["tokens"] == whole["tokens"]
            first = ours["step"] == 1
            for name, tolerance in (("loss", 1e-6), ("gradient_norm", 5e-3), ("active", 1e-3)):
                limit = tolerance if first else 1e-2
                assert math.isclose(ours[name], whole[name], rel_tol=limit), (parts, name)


def peak_memory(*arguments):
    """Greatest resident bytes of `twell arguments…`, as last seen before its end."""
    with start(*arguments) as process:
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
            peak = int(lines[0].split()[1]) * 1024 if lines else peak  # none: it is ending
            time.sleep(0.005)
        assert process.returncode == 0, process.stderr.read()
    return peak


def test_checkpointed_activations_save_memory_and_change_no_bit(inputs, tmp_path):
    layers, neurons, tokens = 8, 512, 16 * 256
    shape = ["--layers", layers, "--hidden", 32, "--neurons", neurons, "--heads", 2]
    shape += ["--kv-heads", 1, "--context", 256, "--batch", 16, "--heldout", 0.2]
    peaks = {}
    for name, flags in (("kept", []), ("dropped", ["--checkpoint-activations"])):
        out = ["--out", tmp_path / name, "--steps", 3, "--eval-tokens", 256, *flags]
        peaks[name] = peak_memory("train", *inputs, *out, *shape, "--ffn", "dense")
    kept, dropped = ((tmp_path / name / "model.safetensors").read_bytes() for name in peaks)
    assert kept == dropped
    saved = 3 * tokens * neurons * 2  # g, u and h of a layer, bf16
    assert peaks["kept"] - peaks["dropped"] > (layers - 2) * saved / 2, peaks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_go_on(inputs, tmp_path, number):
    folder = tmp_path / "run"
    process = start("train", *inputs, "--out", folder, *MODEL, *RUN, *FOREVER)
    wait_for_checkpoint(process, folder)
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    last = errors.splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith("twell: interrupted after step ")
    assert last.endswith(f"twell train --resume --out {folder}")


def test_full_disk_is_one_line_and_keeps_the_checkpoint(trained, inputs, tmp_path):
    """A limit on file sizes stands for the full disk: write() fails in the same place."""
    folder = tmp_path / "run"
    process = start("train", *inputs, "--out", folder, *MODEL, *RUN, *FOREVER)
    wait_for_checkpoint(process, folder)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    before = (folder / "checkpoint.safetensors").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = len(before) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    line = refusal("train", "--resume", "--out", folder, preexec_fn=limit)
    assert "checkpoint.safetensors" in line
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    assert not list(folder.glob(".*.tmp"))


def test_follows_a_time_budget(inputs, tmp_path):
    folder = tmp_path / "run"
    summary = twell_json("train", *inputs, "--out", folder, *MODEL, *RUN, "--max-seconds", 4)
    assert 4 <= summary["train_seconds"] < 12
    rates = [line["lr"] for line in metrics(folder)]
    assert max(rates) > 2e-3 and rates[-1] < 1e-3


def test_bad_inputs_are_named(inputs, trained, tmp_path):
    data, tokenizer = inputs[1], inputs[3]
    out = ["--out", tmp_path / "run"]
    fresh = ["train", *inputs, *out]
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00abc")
    empty = tmp_path / "empty.txt"
    empty.touch()
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text(tokenizer.read_text()[:1000])
    nowhere = tmp_path / "nowhere"

    assert "--steps" in refusal(*fresh)
    assert "100" in refusal(*fresh, "--steps", 1, "--neurons", 100)
    assert "5000" in refusal(*fresh, "--steps", 1, "--target-active", 5000)
    for bad in (binary, empty, nowhere):
        line = refusal("train", "--data", bad, "--tokenizer", tokenizer, *out, "--steps", 1)
        assert str(bad) in line
    line = refusal("train", "--data", data, "--tokenizer", damaged, *out, "--steps", 1)
    assert str(damaged) in line
    assert "--eos" in refusal(*fresh, "--steps", 1, "--eos", "<none>")
    assert str(nowhere) in refusal("train", "--resume", "--out", nowhere)
    assert "--resume" in refusal("train", *inputs, "--out", trained[0], "--steps", 1)
    if not torch.cuda.is_available():
        assert "cuda" in refusal(*fresh, "--steps", 1, "--device", "cuda")


def test_usage_errors_end_with_code_2(inputs, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert "--out" in refusal("train", *inputs, code=2)
    assert "--data" in refusal("train", *out, code=2)
    assert "--ffn" in refusal("train", *inputs, *out, "--ffn", "sparse", code=2)
    assert "--lr" in refusal("train", "--resume", *out, "--lr", 1, code=2)
    assert "frobnicate" in refusal("frobnicate", code=2)


def test_help_has_examples():
    for command in ("train", "eval", "generate"):
        assert f"twell {command} " in twell(command, "--help").stdout.split("Examples:")[1]


def test_damaged_checkpoint_is_refused(trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in os.listdir(trained[0]):
        (folder / name).write_bytes((trained[0] / name).read_bytes())
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in refusal("train", "--resume", "--out", folder)
