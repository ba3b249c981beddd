"""Times the CUDA forward against PyTorch's bf16 dense FFN in the same process, with L2 flushed.

usage: cuda_ffn.py --library build/libtwell_cuda_bench.so --traces DIR --json FILE [--commit ID]
                   [--only prefill|decode] [--cases "layer 5,29 uniform"] [--tokens 131072,16384]

Medians of CUDA events. A case is a layer of the traces, N neurons chosen at random per token (also
at other sizes, "29 uniform, HIDDENxNEURONS"), or random weights (half of the gate's values
positive). The input that gives a pattern is found by gradient descent on x and the gate, until
their bf16 product has the pattern exactly.
"""

import argparse
import ctypes
import json
import re
import statistics
import subprocess

import numpy
import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

HIDDEN, NEURONS, TRACE_TOKENS = 2048, 5632, 4096
TILE = 128  # tokens that share a union
KERNEL = re.compile(r"twell::cuda::.*?(\w+)_kernel")
PREFILL = (131072, 16384, 4096, 1024, 512, 128)
COMPILED = PREFILL[:2]  # tokens for which the compiled dense form is timed too
DECODE = (1, 4, 16, 32, 64)
OTHER_SIZES = ((3072, 8192), (4096, 14336))  # hidden, neurons
DECODE_LAYERS = 8  # weights in rotation, so that they come from memory


def current_stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


class Forward:
    """ffn_forward of the core with its workspace."""

    def __init__(self, library, tokens, gate):
        self.library = library
        self.message = ctypes.create_string_buffer(1000)
        neurons, hidden = gate.shape
        sizes = [ctypes.c_int64(v) for v in (tokens, hidden, neurons)]
        self.plan = ctypes.c_void_p(library.twell_bench_plan(0, *sizes, self.message, 1000))
        if not self.plan:
            raise RuntimeError(self.message.value.decode())
        size = library.twell_bench_workspace_bytes(self.plan)
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __del__(self):
        self.library.twell_bench_free(self.plan)

    def __call__(self, x, gate, up, down, y):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, gate, up, down, y)]
        rest = (None, ctypes.c_void_p(self.workspace.data_ptr()), current_stream())
        if self.library.twell_bench_forward(self.plan, *pointers, *rest, self.message, 1000):
            raise RuntimeError(self.message.value.decode())


def dense(x, gate, up, down_t):
    return linear(torch.relu(linear(x, gate)) * linear(x, up), down_t)


def dense_concatenated(x, gate_up, down_t):
    gate, up = linear(x, gate_up).chunk(2, dim=1)
    return linear(torch.relu(gate) * up, down_t)


dense_compiled = torch.compile(dense, dynamic=False)


def random_weights(hidden=HIDDEN, neurons=NEURONS):
    """Up and down, neuron-major."""
    return [
        (torch.randn(neurons, hidden, device="cuda") * scale**-0.5).bfloat16()
        for scale in (hidden, neurons)
    ]


def trace_pattern(folder, layer):
    rows = numpy.fromfile(f"{folder}/layer{layer}.rowptr.u32", dtype="<u4").astype(numpy.int64)
    columns = numpy.fromfile(f"{folder}/layer{layer}.cols.u16", dtype="<u2").astype(numpy.int64)
    pattern = torch.zeros(TRACE_TOKENS, NEURONS, dtype=torch.bool)
    tokens = torch.repeat_interleave(torch.arange(TRACE_TOKENS), torch.tensor(numpy.diff(rows)))
    pattern[tokens, torch.tensor(columns)] = True
    return pattern.cuda()


def uniform_pattern(active, neurons=NEURONS):
    scores = torch.rand(TRACE_TOKENS, neurons, device="cuda")
    pattern = torch.zeros(TRACE_TOKENS, neurons, dtype=torch.bool, device="cuda")
    return pattern.scatter_(1, scores.topk(active, 1).indices, True)


