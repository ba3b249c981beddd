"""What the drivers of the GPU benchmarks share: their machine and how the program is run on it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from run_ffn import commit


def gpu() -> dict:
    """Name and driver of the first GPU; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    name, driver = answer.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}


def flags(values: dict) -> list[str]:
    """{"batch": 8, "json": True, "trace": None} as --batch 8 --json."""
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def bench_model(program: Path, values: dict) -> tuple[dict, dict]:
    """The machine and the result of `twell bench model`; ends the script if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "case.json"
        command = [program, "bench", "model", *flags({**values, "json": report})]
        print("$", *command, flush=True)
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            sys.exit(f"twell: the benchmark stopped with status {status} at {values}")
        answer = json.loads(report.read_text())
    return {**answer["machine"], **gpu(), "commit": commit()}, answer["results"][0]


def write_json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
