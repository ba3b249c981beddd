"""Trains one model twice on a GPU, dense and sparse, on the same tokens, and stores both curves.

usage: train_run.py --twell PROGRAM [--state DIR] [--json FILE] [--minutes M] [--budget SECONDS] …

Steps, each left out once it is done, so that the same command goes on where an earlier one stopped:

    text.jsonl      Python sources of this machine, each once, in the order of their hashes
    tokenizer.json  a byte-level BPE of 49,152 tokens, trained on the first of them
    rate.json       how fast dense training is, which gives the number of steps
    dense/          `twell train --ffn dense`, without an L1 term
    sparse/         `twell train --ffn auto`, steered to --target-active neurons per token

Both runs make the same steps on the same batches and are evaluated on the same held-out tokens.
With two devices they run at once, each on its own. Before --budget seconds are over a run saves
itself and the script ends with status 3: call it again. FILE is written whenever they stop,
and says under "complete" whether both runs are done. Needs the package tokenizers, else only the
standard library.
"""

import argparse
import hashlib
import itertools
import json
import math
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from gpu_machine import bench_model, flags, write_json
from run_ffn import ROOT

UNFINISHED = 3  # exit status
VOCABULARY = 49152
SAMPLE_BYTES = 48 << 20  # of the tokenizer
LEAST_FILE, MOST_FILE = 64, 1 << 20  # bytes
EVALUATIONS = 20  # on held-out text, over a run
STEP_MARGIN = 1.04  # more steps than the measured rate asks for

MODEL = {"layers": 8, "hidden": 2048, "neurons": 5632, "heads": 32, "kv-heads": 32}
TRAIN = {
    **MODEL,
    "context": 2048,
    "batch": 8,
    "lr": 4e-4,
    "warmup": 0.03,
    "heldout": 0.02,
    "eval-tokens": 1 << 18,
    "log-every": 10,
    "checkpoint-every": 1 << 30,  # when it ends and when it is interrupted
}
LEGS = {
    "dense": {"ffn": "dense", "lambda": 0, "target-active": 0},
    "sparse": {"ffn": "auto"},
}
CURVES = (
    "step",
    "seconds",
    "step_seconds",
    "tokens",
    "loss",
    "active",
    "active_per_layer",
    "silent_per_layer",
    "ffn_per_layer",
    "tokens_per_second",
    "lambda",
    "gradient_norm",
)


def say(text: str):
    print(f"== {text}", flush=True)


def read_source(path: Path) -> tuple[bytes, str] | None:
    try:
        data = path.read_bytes()
        if LEAST_FILE <= len(data) <= MOST_FILE and b"\0" not in data:
            return hashlib.sha256(data).digest(), data.decode()
    except (OSError, UnicodeDecodeError):
        pass  # a dangling link or another encoding
    return None


def gather_text(folders: list[Path], out: Path, max_bytes: int):
    """The sources in the order of their hashes: any first part of it is a fair sample."""
    files = sorted({file for folder in folders for file in folder.rglob("*.py")})
    with ThreadPoolExecutor() as pool:
        texts = dict(filter(None, pool.map(read_source, files)))
    if not texts:
        sys.exit(f"twell: no Python sources in {', '.join(map(str, folders))}")
    size = documents = 0
    temporary = out.with_suffix(".tmp")
    with temporary.open("w") as file:
        for _, text in sorted(texts.items()):
            if size >= max_bytes:
                break
            size += len(text.encode())
            documents += 1
            file.write(json.dumps({"text": text}) + "\n")
    temporary.replace(out)
    say(f"{documents} of {len(texts)} different files, {size / 1e6:.0f} MB")
    return {"documents": documents, "bytes": size}


def train_tokenizer(text: Path, out: Path, vocabulary: int):
    script = ROOT / "python/twell/train_tokenizer.py"
    command = [sys.executable, script, "--vocab-size", str(vocabulary), "--out", out]
    command += ["--max-bytes", str(SAMPLE_BYTES), text]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("twell: the tokenizer could not be trained (its message is above)")


def measure_rate(program: Path, train: dict, vocabulary: int, device: str) -> dict:
    values = {name: train[name] for name in MODEL}
    values |= {"batch": train["batch"], "tokens": train["context"], "vocabulary": vocabulary}
    values |= {"mode": "train", "density": 0.5, "ffn": "dense", "seconds": 2, "device": device}
    machine, result = bench_model(program, values)
    return {"machine": machine, "tokens_per_second": result["tokens_per_second"]["dense"]}


def run_leg(program: Path, folder: Path, fresh: dict, device: str, deadline: float) -> bool:
    """Starts `twell train` or goes on with it; whether it is done, and not saved for later."""
    if (folder / "summary.json").exists():
        return True
    if time.monotonic() > deadline:
        return False
    command = [program, "train", "--out", folder, "--device", device]
    resumed = (folder / "checkpoint.safetensors").exists()
    command += ["--resume"] if resumed else flags(fresh)
    say(("goes on: " if resumed else "") + " ".join(map(str, command)))
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    try:
        status = process.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves itself
        process.wait()
        return (folder / "summary.json").exists()
    if status != 0:
        sys.exit(f"twell: `twell train` stopped with status {status}")
    return True


def curves(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "heldout_loss" in line]
    summary = folder / "summary.json"
    figures = json.loads(summary.read_text()) if summary.exists() else {}
    figures.pop("model", None)  # where the folder lies is no figure
    return {
        "summary": figures,
        "curves": {name: [line[name] for line in lines] for name in CURVES},
        "heldout": {
            name: [line[name] for line in held_out]
            for name in ("step", "step_seconds", "tokens", "heldout_loss")
        },
    }


