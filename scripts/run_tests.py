"""Runs test programs one after the other and sums them up.

usage: run_tests.py [--logs DIR] [--limit SECONDS] [--must-run] NAME=KIND:PATH[:FILTER]…

KIND is gtest (PATH is a test program, of which FILTER selects tests) or pytest (PATH is a folder or
a file). The output of each goes to DIR/test-NAME.log, its report to DIR/test-NAME.xml. Why tests
were skipped is printed, and last `N passed, N failed` (with `, N skipped` if there are any) over
all runners. A runner that crashes, runs out of time, leaves no report or runs no test counts as one
failure; with --must-run, one whose tests all skip does too. The exit status is 0 only if nothing
failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree


@dataclass
class Outcome:
    """What one runner, or all of them together, came to."""

    passed: int = 0
    skipped: Counter = field(default_factory=Counter)  # by reason
    failures: list[str] = field(default_factory=list)

    def __iadd__(self, other):
        self.passed += other.passed
        self.skipped += other.skipped
        self.failures += other.failures
        return self

    def __str__(self):
        skipped = f", {self.skipped.total()} skipped" if self.skipped else ""
        return f"{self.passed} passed, {len(self.failures)} failed{skipped}"


def skip_reason(skipped: ElementTree.Element) -> str:
    """The last line of the message; gtest's starts with a line that says where."""
    lines = skipped.get("message", "").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def read_report(report: Path) -> Outcome:
    """Of gtest or pytest, which both write JUnit's XML."""
    outcome = Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failures.append(f"{case.get('classname')}.{case.get('name')}")
        elif skipped is not None:
            outcome.skipped[skip_reason(skipped)] += 1
        elif case.get("status") != "notrun":  # gtest's disabled tests
            outcome.passed += 1
    return outcome


@dataclass
class Runner:
    name: str
    kind: str
    path: str
    filter: str = "*"  # of gtest

    @staticmethod
    def parse(text: str) -> "Runner":
        name, equals, rest = text.partition("=")
        kind, *path = rest.split(":", 2 if rest.startswith("gtest:") else 1)
        if not (equals and path and kind in ("gtest", "pytest")):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NAME=gtest:PATH[:FILTER] or NAME=pytest:PATH"
            )
        return Runner(name, kind, *path)

    def run(self, logs: Path, limit: float) -> Outcome:
        log = logs / f"test-{self.name}.log"
        report = logs / f"test-{self.name}.xml"
        report.unlink(missing_ok=True)
        if self.kind == "gtest":
            command = [self.path, f"--gtest_output=xml:{report}", "--gtest_brief=1"]
            command += [f"--gtest_filter={self.filter}"]
        else:
            command = [sys.executable, "-m", "pytest", self.path, "-q", f"--junitxml={report}"]
            command += ["-p", "no:cacheprovider", "--durations=10"]

        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return Outcome(failures=[f"{self.name}: cannot start {self.path}: {error}"])
            try:
                status = process.wait(limit)
            except BaseException as stop:  # time is up, or Ctrl-C: leave no process behind
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(stop, subprocess.TimeoutExpired):
                    raise
                return Outcome(failures=[f"{self.name}: still running after {limit:.0f} s"])

        try:
            outcome = read_report(report)
        except (OSError, ElementTree.ParseError):
            return Outcome(failures=[f"{self.name}: ended with status {status} and no report"])
        if not outcome.failures and outcome.passed + outcome.skipped.total() == 0:
            outcome.failures.append(f"{self.name}: ran no test")
        elif not outcome.failures and status != 0:
            outcome.failures.append(f"{self.name}: ended with status {status} after its tests")
        return outcome


def show_failure(log: Path, lines: int = 60):
    print(f"  the end of {log}:")
    for line in log.read_text(errors="replace").splitlines()[-lines:]:
        print(f"    {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logs", type=Path, default=Path("build"))
    parser.add_argument("--limit", type=float, default=2700, help="seconds for one runner")
    parser.add_argument("--must-run", action="store_true", help="not every test may skip")
    parser.add_argument("runners", nargs="+", type=Runner.parse, metavar="NAME=KIND:PATH")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)

    total = Outcome()
    for runner in arguments.runners:
        start = time.monotonic()
        outcome = runner.run(arguments.logs, arguments.limit)
        if arguments.must_run and outcome.skipped and not (outcome.passed or outcome.failures):
            outcome.failures.append(f"{runner.name}: skipped every test")
        print(f"{runner.name:>8}  {outcome}  ({time.monotonic() - start:.0f} s)", flush=True)
        for reason, count in outcome.skipped.items():
            print(f"  skipped {count}: {reason}")
        for failure in outcome.failures:
            print(f"  FAILED {failure}")
        log = arguments.logs / f"test-{runner.name}.log"
        if outcome.failures and log.exists():
            show_failure(log)
        total += outcome
    print(total)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
