"""The drivers of the GPU benchmarks, on the CPU in tiny sizes, and what the docs show of them."""

import json
import os
import re
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT, needs_program

TINY = ["layers=2", "hidden=64", "neurons=128", "heads=2", "kv-heads=2", "context=32", "batch=4"]
TINY += ["eval-tokens=512", "log-every=2", "heldout=0.2", "threads=1"]


def run(script, *arguments):
    command = [sys.executable, ROOT / "bench" / script, "--twell", PROGRAM, "--device", "cpu"]
    command += arguments
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "TWELL_COMMIT": "abc1234"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def train_run(folder, *arguments):
    return run(
        "train_run.py",
        *("--state", folder / "state", "--json", folder / "run.json", "--data", ROOT / "scripts"),
        *("--vocabulary", 400, "--target-active", "10", "--set", *TINY),
        *arguments,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    answer = train_run(folder, "--steps", 40)
    assert answer.returncode == 0, answer.stderr
    return folder, json.loads((folder / "run.json").read_text())


@needs_program
def test_both_runs_see_the_same_tokens(finished):
    folder, report = finished
    assert report["complete"] and report["machine"]["commit"] == "abc1234"
    dense, sparse = report["dense"], report["sparse"]
    for name in ("steps", "tokens", "train_tokens", "heldout_tokens"):
        assert dense["summary"][name] == sparse["summary"][name], name
    assert dense["curves"]["step"] == sparse["curves"]["step"] == list(range(2, 41, 2))
    assert set(dense["curves"]["lambda"]) == {0}
    assert sparse["curves"]["lambda"][-1] > 0
    assert sparse["curves"]["active"][-1] < dense["curves"]["active"][-1]
    assert {name for line in dense["curves"]["ffn_per_layer"] for name in line} == {"dense"}
    assert dense["heldout"]["step"] == list(range(2, 41, 2))
    both = report["comparison"]
    loss = [run["summary"]["heldout_loss"] for run in (sparse, dense)]
    assert both["loss_ratio"] == loss[0] / loss[1]
    assert both["step_seconds"]["dense"] <= dense["summary"]["train_seconds"]

    # Nothing is done twice.
    before = (folder / "state/dense/metrics.jsonl").stat().st_mtime_ns
    answer = train_run(folder, "--steps", 40)
    assert answer.returncode == 0, answer.stderr
    assert (folder / "state/dense/metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((folder / "run.json").read_text()) == report


@needs_program
def test_both_runs_may_go_at_once(tmp_path, finished):
    answer = train_run(tmp_path, "--steps", 40, "--device", "cpu", "cpu")
    assert answer.returncode == 0, answer.stderr
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["settings"]["at_once"]
    for leg in ("dense", "sparse"):
        assert report[leg]["curves"]["loss"] == finished[1][leg]["curves"]["loss"]


@needs_program
def test_goes_on_after_its_budget(tmp_path):
    steps = []
    for _ in range(2):
        # In a loop, since the machine may be too busy to come to a step in this time.
        for budget in (8, 20, 60):
            answer = train_run(tmp_path, "--steps", 10**6, "--budget", budget, "--save-seconds", 1)
            assert answer.returncode == 3, answer.stderr
            report = json.loads((tmp_path / "run.json").read_text())
            assert not report["complete"] and report["comparison"] is None
            if "dense" in report and report["dense"]["curves"]["step"][-1:] > steps[-1:]:
                break
        steps.append(report["dense"]["curves"]["step"][-1])
        assert "sparse" not in report
    assert 0 < steps[0] < steps[1]


@needs_program
def test_models_are_timed_case_by_case(tmp_path, finished):
    sys.path.insert(0, str(ROOT / "bench"))
    import run_model

    traces = tmp_path / "traces"
    model = finished[0] / "state/dense"
    command = [PROGRAM, "inspect", "--model", model, "--data", ROOT / "scripts/env"]
    command += ["--save-trace", traces, "--threads", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    script = (ROOT / "bench/run_model.py").read_text()
    assert len(run_model.CASES) == 12 and run_model.SIZES["hidden"] == 2048
    # All of it on an H200, with a trained model of 8 layers.
    jobs = [*run_model.CASES, *(case for case in run_model.CASES if case["layers"] == 8)]
    assert sum(map(run_model.expected_seconds, [*jobs, *run_model.DENSE_CASES])) <= 380
    small = (
        script.replace("2048", "16").replace("49152", "512").replace('"batch": 64', '"batch": 2')
    )
    small = small.replace('"layers": 8', '"layers": 2')
    small = re.sub('"layers": [123]8', '"layers": 3', small)
    small = small.replace('"hidden": 16', '"hidden": 64').replace("32", "2")
    (tmp_path / "bench").mkdir()
    for name in ("gpu_machine.py", "run_ffn.py"):
        (tmp_path / "bench" / name).write_text((ROOT / "bench" / name).read_text())
    (tmp_path / "bench/run_model.py").write_text(small)
    out = tmp_path / "model.json"
    answer = run(
        tmp_path / "bench/run_model.py",
        *("--traces", traces, "--out", out, "--seconds", 0),
        *("--checkpoint", model, "--data", ROOT / "scripts"),
    )
    assert answer.returncode == 0, answer.stderr
    assert "18 cases, about " in answer.stdout and answer.stdout.count(" expected\n") == 18
    report = json.loads(out.read_text())
    assert report["machine"]["commit"] == "abc1234"
    rows = [
        (row["source"], row["layers"], row["mode"], row["checkpoint_activations"])
        for row in report["results"]
    ]
    cases = [("forward", False), ("eval", False), ("train", False), ("train", True)]
    assert rows == [
        *(("traces", 2, *case) for case in cases),
        *2 * [("traces", 3, *case) for case in cases if case[0] != "eval"],
        ("traces", 3, "forward", False),
        ("traces", 3, "train", True),
        *(("random", 2, mode, False) for mode in ("forward", "train")),
        *(("checkpoint", 2, *case) for case in cases),
    ]
    compared = {}
    for row in report["results"]:
        forms = tuple(form for form in ("dense", "auto", "twell") if f"{form}_ms" in row)
        compared[row["source"], row["layers"], row["mode"], row["checkpoint_activations"]] = forms
    for mode in ("forward", "train"):
        assert compared["traces", 2, mode, False] == ("dense", "auto", "twell")
        assert compared["random", 2, mode, False] == ("dense", "auto")
        assert compared["traces", 3, mode, mode == "train"] == ("dense", "twell")
    assert str(traces) not in out.read_text() and str(model) not in out.read_text()


def test_kernels_are_listed_of_some_cases():
    sys.path.insert(0, str(ROOT / "bench"))
    import run_model

    def profiled(**subject):
        cases = [case for case in run_model.CASES if run_model.profiled(subject, case)]
        return [
            (case["layers"], case["mode"], "checkpoint-activations" in case)
            for case in cases
            if case["layers"] == 8 or "trace" in subject
        ]

    assert profiled(trace="traces") == [
        (8, "forward", False),
        (8, "train", False),
        (8, "train", True),
    ]
    assert profiled(checkpoint="model") == [(8, "train", False)]
    assert profiled(density=0.5) == []


@needs_program
def test_a_case_that_fails_ends_the_script(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    answer = run("run_model.py", "--traces", tmp_path, "--device", "tpu", "tpu")
    assert answer.returncode != 0 and "--device is 'tpu'" in answer.stderr


@needs_program
def test_the_docs_show_what_was_stored(tmp_path, finished):
    for name in ("figures.py", "run_figures.py", "drawing.py"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "docs").mkdir()
    marks = "a\n<!-- figures: begin -->\n\n<!-- figures: end -->\nz\n"
    training = tmp_path / "docs/training.md"
    for file in (tmp_path / "README.md", training):
        file.write_text(marks)
    results = tmp_path / "bench/results/h200"
    results.mkdir(parents=True)

    def figures():
        subprocess.run([sys.executable, tmp_path / "scripts/figures.py"], check=True, timeout=120)

    figures()
    assert training.read_text() == marks
    report = finished[1]
    report["machine"] |= {"gpu": "Some GPU", "driver": "1.2"}
    (results / "train_run.json").write_text(json.dumps({**report, "complete": False}))
    figures()
    assert training.read_text() == marks

    (results / "train_run.json").write_text(json.dumps(report))
    row = {
        "source": "traces", "mode": "forward", "layers": 8, "hidden": 64, "batch": 64,
        "tokens": 32, "checkpoint_activations": False, "active_per_layer": [20, 40],
        "dense_ms": 200.0, "auto_ms": 125.0, "twell_ms": 100.0, "ratio": 2.0,
        "peak_bytes": {"dense": 2e9, "auto": 1.5e9, "twell": 1e9},
        "energy_mj_per_token": {"dense": 0.5, "auto": 0.4, "twell": None},
    }  # fmt: skip
    (results / "model.json").write_text(
        json.dumps({"machine": report["machine"], "results": [row]})
    )
    # A step whose blocks take 4 of 20 ms, and AdamW 5, at 1 TB/s.
    kernels = {
        "dense": [{"name": "nvjet", "calls": 1, "ms": 30.0}],
        "twell": [
            {"name": "twell::gate", "calls": 1, "ms": 4.0},
            {"name": "nvjet", "calls": 1, "ms": 8.0},
            {"name": "cudnn_flash", "calls": 1, "ms": 2.0},
            {"name": "FusedOptimizer", "calls": 1, "ms": 5.0},
            {"name": "SoftMax", "calls": 1, "ms": 1.0},
        ],
    }
    profile = row | {
        "mode": "train", "ratio": 1.47, "hidden": 4096, "heads": 4, "kv_heads": 2,
        "vocabulary": 100_000, "parameters": 5e9 / 28, "kernels": kernels,
    }  # fmt: skip
    # 6 FLOP for each of 64 · 32 tokens and each weight of attention and of the logits, in 8 ms.
    rate = 6 * 64 * 32 * (8 * 3 * 4096**2 + 4096 * 100_000) / 8e-3 / 1e12
    profiles = [
        profile,
        profile | {"checkpoint_activations": True},
        profile | {"source": "checkpoint"},
    ]
    (results / "model_kernels.json").write_text(
        json.dumps({"machine": report["machine"], "results": profiles})
    )
    figures()
    text = training.read_text()
    assert text.startswith("a\n") and text.endswith("\nz\n") and "## A real run" in text
    loss = report["sparse"]["summary"]["heldout_loss"]
    assert f"{loss:.4f}" in text and "Some GPU" in text and "abc1234" in text
    for name in ("run-loss", "run-active", "run-silent", "run-speed"):
        assert f"pictures/{name}.svg" in text
        assert "<svg" in (tmp_path / f"docs/pictures/{name}.svg").read_text()
    table = (tmp_path / "docs/benchmarks.md").read_text()
    assert "| 8 | forward, 64×32 | traces, 30 active | 200.0 ms | 100.0 ms | **2.00×** |" in table
    assert "2.0 → 1.0 GB | 0.500 → – |" in table
    assert (
        "| 8 | forward, 64×32, auto | traces, 30 active | 200.0 ms | 125.0 ms | **1.60×** |"
        " 2.0 → 1.5 GB | 0.500 → 0.400 |"
    ) in table
    step = "training step, 64×32"
    titles = [step, f"{step}, checkpointing", f"{step}, trained model"]
    columns = [f"{title}, {form}" for title in titles for form in ("dense", "twell")]
    assert "| ms | " + " | ".join(columns) + " |" in table
    assert "| other products |" + 3 * " 30.0 | 8.0 |" in table
    assert table.count("Why a training step gains 1.47×") == 1
    assert "takes 16 of the 20 ms" in table and "would give 1.88×" in table
    assert f"take 8, at {rate:.0f} TFLOP/s, and attention 2," in table
    # Without the 6 ms of both: 24 to 14.
    assert "The last 6 are" in table and "at 1.0 TB/s" in table and "would be 1.71×" in table