def compare(dense: dict, sparse: dict) -> dict:
    """What the sparse run lost and gained."""
    ends = {"dense": dense, "sparse": sparse}
    for name in ("steps", "tokens", "train_tokens", "heldout_tokens"):
        values = {leg: run["summary"][name] for leg, run in ends.items()}
        if len(set(values.values())) != 1:
            sys.exit(f"twell: {name} must be the same in both runs, and is {values}")
    loss = {leg: run["summary"]["heldout_loss"] for leg, run in ends.items()}
    seconds = {leg: run["curves"]["step_seconds"][-1] for leg, run in ends.items()}
    goal = 1.02 * dense["heldout"]["heldout_loss"][-1]
    held_out = sparse["heldout"]
    pairs = zip(held_out["step_seconds"], held_out["heldout_loss"], strict=True)
    return {
        "heldout_loss": loss,
        "loss_ratio": loss["sparse"] / loss["dense"],
        "step_seconds": seconds,
        "time_ratio": seconds["sparse"] / seconds["dense"],
        # The first evaluation of the sparse run that is within 2% of the dense run's last one.
        "seconds_to_within_2_percent": next((s for s, loss in pairs if loss <= goal), None),
    }


def report(state: Path, settings: dict) -> dict:
    legs = {leg: curves(state / leg) for leg in LEGS if (state / leg / "metrics.jsonl").exists()}
    complete = len(legs) == 2 and all(run["summary"] for run in legs.values())
    rate = state / "rate.json"
    return {
        "machine": json.loads(rate.read_text())["machine"] if rate.exists() else {},
        "settings": settings,
        "complete": complete,
        "comparison": compare(**legs) if complete else None,
        **legs,
    }


def once(path: Path, title: str, work) -> dict:
    """The answer of `work`, kept in `path`."""
    if not path.exists():
        say(title)
        start = time.monotonic()
        answer = work()
        write_json(path, answer)
        say(f"took {time.monotonic() - start:.0f} s")
    return json.loads(path.read_text())


def setting(pair: str) -> tuple[str, object]:
    name, _, value = pair.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--twell", type=Path, required=True, help="the program")
    add("--state", type=Path, default=ROOT / "runs/train_run", help="folder for all that is made")
    add("--json", type=Path, default=ROOT / "bench/results/h200/train_run.json")
    paths = sysconfig.get_paths()
    folders = [Path(paths["purelib"]), Path(paths["stdlib"])]
    add("--data", type=Path, nargs="+", default=folders, help="folders with Python sources")
    add("--max-bytes", type=int, default=400 << 20, help="of text")
    add("--minutes", type=float, default=8, help="that the dense run is to take at least")
    add("--steps", type=int, help="instead: of both runs")
    add("--budget", type=float, default=math.inf, help="seconds until the script stops")
    add("--save-seconds", type=float, default=45, help="of them, to write a checkpoint of 6 GB")
    add("--target-active", default="30", help="of the sparse run")
    add("--lambda", dest="lambda_", type=float, default=1e-4, help="that it starts with")
    add("--arrival", type=float, default=0.35, help="when it is there, as a share of the run")
    add("--device", nargs="+", default=["cuda"], help="with two, both runs go at once")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other flags of twell train")
    add("--vocabulary", type=int, default=VOCABULARY)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    deadline = time.monotonic() + arguments.budget - arguments.save_seconds
    state, program = arguments.state, arguments.twell
    state.mkdir(parents=True, exist_ok=True)
    train = TRAIN | dict(map(setting, arguments.set))

    text, tokenizer = state / "text.jsonl", state / "tokenizer.json"
    data = once(
        state / "data.json",
        "Python sources",
        lambda: gather_text(arguments.data, text, arguments.max_bytes),
    )
    if not tokenizer.exists():
        say("tokenizer")
        train_tokenizer(text, tokenizer, arguments.vocabulary)
    rate = once(
        state / "rate.json",
        "speed of dense training",
        lambda: measure_rate(program, train, arguments.vocabulary, arguments.device[0]),
    )

    tokens = train["batch"] * train["context"] * train.get("accumulate", 1)
    seconds = STEP_MARGIN * 60 * arguments.minutes
    steps = arguments.steps or math.ceil(seconds * rate["tokens_per_second"] / tokens)
    settings = once(
        state / "settings.json",
        f"{steps} steps of {tokens} tokens",
        lambda: {"steps": steps, "eval-every": max(1, steps // EVALUATIONS), **train},
    )
    LEGS["sparse"] |= {
        "target-active": arguments.target_active,
        "lambda": arguments.lambda_,
        "arrival": arguments.arrival,
    }
    common = {"data": text, "tokenizer": tokenizer, **settings}
    devices = itertools.cycle(arguments.device)
    with ThreadPoolExecutor(len(arguments.device)) as pool:
        legs = [
            pool.submit(run_leg, program, state / leg, common | own, device, deadline)
            for (leg, own), device in zip(LEGS.items(), devices, strict=False)
        ]
        try:
            done = all([leg.result() for leg in as_completed(legs)])
        except BaseException:  # one failed, or Ctrl-C: the other must not start
            pool.shutdown(cancel_futures=True)
            raise
    at_once = len(arguments.device) > 1
    answer = report(state, {**settings, "sparse": LEGS["sparse"], "data": data, "at_once": at_once})
    write_json(arguments.json, answer)
    say(f"wrote {arguments.json}")
    if not done:
        say("time is over; the same command goes on")
        sys.exit(UNFINISHED)
    print(json.dumps(answer["comparison"], indent=1))


if __name__ == "__main__":
    main()
