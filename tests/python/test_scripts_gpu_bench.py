"""The drivers of the GPU benchmarks, on the CPU in tiny sizes, and what the docs show of them."""

import json
import os
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
    assert len(run_model.CASES) == 6 and run_model.SIZES["hidden"] == 2048
    small = (
        script.replace("2048", "16").replace("49152", "512").replace('"batch": 64', '"batch": 2')
    )
    small = small.replace('"layers": 8', '"layers": 2').replace('"layers": 38', '"layers": 3')
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
    report = json.loads(out.read_text())
    assert report["machine"]["commit"] == "abc1234"
    rows = [
        (row["source"], row["layers"], row["mode"], row["checkpoint_activations"])
        for row in report["results"]
    ]
    cases = [("forward", False), ("eval", False), ("train", False), ("train", True)]
    assert rows == [
        *(("traces", 2, *case) for case in cases),
        ("traces", 3, "forward", False),
        ("traces", 3, "eval", False),
        *(("checkpoint", 2, *case) for case in cases),
    ]
    assert str(traces) not in out.read_text() and str(model) not in out.read_text()


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
        "dense_ms": 200.0, "twell_ms": 100.0, "ratio": 2.0,
        "peak_bytes": {"dense": 2e9, "twell": 1e9},
        "energy_mj_per_token": {"dense": 0.5, "twell": None},
    }  # fmt: skip
    (results / "model.json").write_text(
        json.dumps({"machine": report["machine"], "results": [row]})
    )
    figures()
    text = training.read_text()
    assert text.startswith("a\n") and text.endswith("\nz\n") and "## A real run" in text
    loss = report["sparse"]["summary"]["heldout_loss"]
    assert f"{loss:.4f}" in text and "Some GPU" in text and "abc1234" in text
    for name in ("run-loss", "run-active", "run-speed"):
        assert f"pictures/{name}.svg" in text
        assert "<svg" in (tmp_path / f"docs/pictures/{name}.svg").read_text()
    table = (tmp_path / "docs/benchmarks.md").read_text()
    assert "| 8 | forward, 64×32 | traces, 30 active | 200.0 ms | 100.0 ms | **2.00×** |" in table
    assert "2.0 → 1.0 GB | 0.500 → – |" in table
