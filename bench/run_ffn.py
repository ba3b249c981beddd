"""Times the feed-forward block on this machine and stores the figures.

usage: run_ffn.py --twell PROGRAM [--traces DIR] [--out FILE] [--quick]

Runs `twell bench ffn` once per case and gathers the answers in one file,

    {"machine": {…, "commit"}, "results": [{"case", "tokens", "dense_ms", "twell_ms", "ratio", …}]}

bench/results/cpu/ffn.json on a machine with AMX, bench/results/cpu/ffn-ISA.json on another one, so
that each kind of machine keeps its own figures. Needs nothing but Python's standard library.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEST_ISA = "amx_bf16"

# The bars of the project first, then what shows where they come from.
CASES = (
    *({"layer": layer, "tokens": 512} for layer in (4, 5, 7)),
    {"density": 0.5, "tokens": 512},
    {"layer": 5, "tokens": 1},
    *({"layer": layer, "tokens": 512} for layer in (1, 2)),
    *({"layer": layer, "tokens": 1} for layer in (1, 4, 7)),
    *({"layer": 5, "tokens": tokens} for tokens in (4, 16, 64, 128, 2048)),
    *({"density": density, "tokens": 512} for density in (0.001, 0.005, 0.02, 0.05, 0.1, 1.0)),
    {"density": 0.5, "tokens": 1},
    {"density": 0.5, "tokens": 512, "ffn": "auto"},
    *({"layer": 5, "tokens": tokens, "ffn-kind": "plain"} for tokens in (512, 1)),
)


def traces_folder(argument: Path | None) -> Path:
    folder = argument or Path(os.environ.get("TWELL_TRACES", ROOT.parent / "shared/traces"))
    if not (folder / "meta.json").is_file():
        sys.exit(
            f"twell: no activation traces in {folder}; set TWELL_TRACES to a folder written by"
            " `twell inspect --save-trace` (or the one the figures were taken with)"
        )
    return folder


def commit() -> str:
    """Of the source: TWELL_COMMIT where the program was built elsewhere, else git's answer."""
    if "TWELL_COMMIT" in os.environ:
        return os.environ["TWELL_COMMIT"]
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def run_case(program: Path, traces: Path, case: dict, threads: int, seconds: float) -> dict:
    flags = {"threads": threads, "seconds": seconds, **case}
    if "layer" in case:
        flags["trace"] = traces
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "case.json"
        command = [program, "bench", "ffn", "--json", report]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True)
        return json.loads(report.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--twell", type=Path, required=True, help="the program")
    parser.add_argument("--traces", type=Path, help="default: $TWELL_TRACES or ../shared/traces")
    parser.add_argument("--out", type=Path, help="default: by this machine's instruction set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8, help="of timing, per case")
    parser.add_argument("--quick", action="store_true", help="only the bars, half a second each")
    arguments = parser.parse_args()
    traces = traces_folder(arguments.traces)

    cases = CASES[:5] if arguments.quick else CASES
    seconds = 0.5 if arguments.quick else arguments.seconds
    machine, results = {}, []
    for case in cases:
        try:
            report = run_case(arguments.twell, traces, case, arguments.threads, seconds)
        except subprocess.CalledProcessError as error:
            sys.exit(f"twell: the benchmark stopped with status {error.returncode} at {case}")
        machine = {**report["machine"], "commit": commit()}
        results += report["results"]

    name = "ffn.json" if machine["isa"] == BEST_ISA else f"ffn-{machine['isa']}.json"
    out = arguments.out or ROOT / "bench/results/cpu" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    temporary.replace(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
