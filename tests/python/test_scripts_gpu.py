"""scripts/test-gpu and scripts/sanitize.py, with stand-ins for what only a GPU machine has."""

import json
import os
import subprocess
import sys

import pytest
from program import ROOT
from test_scripts import FAILED, FAKE_GTEST, REPORT, SKIPPED, case

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  -L) echo 'GPU 0: Some GPU (UUID: GPU-0)'; exit 15 ;;  # as when it can't list the next one
  *) echo 'Some GPU, 1.2' ;;
esac
"""

# Says what it was asked for and what it found, as far as scripts/test-gpu looks at it.
CMAKE = """#!/bin/sh
echo "$*"
echo '-- twell: no program, for lack of CLI11 UTF8PROC'
"""

# Reports what the environment says of the tool it stands for, after the tests.
SANITIZER = """#!/bin/sh
case "$1" in
  --version) printf 'NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.1.0 (build 3) (public)\\n' ;;
  *) tool=$2; shift 2; "$@"; status=$?
    case $tool in
      racecheck) echo "========= RACECHECK SUMMARY: $RACES" ;;
      *) echo '========= ERROR SUMMARY: 0 errors' ;;
    esac
    exit $status ;;
esac
"""


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path):
    """Runs test-gpu in a machine whose build has come to `report`, its portable one to another."""
    put(tmp_path / "bin/cmake", CMAKE)

    def run(*arguments, report, portable=None, gpu=True, **environment):
        put(tmp_path / "bin/nvidia-smi", NVIDIA_SMI if gpu else "#!/bin/sh\nexit 9\n")
        for folder, its in (("build", report), ("build-portable", portable or report)):
            put(tmp_path / folder / "tests/twell_cuda_tests", FAKE_GTEST % (REPORT % its))
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "TWELL_BUILD": tmp_path / "build", **environment}
        environment = {"TWELL_PYTHON": sys.executable, "TWELL_OUT": tmp_path, **environment}
        done = subprocess.run(
            [ROOT / "scripts/test-gpu", *arguments],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


@pytest.fixture
def bare_python(tmp_path):
    """A Python without packages."""
    return put(tmp_path / "bare", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')


def test_what_is_left_out_is_said_last(machine, bare_python):
    status, lines, _ = machine(report=case("a"), TWELL_PYTHON=bare_python)
    assert status == 0
    assert lines[-3:] == [
        "2 passed, 0 failed",
        f"twell: left out ops: {bare_python} lacks torch pytest",
        f"twell: left out program and app: {bare_python} lacks torch pytest",
    ]


def test_a_gpu_may_not_be_skipped(machine, bare_python):
    status, lines, _ = machine(report=case("a", SKIPPED), TWELL_PYTHON=bare_python)
    assert status == 1
    assert lines[-3] == "0 passed, 2 failed, 2 skipped"
    assert lines.count("  skipped 1: there is no GPU") == 2
    status, lines, _ = machine(
        report=case("a"), portable=case("a", SKIPPED), TWELL_PYTHON=bare_python
    )
    assert status == 1
    assert "  FAILED portable: skipped every test" in lines
    status, lines, _ = machine(report=case("a", SKIPPED), gpu=False, TWELL_PYTHON=bare_python)
    assert status == 0
    assert "twell: nvidia-smi lists no GPU, so the GPU tests skip" in lines


def test_the_kernels_are_built_twice(machine, bare_python, tmp_path):
    report = case("a") + case("b")
    _, lines, _ = machine(report=report, portable=case("a"), TWELL_PYTHON=bare_python)
    assert lines[-3] == "3 passed, 0 failed"
    for folder, is_portable in (("build", False), ("build-portable", True)):
        asked = (tmp_path / folder / "configure.log").read_text().splitlines()[0].split()
        assert asked[:4] == ["-S", str(ROOT), "-B", str(tmp_path / folder)]
        assert ("-DTWELL_CUDA_PORTABLE=ON" in asked) == is_portable
        assert "-DTWELL_TORCH=OFF" in asked


def test_a_program_that_cannot_be_built_is_left_out(machine, monkeypatch):
    monkeypatch.delenv("TWELL_BIN", raising=False)
    status, lines, _ = machine(report=case("a"), gpu=False, CUDA_VISIBLE_DEVICES="")
    assert status == 0
    assert any(line.strip().startswith("ops  ") for line in lines)
    reason = "CMake does not find CLI11 UTF8PROC, and TWELL_BIN names no program"
    assert lines[-1] == f"twell: left out program and app: {reason}"


def test_the_program_must_be_one(machine):
    status, _, error = machine(report=case("a"), TWELL_BIN="/nowhere/twell")
    assert status == 1
    assert error == "twell: TWELL_BIN is '/nowhere/twell', which is no program\n"
    status, _, error = machine("--memcheck", report=case("a"))
    assert status == 1
    assert error == "twell: test-gpu: unknown argument '--memcheck'; permitted: --sanitize\n"


TWO_TESTS = case("a") + case("b")
CLEAN = "0 hazards displayed (0 errors, 0 warnings)"


@pytest.fixture
def sanitize(machine, tmp_path):
    put(tmp_path / "bin/compute-sanitizer", SANITIZER)

    def run(*tools, report=TWO_TESTS, races=CLEAN, commit="abc1234", gpu=True):
        settings = {"report": report, "gpu": gpu, "RACES": races, "TWELL_COMMIT": commit}
        status, lines, error = machine("--sanitize", *tools, **settings)
        file = tmp_path / "sanitizer.json"
        return status, lines, error, json.loads(file.read_text()) if file.exists() else None

    return run


def test_the_sanitizer_writes_a_line_for_each_tool(sanitize, tmp_path):
    status, _, _, report = sanitize()
    assert status == 0
    assert report["machine"] == {"gpu": "Some GPU", "driver": "1.2", "commit": "abc1234"}
    assert [line["tool"] for line in report["results"]] == ["memcheck", "racecheck", "synccheck"]
    for line in report["results"]:
        assert (line["version"], line["tests"], line["errors"]) == ("2025.3.1.0", 2, 0)
        assert line["filter"].startswith("-" if line["tool"] == "memcheck" else "Cuda")
    text = (tmp_path / "sanitizer.json").read_text().splitlines()
    assert sum('"tool"' in line for line in text) == 3

    # One tool alone takes the place of its own line only, unless the code is another.
    status, lines, _, report = sanitize(
        "racecheck", races="3 hazards displayed (1 error, 2 warnings)"
    )
    assert status == 1 and "  1 errors" in lines
    assert [line["errors"] for line in report["results"]] == [0, 1, 0]
    assert report["results"][1]["warnings"] == 2
    _, _, _, report = sanitize("synccheck", commit="def5678")
    assert [line["tool"] for line in report["results"]] == ["synccheck"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"report": case("a") + case("b", FAILED)}, "  FAILED Suite.b"),
        ({"report": case("a", SKIPPED)}, "  no test passed: there is no GPU"),
        ({"races": "lost"}, "  compute-sanitizer gave no summary"),
    ],
    ids=["failed", "skipped", "no summary"],
)
def test_the_sanitizer_fails(sanitize, change, problem):
    status, lines, _, _ = sanitize("racecheck", **change)
    assert status == 1 and problem in lines


def test_the_sanitizer_refuses(sanitize):
    status, _, error, report = sanitize(gpu=False)
    assert (status, report) == (1, None)
    assert error == "twell: nvidia-smi lists no GPU to run the tests on\n"
    status, _, error, _ = sanitize("initcheck")
    assert status == 2
    assert "unknown tool 'initcheck'; permitted: memcheck, racecheck, synccheck" in error
