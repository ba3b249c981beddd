"""Times whole models on a GPU, dense and with twell's blocks, and stores the figures.

usage: run_model.py --twell PROGRAM [--traces DIR] [--checkpoint DIR --data PATH] [--kernels] …

Runs `twell bench model` once per case and writes bench/results/h200/model.json after each,

    {"machine": {…}, "results": [{"source", "mode", "layers", "batch", "dense_ms", "twell_ms", …}]}

The layers of a random model follow the traces in turn. With --checkpoint, a model that `twell
train` wrote, the cases of its number of layers run on it as well, on text from PATH. Some cases
time --ffn auto too, and two only that, on a random model with half of its neurons active. With
--kernels it lists the kernels of some cases instead, in model_kernels.json. With two devices, two
cases run at once, each on its own. Needs nothing but Python's standard library; how long it should
take and took is printed.
"""

import argparse
import json
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_machine import bench_model, write_json
from run_ffn import ROOT, traces_folder

SIZES = {"hidden": 2048, "heads": 32, "kv-heads": 32, "vocabulary": 49152}
FORWARD = {"mode": "forward", "batch": 64, "tokens": 2048}
EVAL = {**FORWARD, "mode": "eval"}
TRAIN = {"mode": "train", "batch": 8, "tokens": 2048}
CHECKPOINTING = {**TRAIN, "checkpoint-activations": True}
# Seconds of timing give about nine rounds, of large training steps five. Without checkpointing 38
# layers take 80 GB, more than an H100 has.
WITH_AUTO = {"ffn": "dense,auto,twell"}
CASES = (
    {"layers": 8, **FORWARD, "seconds": 5, **WITH_AUTO},
    {"layers": 8, **EVAL, "seconds": 4},
    {"layers": 8, **TRAIN, "seconds": 3, **WITH_AUTO},
    {"layers": 8, **CHECKPOINTING, "seconds": 2.5},
    {"layers": 18, **FORWARD, "seconds": 7},
    {"layers": 18, **TRAIN, "seconds": 3},
    {"layers": 18, **CHECKPOINTING, "seconds": 3},
    {"layers": 28, **FORWARD, "seconds": 9},
    {"layers": 28, **TRAIN, "seconds": 3},
    {"layers": 28, **CHECKPOINTING, "seconds": 3.5},
    {"layers": 38, **FORWARD, "seconds": 16},
    {"layers": 38, **CHECKPOINTING, "seconds": 4.5},
)
# Of a random model as it begins, with half of its neurons active: what auto costs where dense is
# faster.
DENSE_CASES = (
    {"layers": 8, **FORWARD, "seconds": 3, "ffn": "dense,auto"},
    {"layers": 8, **TRAIN, "seconds": 2, "ffn": "dense,auto"},
)


def expected_seconds(case: dict) -> float:
    """Of a whole case on an H200: making the model, two rounds that warm up, timing, energy."""
    return (
        9 + 0.4 * case["layers"] + case["seconds"] + (3 if WITH_AUTO.items() <= case.items() else 0)
    )


def profiled(subject: dict, case: dict) -> bool:
    """Whether --kernels takes the case: a random model's, and a trained one's training step."""
    if "density" in subject:
        return False
    if "checkpoint" in subject:
        return case["mode"] == "train" and "checkpoint-activations" not in case
    return case["layers"] == 8 and case["mode"] != "eval"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--twell", type=Path, required=True, help="the program")
    parser.add_argument("--traces", type=Path, help="default: $TWELL_TRACES or ../shared/traces")
    parser.add_argument("--checkpoint", type=Path, help="a trained model to time as well")
    parser.add_argument("--data", type=Path, help="text for it")
    parser.add_argument("--kernels", action="store_true", help="list kernels, in another file")
    parser.add_argument("--out", type=Path, help="default: the file in bench/results/h200")
    parser.add_argument("--device", nargs="+", default=["cuda"])
    parser.add_argument("--seconds", type=float, help="of timing, instead of each case's own")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) != (arguments.data is None):
        sys.exit("twell: --checkpoint and --data go together")
    name = "model_kernels.json" if arguments.kernels else "model.json"
    out = arguments.out or ROOT / "bench/results/h200" / name

    jobs = [({**SIZES, "trace": traces_folder(arguments.traces)}, case) for case in CASES]
    jobs += [({**SIZES, "density": 0.5}, case) for case in DENSE_CASES]
    if arguments.checkpoint:
        layers = json.loads((arguments.checkpoint / "config.json").read_text())["num_hidden_layers"]
        trained = {"checkpoint": arguments.checkpoint, "data": arguments.data, "layers": None}
        jobs += [(trained, case) for case in CASES if case["layers"] == layers]
    own = {"kernels": True} if arguments.kernels else {}
    if arguments.kernels:
        jobs = [job for job in jobs if profiled(*job)]
    if arguments.seconds is not None:
        own["seconds"] = arguments.seconds
    jobs = [(subject, {**case, **own}) for subject, case in jobs]
    expected = sum(expected_seconds(case) for _, case in jobs)
    print(f"{len(jobs)} cases, about {expected:.0f} s of device time on an H200", flush=True)

    free = queue.SimpleQueue()
    for device in arguments.device:
        free.put(device)

    def time_case(job):
        subject, case = job
        device = free.get()
        start = time.monotonic()
        try:
            machine, result = bench_model(arguments.twell, {**case, **subject, "device": device})
        finally:
            free.put(device)
        spent = time.monotonic() - start
        print(f"took {spent:.0f} s, {expected_seconds(case):.0f} expected", flush=True)
        # Where the folders lie is no part of a figure.
        source = {"trace": "traces", "density": "random", "checkpoint": "checkpoint"}
        source = next(name for key, name in source.items() if key in subject)
        return machine, {**result, "source": source, "device": device}

    results = []
    with ThreadPoolExecutor(len(arguments.device)) as pool:
        try:
            for machine, result in pool.map(time_case, jobs):
                results.append(result)
                write_json(out, {"machine": machine, "results": results})
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