def fit(pattern, hidden=HIDDEN):
    """x [4096, hidden] and gate with (x gateᵀ > 0) = pattern, by Adam on a squared hinge."""
    gate = torch.randn(pattern.shape[1], hidden, device="cuda") * hidden**-0.5
    gate[:, 0] = -0.3
    x = pattern.float() @ gate
    x[:, 0] = 1
    x *= hidden**0.5 / x.norm(dim=1, keepdim=True)
    sign = pattern.float() * 2 - 1
    weight = torch.where(pattern, 8.0, 1.0)
    state = [(x, 0.02, torch.zeros_like(x), torch.zeros_like(x))]
    state.append((gate, 0.02 * hidden**-0.5, torch.zeros_like(gate), torch.zeros_like(gate)))
    for step in range(1, 1001):
        xb, gb = x.bfloat16(), gate.bfloat16()
        product = (xb @ gb.T).float()
        if step % 20 == 0 and torch.equal(product > 0, pattern):
            return xb, gb
        error = (torch.relu(0.25 - product * sign) * sign * weight).bfloat16()
        gradients = (-(error @ gb).float(), -(error.T @ xb).float())
        for (value, rate, mean, square), gradient in zip(state, gradients, strict=True):
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.98).addcmul_(gradient, gradient, value=0.02)
            scale = (square / (1 - 0.98**step)).sqrt() + 1e-12
            value.sub_(rate * mean / (1 - 0.9**step) / scale)
    raise RuntimeError("no input with this pattern was found in 1000 steps")


def medians_ms(calls, repeats=9):
    """Of each call; all take turns, so that they share the card's temperature and power."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = [[] for _ in calls]
    for i in range(repeats + 3):
        for call, own in zip(calls, times, strict=True):
            flush.zero_()
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                own.append(begin.elapsed_time(end))
    return [statistics.median(own) for own in times]


def stage_ms(call):
    """Time of each kernel of twell in one call, by the profiler; empty if it sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    stages = {}
    for event in found.key_averages():
        if name := KERNEL.search(event.key):
            stages[name[1]] = stages.get(name[1], 0) + event.device_time_total / 1000
    return {name: round(ms, 4) for name, ms in stages.items()}


def result(case, gate, tokens, dense_ms, strongest_ms, twell_ms, stages, error):
    neurons, hidden = gate.shape
    row = {
        "case": case,
        "hidden": hidden,
        "neurons": neurons,
        "tokens": tokens,
        "dense_ms": round(dense_ms, 4),
        "dense_concatenated_ms": round(strongest_ms, 4),
        "twell_ms": round(twell_ms, 4),
        "ratio": round(dense_ms / twell_ms, 3),
        "error": round(error, 5),
        "stages": stages,
    }
    print(json.dumps(row), flush=True)
    return row


