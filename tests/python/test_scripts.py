"""The scripts behind `make test` and `make demo`, run as programs."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_TESTS = ROOT / "scripts/run_tests.py"

# A stand-in for a gtest program: writes the report it is told to and exits as it is told to.
FAKE_GTEST = """#!/bin/sh
for argument in "$@"; do
  case "$argument" in
    --gtest_output=xml:*) report=${argument#--gtest_output=xml:} ;;
    --gtest_filter=*) filter=${argument#--gtest_filter=} ;;
  esac
done
%s
"""

REPORT = """cat >"$report" <<'END'
<testsuites><testsuite name="Suite">%s</testsuite></testsuites>
END
"""


def case(name, inside="", status="run"):
    """As gtest writes it."""
    return f'<testcase name="{name}" classname="Suite" status="{status}">{inside}</testcase>'


SKIPPED = '<skipped message="tests/a_test.cpp:12&#x0A;there is no GPU" />'
FAILED = '<failure message="tests/a_test.cpp:13&#x0A;no" />'


@pytest.fixture
def program(tmp_path):
    def make(body):
        path = tmp_path / f"program{len(list(tmp_path.iterdir()))}"
        path.write_text(FAKE_GTEST % body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def run_tests(tmp_path, *runners, limit="20"):
    result = subprocess.run(
        [sys.executable, RUN_TESTS, "--logs", tmp_path / "logs", "--limit", limit, *runners],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout.splitlines()


def test_sums_over_runners(tmp_path, program):
    cases = [case("a"), case("b"), case("c", SKIPPED), case("d", status="notrun")]
    first = program(REPORT % "".join(cases))
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "test_ok.py").write_text(
        "import pytest\ndef test_a(): pass\n"
        "@pytest.mark.skip(reason='too: late')\ndef test_b(): pass\n"
    )
    runners = f"one=gtest:{first}", f"two=pytest:{folder / 'test_ok.py'}"
    status, lines = run_tests(tmp_path, "--must-run", *runners)
    assert lines[-1] == "3 passed, 0 failed, 2 skipped"
    assert "  skipped 1: there is no GPU" in lines and "  skipped 1: too: late" in lines
    assert status == 0


def test_skipping_every_test_is_a_failure_where_they_must_run(tmp_path, program):
    runner = f"one=gtest:{program(REPORT % (case('a', SKIPPED) * 2))}"
    status, lines = run_tests(tmp_path, runner)
    assert (status, lines[-1]) == (0, "0 passed, 0 failed, 2 skipped")
    status, lines = run_tests(tmp_path, "--must-run", runner)
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 2 skipped")
    assert "  skipped 2: there is no GPU" in lines
    assert "  FAILED one: skipped every test" in lines


def test_a_filter_selects_of_a_gtest(tmp_path, program):
    first = program(REPORT % case("a") + '[ "$filter" = "*Cuda*:*Gpu*" ] || exit 1')
    assert run_tests(tmp_path, f"one=gtest:{first}:*Cuda*:*Gpu*")[0] == 0
    assert run_tests(tmp_path, f"one=gtest:{first}")[0] == 1


def test_failures_are_named_and_counted(tmp_path, program):
    first = program(REPORT % (case("a") + case("bad", FAILED)) + "exit 1")
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "test_no.py").write_text("def test_wrong(): assert 1 == 2\n")
    status, lines = run_tests(tmp_path, f"one=gtest:{first}", f"two=pytest:{folder}")
    assert lines[-1] == "1 passed, 2 failed"
    assert status == 1
    assert any("Suite.bad" in line for line in lines)
    assert any("test_wrong" in line for line in lines)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("kill -SEGV $$", "no report"),
        (REPORT % "", "ran no test"),
        (REPORT % case("a") + "exit 3", "status 3"),
        ("echo '<' >$report", "no report"),
        ("sleep 60", "still running"),
    ],
    ids=["crash", "empty", "status", "broken report", "time out"],
)
def test_a_runner_that_breaks_is_a_failure(tmp_path, program, body, reason):
    status, lines = run_tests(tmp_path, f"one=gtest:{program(body)}", limit="2")
    assert status == 1
    assert lines[-1].endswith(" 1 failed")
    assert any(reason in line for line in lines)


def test_a_missing_program_is_a_failure(tmp_path):
    status, lines = run_tests(tmp_path, f"one=gtest:{tmp_path}/nothing")
    assert (status, lines[-1]) == (1, "0 passed, 1 failed")


def test_a_test_file_that_cannot_be_imported_is_a_failure(tmp_path):
    (tmp_path / "test_import.py").write_text("import nothing_of_that_name\n")
    status, lines = run_tests(tmp_path, f"one=pytest:{tmp_path}")
    assert (status, lines[-1]) == (1, "0 passed, 1 failed")


def setup(tmp_path, hidden=(), venv=None, **environment):
    """Runs scripts/setup with a PATH on which the programs `hidden` do not exist."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for folder in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for tool in Path(folder).iterdir() if Path(folder).is_dir() else ():
            link = bin_folder / tool.name
            if tool.name not in hidden and not link.is_symlink():
                link.symlink_to(tool)
    for name, text in environment.pop("fakes", {}).items():
        (bin_folder / name).unlink(missing_ok=True)
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    environment = {"PATH": str(bin_folder), "HOME": str(tmp_path), **environment}
    if venv:
        environment["TWELL_VENV"] = str(venv)
    return subprocess.run(
        [ROOT / "scripts/setup"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )


def test_setup_is_quick_when_all_is_there():
    start = time.monotonic()
    subprocess.run([ROOT / "scripts/setup"], check=True, stdin=subprocess.DEVNULL, timeout=60)
    assert time.monotonic() - start < 10


NOT_ROOT = {"id": "#!/bin/sh\necho 1000\n"}


def test_setup_without_root_names_what_to_install(tmp_path):
    result = setup(tmp_path, hidden=("ccache", "sudo"), fakes=NOT_ROOT)
    assert result.returncode != 0
    line = (
        "missing system packages and no right to install them; as root, run: apt-get install ccache"
    )
    assert result.stderr == f"twell: {line}\n"


def test_setup_without_apt_names_what_to_install(tmp_path):
    result = setup(tmp_path, hidden=("ninja", "apt-get"))
    assert result.returncode != 0
    assert "install these by hand: ninja-build" in result.stderr


def test_setup_refuses_a_full_disk(tmp_path):
    full = {"df": "#!/bin/sh\nprintf 'Filesystem\\nfull 9 9 1048576 0%% /\\n'\n"}
    result = setup(tmp_path, venv=tmp_path / "venv", fakes=full)
    assert result.returncode != 0
    assert "has 1 GiB free" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_refuses_an_old_python(tmp_path):
    old = """#!/bin/sh
case "$*" in *'<= sys.version_info'*) exit 1 ;; *'print('*) echo 3.9 ;; esac
"""
    result = setup(tmp_path, venv=tmp_path / "venv", fakes={"python3": old})
    assert result.returncode != 0
    assert "Python 3.9 found, 3.11 to 3.13 needed" in result.stderr


# Stands for python3: `-m venv DIR` makes a Python there whose pip only notes that it ran.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *'print('*) echo 3.11 ;;
  '-m venv '*)
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\ncase "$*" in *"pip install"*) sleep 1; echo pip >>%s; %s ;; esac\\n' \
      >"$3/bin/python"
    chmod +x "$3/bin/python" ;;
