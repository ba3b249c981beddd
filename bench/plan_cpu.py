"""Times what the planner for CPUs predicts, and stores the figures.

usage: plan_cpu.py [--shapes KxN …] [--out FILE] [--seconds S]

For blocks of three shapes, few and many tokens and every density: one call of PyTorch's dense block
and one of twell's sparse one, in turn, the forward alone and with the backward. Writes

    {"machine": {…}, "results": [{"kind", "hidden", "neurons", "tokens", "training", "active",
                                  "dense_ms", "twell_ms"}, …]}

to bench/results/cpu/plan-ISA.json, which the planner's constants are fitted to. The constants are
judged by other shapes, in plan-held-out-ISA.json. tests/app/plan_figures_test.cpp reads both.

Times are processor time of one thread, which other work on the machine disturbs less than the
clock, and lower quartiles. Weights rotate through copies beyond the second-level cache.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch.nn.functional import linear

import twell

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("256x1024", "512x1536", "2048x5632")  # hidden x neurons
KINDS = ("gated", "plain")
DENSITIES = (0.005, 0.02, 0.1, 0.2, 0.5, 1.0)
TOKENS = {False: (1, 4, 16, 64, 128, 512, 2048), True: (64, 128, 512, 2048)}  # by training
COPIES_BYTES = 64 << 20
MIN_ROUNDS = 4


class Block:
    """A block whose neurons are each active for a given share of random tokens, independently."""

    def __init__(self, kind: str, hidden: int, neurons: int, seed: int):
        generator = torch.Generator().manual_seed(seed)

        def weight(fan_in: int) -> torch.Tensor:
            return (torch.randn(neurons, hidden, generator=generator) / fan_in**0.5).bfloat16()

        gate = [weight(hidden)] if kind == "gated" else []
        self.projections = [*gate, weight(hidden)]
        self.down = weight(neurons)
        self.down_proj = self.down.t().contiguous()

    def set_density(self, density: float):
        """x's last column is 1, so the first projection's last column is a bias."""
        bias = statistics.NormalDist().inv_cdf(density) if density < 1 else 100
        self.projections[0][:, -1] = bias

    def dense(self, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        h = linear(x, weights[0]).relu()
        if len(weights) == 3:
            h = h * linear(x, weights[1])
        return linear(h, weights[-1])

    def sparse(self, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        run = twell.functional.gated_ffn if len(weights) == 3 else twell.functional.ffn
        return run(x, *weights, "twell").y


def timed(run, x, weights, grad_y) -> float:
    """Milliseconds of processor time of a call, with the backward if grad_y is given."""
    inputs = [t.detach().requires_grad_(grad_y is not None) for t in (x, *weights)]
    start = time.thread_time()
    y = run(*inputs)
    gradients = torch.autograd.grad(y, inputs, grad_y) if grad_y is not None else ()
    spent = 1e3 * (time.thread_time() - start)
    del gradients
    return spent


def measure(blocks, density: float, tokens: int, training: bool, seconds: float) -> dict:
    first = blocks[0].projections[0]
    x = torch.randn(tokens, first.shape[1], dtype=torch.bfloat16)
    x[:, -1] = 1
    grad_y = torch.randn_like(x) if training else None
    for block in blocks:
        block.set_density(density)
    dense, sparse = [], []
    start = time.monotonic()
    while len(dense) <= MIN_ROUNDS or time.monotonic() - start < seconds:
        one = blocks[len(dense) % len(blocks)]
        other = blocks[(len(dense) + len(blocks) // 2) % len(blocks)]
        dense.append(timed(one.dense, x, (*one.projections, one.down_proj), grad_y))
        sparse.append(timed(other.sparse, x, (*other.projections, other.down), grad_y))
    active = (linear(x, blocks[0].projections[0]) > 0).sum().item() / tokens
    dense_ms, twell_ms = (statistics.quantiles(times[1:], n=4)[0] for times in (dense, sparse))
    return {"active": round(active, 1), "dense_ms": dense_ms, "twell_ms": twell_ms}


def describe_machine() -> dict:
    models = [
        line.split(": ")[1]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family", "model\t"))
    ]
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "cpu": models[2],
        "family": int(models[0]),
        "model": int(models[1]),
        "isa": twell.plan(8, 8, 1)["device"].split(", ")[1],
        "threads": 1,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="hidden x neurons")
    parser.add_argument("--out", type=Path, help="default: by this machine's instruction set")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing, per case, at least")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)

    results = []
    for shape, kind in itertools.product(arguments.shapes, KINDS):
        hidden, neurons = map(int, shape.split("x"))
        copy_bytes = (3 if kind == "gated" else 2) * hidden * neurons * 2
        count = max(3, COPIES_BYTES // copy_bytes)
        blocks = [Block(kind, hidden, neurons, seed) for seed in range(count)]
        for training in (False, True):
            for tokens, density in itertools.product(TOKENS[training], DENSITIES):
                case = {"kind": kind, "hidden": hidden, "neurons": neurons, "tokens": tokens,
                        "training": training}  # fmt: skip
                case |= measure(blocks, density, tokens, training, arguments.seconds)
                results.append(case)
                print(json.dumps(case), flush=True)
    machine = describe_machine()
    out = arguments.out or ROOT / f"bench/results/cpu/plan-{machine['isa']}.json"
    lines = ",\n".join(f"  {json.dumps(case)}" for case in results)
    out.write_text(f'{{"machine": {json.dumps(machine)},\n "results": [\n{lines}\n]}}\n')
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
