"""Runs test programs one after the other and sums them up.

usage: run_tests.py [--logs DIR] [--limit SECONDS] NAME=KIND:PATH…

KIND is gtest (PATH is a test program) or pytest (PATH is a folder). The output of each goes to
DIR/test-NAME.log, its report to DIR/test-NAME.{json,xml}. The last line printed is
`N passed, N failed` (with `, N skipped` if there are any) over all runners. A runner that crashes,
runs out of time, leaves no report or runs no test counts as one failure. The exit status is 0 only
if nothing failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree


@dataclass
class Outcome:
    """What one runner, or all of them together, came to."""

    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def __iadd__(self, other):
        self.passed += other.passed
        self.skipped += other.skipped
        self.failures += other.failures
        return self

    def __str__(self):
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {len(self.failures)} failed{skipped}"


def read_gtest(report: Path) -> Outcome:
    outcome = Outcome()
    for suite in json.loads(report.read_text())["testsuites"]:
        for test in suite["testsuite"]:
            if test.get("failures"):
                outcome.failures.append(f"{suite['name']}.{test['name']}")
            elif test["result"] == "SKIPPED":
                outcome.skipped += 1
            elif test["result"] == "COMPLETED":
                outcome.passed += 1
    return outcome


def read_pytest(report: Path) -> Outcome:
    outcome = Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


@dataclass
class Runner:
    name: str
    kind: str
    path: str

    @staticmethod
    def parse(text: str) -> "Runner":
        name, equals, rest = text.partition("=")
        kind, colon, path = rest.partition(":")
        if not (equals and colon and kind in ("gtest", "pytest")):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=gtest:PATH or NAME=pytest:PATH")
        return Runner(name, kind, path)

    def run(self, logs: Path, limit: float) -> Outcome:
        log = logs / f"test-{self.name}.log"
        report = logs / f"test-{self.name}.{'json' if self.kind == 'gtest' else 'xml'}"
        report.unlink(missing_ok=True)
        if self.kind == "gtest":
            command = [self.path, f"--gtest_output=json:{report}", "--gtest_brief=1"]
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
            outcome = (read_gtest if self.kind == "gtest" else read_pytest)(report)
        except (OSError, ValueError, KeyError, ElementTree.ParseError):
            return Outcome(failures=[f"{self.name}: ended with status {status} and no report"])
        if not outcome.failures and outcome.passed + outcome.skipped == 0:
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
    parser.add_argument("runners", nargs="+", type=Runner.parse, metavar="NAME=KIND:PATH")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)

    total = Outcome()
    for runner in arguments.runners:
        start = time.monotonic()
        outcome = runner.run(arguments.logs, arguments.limit)
        print(f"{runner.name:>8}  {outcome}  ({time.monotonic() - start:.0f} s)", flush=True)
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