esac
"""


def test_setup_starts_again_after_an_interruption(tmp_path):
    venv, log = tmp_path / "venv", tmp_path / "log"
    venv.mkdir()
    (venv / "half").write_text("of a package")
    result = setup(tmp_path, venv=venv, fakes={"python3": FAKE_PYTHON % (log, "true")})
    assert result.returncode == 0, result.stderr
    assert log.read_text() == "pip\n"
    assert (venv / ".complete").exists() and not (venv / "half").exists()


def test_setup_reports_a_failed_download(tmp_path):
    venv = tmp_path / "venv"
    result = setup(
        tmp_path, venv=venv, fakes={"python3": FAKE_PYTHON % (tmp_path / "log", "exit 1")}
    )
    assert result.returncode != 0
    assert "could not install requirements.txt" in result.stderr
    assert not (venv / ".complete").exists()


def test_two_setups_at_once_make_one_environment(tmp_path):
    venv, log = tmp_path / "venv", tmp_path / "log"
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "python3").write_text(FAKE_PYTHON % (log, "true"))
    (fake / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}", "TWELL_VENV": str(venv)}
    environment.pop("TWELL_PYTHON", None)
    both = [subprocess.Popen([ROOT / "scripts/setup"], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert log.read_text() == "pip\n"


# Stands for the Python that runs the tests: does nothing.
NO_TESTS = "#!/bin/sh\n"


def test_the_tests_say_that_cuda_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text(NO_TESTS)
    python.chmod(0o755)

    def output():
        environment = {**os.environ, "TWELL_BUILD": str(tmp_path), "TWELL_PYTHON": str(python)}
        command = [ROOT / "scripts/test"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    assert output().startswith("twell: no CUDA target was built, so no CUDA test runs")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/twell_cuda_sim_tests").touch()
    assert output() == ""


def test_ci_fails_where_cuda_was_lost(tmp_path):
    (tmp_path / ".ci").mkdir()
    run = tmp_path / ".ci/run"
    run.write_text((ROOT / ".ci/run").read_text())
    run.chmod(0o755)
    (tmp_path / "Makefile").write_text("test:\n\t@echo tested\n")
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def ci():
        done = subprocess.run([run], env=environment, check=False, capture_output=True, text=True)
        assert done.stdout == "tested\n"
        return done.returncode, done.stderr

    line = f"twell: {tmp_path}/nvcc is there, but build/tests/twell_cuda_tests was not built\n"
    assert ci() == (1, line)
    program = tmp_path / "build/tests/twell_cuda_tests"
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o755)
    assert ci() == (0, "")
