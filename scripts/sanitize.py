"""Runs the GPU tests of the kernels under compute-sanitizer.

usage: sanitize.py --tests PROGRAM [--json FILE] [TOOL…]

TOOL is memcheck, racecheck or synccheck; without any, all three run. What they find goes to
sanitize-TOOL.log beside PROGRAM, and what came of it as one line for each tool to FILE (default:
sanitizer.json in $TWELL_OUT, or in bench/results/h200/), beside those of other tools on the same
machine and commit. The exit status is 0 only if some test passed under each tool, none failed and
no tool found an error.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from run_tests import Outcome, read_report, show_failure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu_machine import commit, gpu  # noqa: E402

# memcheck takes all but what is huge. The others are far slower, above all with clusters and bulk
# copies: a few small cases, which together launch every kernel in each of its variants.
SMALL = [
    "CudaGatePack.*",
    "CudaForward.MatchesFloat64WithFewTokens",
    "CudaForward.MatchesFloat64InChunks",
    "*/CudaForwardPieces.*/of_12",
    "CudaForward.GathersAStepThatIsAdjacentAtItsEndsOnly",
    "CudaBackward.MatchesFloat64InUnevenRounds",
    "CudaBackward.GathersAStepThatIsAdjacentAtItsEndsOnly",
    "CudaUnions.*",
    "*/CudaLists.*/34",  # 20,000 neurons at 1%, in ascending order
    "*/CudaLists.*/35",  # and by half
]
FILTERS = {
    "memcheck": "-*Large.*",
    "racecheck": ":".join(SMALL),
    "synccheck": ":".join(SMALL),
}
SUMMARY = re.compile(
    r"SUMMARY: (?:\d+ hazards? displayed \()?(?P<errors>\d+) errors?(?:, (?P<warnings>\d+) warn)?"
)


def find_sanitizer() -> Path:
    """On PATH, else in the toolkit of nvcc or in the usual one."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    toolkits = [Path(nvcc).resolve().parents[1]] if nvcc else []
    places = [os.environ.get("PATH", "")]
    for toolkit in (*toolkits, Path("/usr/local/cuda")):
        places += [str(toolkit / "bin"), str(toolkit / "compute-sanitizer")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if not found:
        sys.exit("twell: compute-sanitizer is neither on PATH nor in the CUDA toolkit")
    return Path(found)


def run(command: list, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), text=True, check=False, **keywords)


def version_of(sanitizer: Path) -> str:
    answer = run([sanitizer, "--version"], capture_output=True).stdout
    found = re.search(r"Version (\S+)", answer)
    return found[1] if found else "unknown"


def check(sanitizer: Path, tool: str, tests: Path) -> tuple[dict, list[str]]:
    """The line of `tool`, and what is wrong."""
    log, report = (tests.parent / f"sanitize-{tool}.{ending}" for ending in ("log", "xml"))
    report.unlink(missing_ok=True)
    command = [sanitizer, "--tool", tool, tests, f"--gtest_filter={FILTERS[tool]}"]
    command += [f"--gtest_output=xml:{report}", "--gtest_brief=1"]
    start = time.monotonic()
    with log.open("w") as output:
        status = run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    seconds = round(time.monotonic() - start)
    outcome = read_report(report) if report.exists() else Outcome()
    found = SUMMARY.search(log.read_text(errors="replace"))
    counts = {name: int(n) for name, n in found.groupdict().items() if n} if found else {}

    problems = [f"FAILED {test}" for test in outcome.failures]
    if not outcome.passed:
        problems.append(": ".join(["no test passed", *outcome.skipped]))
    if not found:
        problems.append("compute-sanitizer gave no summary")
    elif counts["errors"]:
        problems.append(f"{counts['errors']} errors")
    if status != 0 and not problems:
        problems.append(f"ended with status {status}")
    if problems:
        show_failure(log)
    line = {"tool": tool, "version": version_of(sanitizer), "filter": FILTERS[tool]}
    return {**line, "tests": outcome.passed, **counts, "seconds": seconds}, problems


def store(path: Path, machine: dict, line: dict):
    """Adds `line` to the file, whose other lines stay if they are of the same machine."""
    lines = {}
    if path.exists():
        old = json.loads(path.read_text())
        if old["machine"] == machine:
            lines = {other["tool"]: other for other in old["results"]}
    lines[line["tool"]] = line
    results = ",\n  ".join(json.dumps(lines[tool]) for tool in FILTERS if tool in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "machine": {json.dumps(machine)},\n "results": [\n  {results}\n ]\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = Path(os.environ.get("TWELL_OUT", ROOT / "bench/results/h200"))
    parser.add_argument("--tests", type=Path, required=True, help="twell_cuda_tests")
    parser.add_argument("--json", type=Path, default=folder / "sanitizer.json")
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=", ".join(FILTERS))
    arguments = parser.parse_args()
    if unknown := set(arguments.tools) - set(FILTERS):
        parser.error(f"unknown tool {min(unknown)!r}; permitted: {', '.join(FILTERS)}")
    sanitizer = find_sanitizer()
    machine = {**gpu(), "commit": commit()}
    if "gpu" not in machine:
        sys.exit("twell: nvidia-smi lists no GPU to run the tests on")
    failed = False
    for tool in arguments.tools or FILTERS:
        line, problems = check(sanitizer, tool, arguments.tests)
        print(json.dumps(line), *problems, sep="\n  ", flush=True)
        failed |= bool(problems)
        if "errors" in line:
            store(arguments.json, machine, line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
