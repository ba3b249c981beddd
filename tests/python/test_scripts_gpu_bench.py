"""The drivers of the GPU benchmarks, on the CPU in tiny sizes, and what the docs show of them."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import types

import numpy
import pytest
import torch
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


# Stand-ins for what needs a GPU, and sizes for a CPU.
ON_CPU = {
    '"cuda"': '"cpu"',
    ".cuda()": "",
    "2048, 5632, 4096": "64, 128, 256",
    "256 << 20": "256",
    "(131072, 16384)": "(512, 256)",
    "(*LARGE, 4096, 1024, 512, 256, 128)": "(*LARGE, 128)",
    "GRAPH_TOKENS = 1024": "GRAPH_TOKENS = 128",
    "uniform_pattern(29": "uniform_pattern(3",
    "(1024, 4096)": "(64, 64)",
    "(3072, 8192)": "(64, 136)",
    "(4096, 14336)": "(96, 144)",
    "(8192, 22016)": "(128, 64)",
    "(2048, 5640)": "(64, 152)",
}


class Clock:
    """torch.cuda.Event"""

    def __init__(self, timing):
        assert timing

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)


def kernel(name, start, milliseconds, device=torch.autograd.DeviceType.CUDA):
    span = types.SimpleNamespace(start=start, elapsed_us=lambda: 1000 * milliseconds)
    return types.SimpleNamespace(name=name, time_range=span, device_type=device)


@pytest.fixture
def cuda_ffn(monkeypatch):
    text = (ROOT / "bench/cuda_ffn.py").read_text()
    for name, stand_in in ON_CPU.items():
        assert name in text, name
        text = text.replace(name, stand_in)
    module = types.ModuleType("cuda_ffn")
    monkeypatch.setitem(sys.modules, "cuda_ffn", module)  # where dataclasses look it up
    exec(compile(text, "cuda_ffn.py", "exec"), module.__dict__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    return module


def test_cuda_inputs_have_their_pattern(cuda_ffn):
    torch.manual_seed(0)
    pattern = cuda_ffn.uniform_pattern(3)
    assert pattern.sum(1).unique().tolist() == [3]
    x, gate = cuda_ffn.fit(pattern)
    assert torch.equal(x.float() @ gate.float().T > 0, pattern)
    assert cuda_ffn.sparsity(x, gate) == {
        "active_mean": 3.0,
        "union_mean": (pattern[:128].any(0).sum() + pattern[128:].any(0).sum()).item() / 2,
    }
    assert cuda_ffn.sparsity(x[:1], gate) == {"active_mean": 3.0, "union_mean": 3.0}


def test_kernels_are_those_between_two_flushes(cuda_ffn):
    gate = "void twell::cuda::sm90::(anonymous namespace)::gate_kernel<true>(Args)"
    events = [
        kernel("cudaLaunchKernel", 0, 50, torch.autograd.DeviceType.CPU),
        kernel(gate, 30, 2),
        kernel("flush", 10, 9),
        kernel("Memset (Device)", 20, 1),
        kernel(gate, 40, 3),
        kernel("twell::cuda::words_kernel(Args)", 50, 4),
        kernel("flush", 60, 9),
        kernel("nvjet", 70, 7),
        kernel("flush", 80, 9),
    ]
    runs = cuda_ffn.split_at_flushes(events)
    assert runs[0] == {gate: 5, "Memset (Device)": 1, "twell::cuda::words_kernel(Args)": 4}
    assert runs[1:] == [{"nvjet": 7}, {}]
    assert cuda_ffn.split_at_flushes([]) == []
    others = [{gate: 8, "twell::cuda::words_kernel(Args)": 1}, {gate: 6}]
    assert cuda_ffn.median_stages([runs[0], *others]) == {"gate": 6, "words": 2.5}


def test_profiled_calls_take_turns(cuda_ffn, monkeypatch):
    events = []

    def ran(name, milliseconds):
        events.append(kernel(name, len(events), milliseconds))

    @contextlib.contextmanager
    def profile(activities):
        yield types.SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(cuda_ffn, "profile", profile)
    monkeypatch.setattr(cuda_ffn, "flush_l2", lambda: ran("flush", 9))
    runs = cuda_ffn.profiled([lambda: ran("a", len(events)), lambda: ran("b", 2)], 2)
    assert runs == [[{"a": 1}, {"a": 5}], [{"b": 2}, {"b": 2}]]
    monkeypatch.setattr(cuda_ffn, "flush_l2", lambda: None)
    with pytest.raises(RuntimeError, match="the profiler saw 4 of 6 calls"):
        cuda_ffn.profiled([lambda: None, lambda: None], 3)


def test_medians_are_those_of_calls_in_turns(cuda_ffn):
    order = []
    calls = [lambda: order.append(0), lambda: (order.append(1), time.sleep(0.01))]
    fast, slow = cuda_ffn.medians_ms(calls, 2)
    assert order == [0, 1] * 5
    assert 0 < fast < 10 <= slow


def test_cuda_cases_have_every_kind_of_row(cuda_ffn, tmp_path, monkeypatch):
    for layer in (1, 2, 4, 5, 7):
        # One neuron for every token.
        rows = numpy.arange(cuda_ffn.TRACE_TOKENS + 1, dtype="<u4")
        rows.tofile(tmp_path / f"layer{layer}.rowptr.u32")
        (rows[:-1] % 128).astype("<u2").tofile(tmp_path / f"layer{layer}.cols.u16")

    def forward(library, tokens, gate):
        assert tokens > 0
        return lambda x, gate, up, down, y: y.copy_(cuda_ffn.dense(x, gate, up, down.T))

    graphs = []

    def graph_of(call):
        graphs.append(types.SimpleNamespace(replay=call))
        return graphs[-1]

    def medians_ms(calls, repeats):
        assert repeats == (30 if graphs and list(calls)[-1] is graphs[-1].replay else 9)
        for call in calls:
            call()
        return [5.0, 4.0, 3.0, 2.0, 2.5]  # in the order of the forms, twell last

    def profiled(calls, repeats):
        for call in calls:
            call()
        ours = "twell::cuda::gate_kernel(Args)", "twell::cuda::words_kernel(Args)"
        runs = [{"nvjet": 3.0}, dict.fromkeys(ours, 2.0), dict.fromkeys(ours, 2.0)]
        return [[run] for run in runs[-len(calls) :]]

    def choice(library, tokens, gate, means):
        assert 0 < means["active_mean"] <= means["union_mean"] <= len(gate)
        return "dense" if tokens == 128 else "sparse", 7.0, 8.0

    stand_ins = {
        "Forward": forward,
        "GatePack": lambda library, tokens, gate: lambda x, gate: None,
        "choice": choice,
        "medians_ms": medians_ms,
        "profiled": profiled,
        "dense_compiled": cuda_ffn.dense,
        "dense_concatenated_compiled": cuda_ffn.dense_concatenated,
        "graph_of": graph_of,
        "load_library": str,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(cuda_ffn, name)
        monkeypatch.setattr(cuda_ffn, name, stand_in)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "Some GPU, 1.2\n")

    def report(*arguments):
        out = tmp_path / "forward.json"
        command = ["--library", "x.so", "--traces", str(tmp_path), "--json", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", ["cuda_ffn.py", *command])
        cuda_ffn.main()
        return json.loads(out.read_text())

    every = report()
    rows = {(row["case"], row["tokens"]): row for row in every["results"]}
    assert len(rows) == len(every["results"]) == 5 * 2 + 2 * (3 + 5) + 4 + 2
    assert len(graphs) == 5 * sum(case.endswith(", graph") for case, _ in rows)
    for case in ("layer 5", "50% active"):
        assert {(case, m) for m in (512, 256)} <= rows.keys()
        assert {(f"{case}, graph", m) for m in (128, 1, 4, 16, 32, 64)} <= rows.keys()
    assert {("29 uniform, 96x144, graph", m) for m in (1, 16)} <= rows.keys()
    for (case, tokens), row in rows.items():
        assert case.endswith(", graph") == (tokens <= 128)
        layers = cuda_ffn.DECODE_LAYERS if tokens <= 64 else 1
        dense = tokens == 128
        assert row["dense_ms"] == 5 / layers and row["twell_ms"] == round(2.5 / layers, 4)
        assert row["dense_strongest_ms"] == row["dense_concatenated_compiled_ms"] == 2 / layers
        assert (row["ratio"], row["ratio_strongest"]) == (2, 0.8)
        assert row["auto_path"] == ("dense" if dense else "sparse")
        assert row["auto_ms"] == row["dense_ms" if dense else "twell_ms"]
        assert row["auto_ratio"] == (1 if dense else 2)
        assert (row["predicted_dense_ms"], row["predicted_sparse_ms"]) == (7, 8)
        assert row["stages"] == {"gate": 2, "words": 2} and row["error"] == 0
    shapes = {(row["case"], row["hidden"], row["neurons"], row["tokens"]) for row in every["gate"]}
    assert len(every["gate"]) == 8
    assert shapes == {
        *(
            (case, 64, 128, m)
            for case in ("layer 5", "29 uniform", "50% active")
            for m in (512, 256)
        ),
        *(("29 uniform, 64x152", 64, 152, m) for m in (512, 256)),
    }
    for row in every["gate"]:
        assert (row["cublas_ms"], row["gate_ms"], row["gate_pack_ms"]) == (3, 2, 4)
        assert row["ratio"] == 1.5

    some = report("--only", "gate", "--cases", "layer 5", "29 uniform, 64x152", "--tokens", "256")
    assert some["results"] == []
    assert [row["case"] for row in some["gate"]] == ["layer 5", "29 uniform, 64x152"]


MARKS = "a\n<!-- figures: begin -->\n\n<!-- figures: end -->\nz\n"


@pytest.fixture
def project(tmp_path):
    """A folder with the scripts that draw, and documents without figures."""
    for name in ("figures.py", "run_figures.py", "drawing.py"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "docs").mkdir()
    for file in ("README.md", "docs/training.md"):
        (tmp_path / file).write_text(MARKS)
    (tmp_path / "bench/results/h200").mkdir(parents=True)
    return tmp_path


def draw_figures(project):
    subprocess.run([sys.executable, project / "scripts/figures.py"], check=True, timeout=120)


@needs_program
def test_the_docs_show_what_was_stored(project, finished):
    training, results = project / "docs/training.md", project / "bench/results/h200"
    draw_figures(project)
    assert training.read_text() == MARKS
    report = finished[1]
    report["machine"] |= {"gpu": "Some GPU", "driver": "1.2"}
    (results / "train_run.json").write_text(json.dumps({**report, "complete": False}))
    draw_figures(project)
    assert training.read_text() == MARKS

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
    draw_figures(project)
    text = training.read_text()
    assert text.startswith("a\n") and text.endswith("\nz\n") and "## A real run" in text
    loss = report["sparse"]["summary"]["heldout_loss"]
    assert f"{loss:.4f}" in text and "Some GPU" in text and "abc1234" in text
    for name in ("run-loss", "run-active", "run-silent", "run-speed"):
        assert f"pictures/{name}.svg" in text
        assert "<svg" in (project / f"docs/pictures/{name}.svg").read_text()
    table = (project / "docs/benchmarks.md").read_text()
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


def forward_report():
    row = {
        "case": "layer 5", "hidden": 64, "neurons": 1000, "tokens": 131072, "active_mean": 7.0,
        "dense_ms": 8.0, "twell_ms": 4.0, "ratio": 2.0, "dense_strongest_ms": 6.0,
        "ratio_strongest": 1.5, "auto_path": "sparse", "auto_ratio": 2.0,
    }  # fmt: skip
    half = {**row, "case": "50% active", "ratio": 0.5, "auto_path": "dense", "auto_ratio": 1.0}
    few = {**row, "case": "layer 5, graph", "tokens": 1, "ratio": 3.0}
    unseen = {**row, "case": "layer 5", "tokens": 512, "ratio": 9.0}
    gate = {
        "case": "29 uniform, 2048x5640", "hidden": 64, "neurons": 1000, "tokens": 16384,
        "cublas_ms": 4.0, "gate_ms": 3.2, "gate_pack_ms": 5.0, "ratio": 1.25,
    }  # fmt: skip
    return {
        "device": "Some GPU", "torch": "2", "commit": "abc1234",
        "results": [row, half, few, unseen], "gate": [gate],
    }  # fmt: skip


def test_the_docs_show_a_gpus_forward(project):
    file = project / "bench/results/h200/ffn_forward.json"
    cpu = project / "bench/results/cpu"
    cpu.mkdir()
    (cpu / "ffn.json").write_text((ROOT / "bench/results/cpu/ffn.json").read_text())
    file.write_text(json.dumps(forward_report()))
    draw_figures(project)
    page = (project / "docs/benchmarks.md").read_text()
    assert (
        "| trace, layer 5 | 131,072 | 8.000 ms | 4.000 ms | **2.00×** |"
        " 6.000 ms | **1.50×** | sparse, 2.00× |\n"
    ) in page
    assert "| 50% active | 131,072 | 8.000 ms | 4.000 ms | **0.50×** |" in page
    assert "| dense, 1.00× |" in page
    assert "## Some GPU, the gate" in page
    assert (
        "| 29 uniform, 2048x5640 | 16,384 | 4.000 ms | 3.200 ms | **1.25×** | 5.000 ms |\n"
    ) in page
    readme = (project / "README.md").read_text()
    assert "| trace, layer 5 | 131,072 | 8.000 ms | 4.000 ms | **2.00×** |\n" in readme

    assert "](pictures/ffn-h200.svg)" in page
    picture = (project / "docs/pictures/ffn-h200.svg").read_text()
    assert re.findall(r">([\d.]+×)<", picture) == ["2.00×", "0.50×", "3.00×"]
    for name in (
        "trace, layer 5 · 0.7% active · 131,072 tokens",
        "50% active · 131,072 tokens",
        "trace, layer 5 · 0.7% active · 1 token",
    ):
        assert f">{name}<" in picture, name
