"""bench/run_ffn.py and scripts/figures.py, with a stand-in for the program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Answers `bench ffn` with figures made up from its flags, and notes the flags.
FAKE_TWELL = """#!{python}
import json, sys
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
if flags.get("--layer") == "{broken}":
    sys.exit(3)
with open({log!r}, "a") as log:
    log.write(json.dumps(flags) + "\\n")
case = f"layer{{flags['--layer']}}" if "--layer" in flags else f"random{{flags['--density']}}"
row = {{"case": case, "tokens": int(flags["--tokens"]), "dense_ms": 2.0, "twell_ms": 1.0,
        "ratio": 2.0}}
json.dump({{"machine": {{"isa": {isa!r}}}, "results": [row]}}, open(flags["--json"], "w"))
"""


@pytest.fixture
def bench(tmp_path):
    """A copy of the scripts, so that results do not go to the real folder."""

    def run(*arguments, isa="amx_bf16", broken="none", traces=True, **environment):
        clone = tmp_path / "project/clone"
        (clone / "bench").mkdir(parents=True, exist_ok=True)
        script = clone / "bench/run_ffn.py"
        script.write_text((ROOT / "bench/run_ffn.py").read_text())
        if traces:
            (tmp_path / "traces").mkdir(exist_ok=True)
            (tmp_path / "traces/meta.json").write_text("{}")
            environment["TWELL_TRACES"] = str(tmp_path / "traces")
        program = tmp_path / "twell"
        log = str(tmp_path / "log")
        program.write_text(
            FAKE_TWELL.format(python=sys.executable, isa=isa, broken=broken, log=log)
        )
        program.chmod(0o755)
        base = {k: v for k, v in os.environ.items() if not k.startswith("TWELL_")}
        return clone, subprocess.run(
            [sys.executable, script, "--twell", program, *arguments],
            env={**base, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def test_results_go_to_the_file_of_the_machine(bench):
    for isa, name in (("amx_bf16", "ffn.json"), ("avx2", "ffn-avx2.json")):
        clone, answer = bench("--quick", isa=isa, TWELL_COMMIT="abc1234")
        assert answer.returncode == 0, answer.stderr
        report = json.loads((clone / "bench/results/cpu" / name).read_text())
        assert report["machine"] == {"isa": isa, "commit": "abc1234"}
        assert {"case", "tokens", "dense_ms", "twell_ms", "ratio"} <= set(report["results"][0])


def test_the_bars_come_first(bench, tmp_path):
    _, answer = bench("--quick")
    assert answer.returncode == 0, answer.stderr
    flags = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    cases = [(f.get("--layer", f.get("--density")), f["--tokens"]) for f in flags]
    assert cases == [("4", "512"), ("5", "512"), ("7", "512"), ("0.5", "512"), ("5", "1")]
    assert all(f["--threads"] == "2" for f in flags)


def test_missing_traces_are_one_clear_line(bench):
    clone, answer = bench(traces=False)
    assert answer.returncode == 1
    assert answer.stderr.startswith("twell: no activation traces in")
    assert "TWELL_TRACES" in answer.stderr
    assert not (clone / "bench/results").exists()


def test_a_failed_case_leaves_the_old_results(bench):
    clone, _ = bench("--quick")
    file = clone / "bench/results/cpu/ffn.json"
    before = file.read_text()
    _, answer = bench("--quick", broken="7")
    assert answer.returncode == 1
    assert "stopped with status 3" in answer.stderr
    assert file.read_text() == before


ROW = {
    "case": "layer5",
    "ffn_kind": "gated",
    "tokens": 512,
    "hidden": 2048,
    "neurons": 5632,
    "path": "twell",
    "dense_ms": 39.4321,
    "twell_ms": 19.0,
    "ratio": 2.0754,
    "active_mean": 40.3,
}
MACHINE = {
    "cpu": "Some CPU",
    "isa": "avx2",
    "threads": 2,
    "torch": "2.11.0",
    "date": "2026-01-02T03:04:05Z",
    "commit": "abc1234",
}


def test_figures_are_drawn_from_the_file_alone(tmp_path):
    for name in ("figures.py", "run_figures.py", "drawing.py"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "bench/results/cpu").mkdir(parents=True)
    file = tmp_path / "bench/results/cpu/ffn-avx2.json"
    file.write_text(json.dumps({"machine": MACHINE, "results": [ROW]}))
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nz\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/training.md").write_text(readme.read_text())

    def figures(*arguments):
        command = [sys.executable, tmp_path / "scripts/figures.py", *arguments]
        return subprocess.run(command, check=False, capture_output=True, timeout=120).returncode

    assert figures("--check") == 1
    assert figures() == 0
    assert figures("--check") == 0
    assert "![" in readme.read_text()
    text = readme.read_text()
    assert "| trace, layer 5 | 0.72% | 512 tokens | 39.43 ms | 19.00 ms | **2.08×** |" in text
    assert "Some CPU" in text and "abc1234" in text and "2026-01-02" in text
    assert text.startswith("a\n") and text.endswith("\nz\n") and "old" not in text
    picture = (tmp_path / "docs/pictures/ffn-cpu.svg").read_text()
    assert "2.08×" in picture and "prefers-color-scheme" in picture

    file.write_text(json.dumps({"machine": MACHINE, "results": [{**ROW, "ratio": 3.0}]}))
    assert figures("--check") == 1

    file.unlink()
    assert figures() == 0
    assert "No figures have been taken yet" in readme.read_text()