def relative_error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def sparsity(x, gate):
    """Mean active neurons of the first tokens, and mean size of their tiles' unions."""
    active = torch.relu(linear(x[:TRACE_TOKENS], gate)) > 0
    tiles = active[: len(active) // TILE * TILE].view(-1, TILE, len(gate)).any(1)
    return {
        "active_mean": round(active.sum(1).float().mean().item(), 2),
        "union_mean": round(tiles.sum(1).float().mean().item(), 2),
    }


def prefill(library, case, x, gate, up, down, tokens):
    x = x.repeat(-(-tokens // len(x)), 1)[:tokens].contiguous()
    y = torch.empty_like(x)
    down_t = down.T.contiguous()
    gate_up = torch.cat((gate, up))
    forward = Forward(library, tokens, gate)
    run = lambda: forward(x, gate, up, down, y)  # noqa: E731
    calls = [
        lambda: dense(x, gate, up, down_t),
        lambda: dense_concatenated(x, gate_up, down_t),
        run,
    ]
    if tokens in COMPILED:
        calls.append(lambda: dense_compiled(x, gate, up, down_t))
    times = medians_ms(calls)
    error = relative_error(y[:4096], dense(x[:4096], gate, up, down_t))
    row = result(case, gate, tokens, *times[:3], stage_ms(run), error) | sparsity(x, gate)
    if tokens in COMPILED:
        row["dense_compiled_ms"] = round(times[3], 4)
    return row


def graph_of(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph


def decode(library, case, x, gate, tokens):
    gates = [gate.clone() for _ in range(DECODE_LAYERS)]
    ups, downs = zip(*(random_weights() for _ in gates), strict=True)
    downs_t = [d.T.contiguous() for d in downs]
    gate_ups = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    x = x[:tokens].contiguous()
    y = torch.empty_like(x)
    forward = Forward(library, tokens, gate)

    def run():
        for weights in zip(gates, ups, downs, strict=True):
            forward(x, *weights, y)

    def run_dense():
        for weights in zip(gates, ups, downs_t, strict=True):
            dense(x, *weights)

    def run_concatenated():
        for weights in zip(gate_ups, downs_t, strict=True):
            dense_concatenated(x, *weights)

    graphs = [graph_of(call) for call in (run_dense, run_concatenated, run)]
    times = [ms / DECODE_LAYERS for ms in medians_ms([graph.replay for graph in graphs], 30)]
    error = relative_error(y, dense(x, gates[-1], ups[-1], downs_t[-1]))
    stages = stage_ms(lambda: forward(x, gates[0], ups[0], downs[0], y))
    return result(f"{case}, graph", gate, tokens, *times, stages, error)


def load_library(path):
    library = ctypes.CDLL(path)
    library.twell_bench_plan.restype = ctypes.c_void_p
    for size in ("workspace", "saved", "backward_workspace"):
        getattr(library, f"twell_bench_{size}_bytes").restype = ctypes.c_int64
    return library


def make_parser(description):
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--traces", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--commit", default="unknown")
    return parser


def write_report(arguments, rows):
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    report = {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": arguments.commit,
        "results": rows,
    }
    with open(arguments.json, "w") as file:
        json.dump(report, file, indent=1)
        file.write("\n")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=("prefill", "decode"), help="default: both")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="default: all")
    parser.add_argument(
        "--tokens", type=lambda text: [int(m) for m in text.split(",")], help="default: all"
    )
    arguments = parser.parse_args()
    library = load_library(arguments.library)
    torch.manual_seed(0)
    up, down = random_weights()
    inputs = {
        f"layer {layer}": lambda layer=layer: fit(trace_pattern(arguments.traces, layer))
        for layer in (1, 2, 4, 5, 7)
    }
    inputs["29 uniform"] = lambda: fit(uniform_pattern(29))
    inputs["50% active"] = lambda: (
        torch.randn(TRACE_TOKENS, HIDDEN, device="cuda").bfloat16(),
        up.roll(1, 0),
    )

    rows = []
    for case, make in inputs.items():
        sizes = [] if arguments.only == "decode" else PREFILL if case == "layer 5" else PREFILL[:2]
        decoded = DECODE if case == "layer 5" and arguments.only != "prefill" else ()
        if arguments.tokens:
            sizes = [m for m in sizes if m in arguments.tokens]
            decoded = [m for m in decoded if m in arguments.tokens]
        if (arguments.cases and case not in arguments.cases) or not (sizes or decoded):
            continue
        x, gate = make()
        rows += [prefill(library, case, x, gate, up, down, tokens) for tokens in sizes]
        rows += [decode(library, case, x, gate, tokens) for tokens in decoded]

    for hidden, neurons in OTHER_SIZES:
        case, tokens = f"29 uniform, {hidden}x{neurons}", COMPILED[-1]
        wanted = arguments.only != "decode" and tokens in (arguments.tokens or [tokens])
        if wanted and (not arguments.cases or case in arguments.cases):
            x, gate = fit(uniform_pattern(29, neurons), hidden)
            weights = random_weights(hidden, neurons)
            rows.append(prefill(library, case, x, gate, *weights, tokens))

    write_report(arguments, rows)


if __name__ == "__main__":
    main()
