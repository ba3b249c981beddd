"""Times whole models on a GPU, dense and with twell's blocks, and stores the figures.

usage: run_model.py --twell PROGRAM [--traces DIR] [--checkpoint DIR --data PATH] [--out FILE]

Runs `twell bench model` once per case and writes bench/results/h200/model.json after each,

    {"machine": {…}, "results": [{"source", "mode", "layers", "batch", "dense_ms", "twell_ms", …}]}

The layers of a random model follow the traces in turn. With --checkpoint, a model that `twell
train` wrote, the cases of its number of layers run on it as well, on text from PATH. With two
devices, two cases run at once, each on its own. Needs nothing but Python's standard library; a case
takes under a minute.
"""

import argparse
import json
import queue
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_machine import bench_model, write_json
from run_ffn import ROOT, traces_folder

SIZES = {"hidden": 2048, "heads": 32, "kv-heads": 32, "vocabulary": 49152}
CASES = (
    {"layers": 8, "mode": "forward", "batch": 64, "tokens": 2048},
    {"layers": 8, "mode": "eval", "batch": 64, "tokens": 2048},
    {"layers": 8, "mode": "train", "batch": 8, "tokens": 2048},
    {"layers": 8, "mode": "train", "batch": 8, "tokens": 2048, "checkpoint-activations": True},
    {"layers": 38, "mode": "forward", "batch": 64, "tokens": 2048},
    {"layers": 38, "mode": "eval", "batch": 64, "tokens": 2048},
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--twell", type=Path, required=True, help="the program")
    parser.add_argument("--traces", type=Path, help="default: $TWELL_TRACES or ../shared/traces")
    parser.add_argument("--checkpoint", type=Path, help="a trained model to time as well")
    parser.add_argument("--data", type=Path, help="text for it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/h200/model.json")
    parser.add_argument("--device", nargs="+", default=["cuda"])
    parser.add_argument("--seconds", type=float, default=8, help="of timing, per case")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) != (arguments.data is None):
        sys.exit("twell: --checkpoint and --data go together")
    traces = traces_folder(arguments.traces)

    subjects = [({**SIZES, "trace": traces}, case) for case in CASES]
    if arguments.checkpoint:
        config = json.loads((arguments.checkpoint / "config.json").read_text())
        trained = {"checkpoint": arguments.checkpoint, "data": arguments.data}
        for case in CASES:
            if case["layers"] == config["num_hidden_layers"]:
                rest = {name: value for name, value in case.items() if name != "layers"}
                subjects.append((trained, rest))

    free = queue.SimpleQueue()
    for device in arguments.device:
        free.put(device)

    def time_case(job):
        subject, case = job
        device = free.get()
        values = {**subject, **case, "device": device, "seconds": arguments.seconds}
        try:
            machine, result = bench_model(arguments.twell, values)
        finally:
            free.put(device)
        # Where the folders lie is no part of a figure.
        source = "checkpoint" if "checkpoint" in subject else "traces"
        return machine, {**result, "source": source, "device": device}

    results = []
    with ThreadPoolExecutor(len(arguments.device)) as pool:
        try:
            for machine, result in pool.map(time_case, subjects):
                results.append(result)
                write_json(arguments.out, {"machine": machine, "results": results})
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
