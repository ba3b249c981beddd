"""Times the CUDA forward against PyTorch's bf16 dense FFN in the same process, with L2 flushed.

usage: cuda_ffn.py --library build/libtwell_cuda_bench.so --traces DIR --json FILE [--commit ID]
                   [--only forward|gate] [--cases "layer 5" "29 uniform, 3072x8192"]
                   [--tokens 131072 16384]

Medians of CUDA events. A case is a layer of the traces, N neurons chosen at random per token (also
at other sizes, "29 uniform, HIDDENxNEURONS"), or random weights (half of the gate's values
positive). The input that gives a pattern is found by gradient descent on x and the gate, until
their bf16 product has the pattern exactly.

Up to 1024 tokens every form is replayed from a CUDA graph ("CASE, graph"), so that no side waits
for the host to launch its kernels. Up to 64 tokens a graph has eight layers, and the times are a
layer's.

Every case says what the planner chooses by itself, told the pattern's means (auto_*). The rows
"gate" compare the gate's kernel with cuBLAS's product of the same shape, by the profiler.
"""

import argparse
import collections
import ctypes
import dataclasses
import functools
import json
import re
import statistics
import subprocess
from collections.abc import Callable

import numpy
import torch
from torch.autograd import DeviceType
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

HIDDEN, NEURONS, TRACE_TOKENS = 2048, 5632, 4096
TILE = 128  # tokens that share a union
KERNEL = re.compile(r"twell::cuda::.*?(\w+)_kernel")
LARGE = (131072, 16384)
PREFILL = (*LARGE, 4096, 1024, 512, 256, 128)
DECODE = (1, 4, 16, 32, 64)
OTHER_SIZES = {  # hidden, neurons: the tokens of each kind of row
    (1024, 4096): {"forward": LARGE[1:]},
    (3072, 8192): {"forward": LARGE[1:]},
    (4096, 14336): {"forward": (*LARGE[1:], 1, 16)},
    (8192, 22016): {"forward": LARGE[1:]},
    (2048, 5640): {"gate": LARGE},  # the last tile of 64 neurons is not full
}
GRAPH_TOKENS = 1024  # up to which kernels are so short that the host may delay them
DECODE_LAYERS = 8  # in one graph, whose own launch would count; each has weights of its own


def current_stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def sizes_of(tokens, gate):
    neurons, hidden = gate.shape
    return [ctypes.c_int64(size) for size in (tokens, hidden, neurons)]


class Forward:
    """ffn_forward of the core with its workspace."""

    def __init__(self, library, tokens, gate):
        self.library = library
        self.message = ctypes.create_string_buffer(1000)
        sizes = sizes_of(tokens, gate)
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


class GatePack:
    """gate_pack of the core with its words and workspace."""

    def __init__(self, library, tokens, gate):
        self.library = library
        self.message = ctypes.create_string_buffer(1000)
        self.sizes = sizes_of(tokens, gate)
        words, workspace = ctypes.c_int64(), ctypes.c_int64()
        self.call(library.twell_bench_gate_pack_bytes, ctypes.byref(words), ctypes.byref(workspace))
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device="cuda")
            for size in (words.value, 8, workspace.value)
        ]

    def call(self, function, *arguments):
        if function(*self.sizes, *arguments, self.message, 1000):
            raise RuntimeError(self.message.value.decode())

    def __call__(self, x, gate):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, gate, *self.buffers)]
        self.call(self.library.twell_bench_gate_pack, *pointers, current_stream())


def choice(library, tokens, gate, means, training=False):
    """The path that the planner chooses for `means` (see sparsity), and the times it predicts."""
    message = ctypes.create_string_buffer(1000)
    known = [ctypes.c_double(means[name]) for name in ("active_mean", "union_mean")]
    is_dense, dense_ms, sparse_ms = ctypes.c_int(), ctypes.c_double(), ctypes.c_double()
    answers = [ctypes.byref(value) for value in (is_dense, dense_ms, sparse_ms)]
    sizes = sizes_of(tokens, gate)
    if library.twell_bench_choice(int(training), *sizes, *known, *answers, message, 1000):
        raise RuntimeError(message.value.decode())
    return "dense" if is_dense.value else "sparse", dense_ms.value, sparse_ms.value


def dense(x, gate, up, down_t):
    return linear(torch.relu(linear(x, gate)) * linear(x, up), down_t)


def dense_concatenated(x, gate_up, down_t):
    gate, up = linear(x, gate_up).chunk(2, dim=1)
    return linear(torch.relu(gate) * up, down_t)


# Compiled anew for every shape; a full graph, which never falls back to the plain form unseen.
torch._dynamo.config.recompile_limit = 64
dense_compiled, dense_concatenated_compiled = (
    torch.compile(form, dynamic=False, fullgraph=True) for form in (dense, dense_concatenated)
)


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


def independent(share):
    """x and gate with each value positive by chance, so many of them."""
    x, gate = torch.randn(TRACE_TOKENS, HIDDEN, device="cuda"), random_weights()[0]
    x[:, 0] = 8  # the others' part in a value is of standard deviation 1
    gate[:, 0] = statistics.NormalDist().inv_cdf(share) / 8
    return x.bfloat16(), gate


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


@functools.cache
def larger_than_l2():
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def flush_l2():
    """By a kernel of its own that nothing timed here runs."""
    larger_than_l2().bitwise_not_()


def medians_ms(calls, repeats=9):
    """Of each call; all take turns, so that they share the card's temperature and power."""
    times = [[] for _ in calls]
    for i in range(repeats + 3):
        for call, own in zip(calls, times, strict=True):
            flush_l2()
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                own.append(begin.elapsed_time(end))
    return [statistics.median(own) for own in times]


def profiled(calls, repeats):
    """Of each call: what its kernels took, {name: ms}, for every repeat; calls take turns."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            for call in calls:
                flush_l2()
                call()
                torch.cuda.synchronize()
    runs = split_at_flushes(found.events())
    if len(runs) != repeats * len(calls):
        raise RuntimeError(f"the profiler saw {len(runs)} of {repeats * len(calls)} calls")
    return [runs[i :: len(calls)] for i in range(len(calls))]


def split_at_flushes(events):
    """{name: ms} of the kernels after each flush, which is what the first kernel of all is."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    runs = []
    for kernel in kernels:
        if kernel.name == kernels[0].name:
            runs.append(collections.Counter())
        else:
            runs[-1][kernel.name] += kernel.time_range.elapsed_us() / 1000
    return runs


def median_stages(runs):
    """Medians of what twell's kernels took, by their short names."""
    stages = collections.defaultdict(list)
    for run in runs:
        own = collections.Counter()
        for kernel, ms in run.items():
            if name := KERNEL.search(kernel):
                own[name[1]] += ms
        for name, ms in own.items():
            stages[name].append(ms)
    return {name: round(statistics.median(own), 4) for name, own in stages.items()}


def stage_ms(call):
    (runs,) = profiled([call], 5)
    return median_stages(runs)


def result(library, case, x, gate, times, stages, error):
    """A row; `times` has the ms of every dense form and of twell."""
    neurons, hidden = gate.shape
    tokens = len(x)
    strongest_ms = min(ms for form, ms in times.items() if form != "twell")
    means = sparsity(x, gate)
    path, predicted_dense_ms, predicted_sparse_ms = choice(library, tokens, gate, means)
    auto_ms = times["dense" if path == "dense" else "twell"]
    row = {
        "case": case,
        "hidden": hidden,
        "neurons": neurons,
        "tokens": tokens,
        **means,
        **{f"{form}_ms": round(ms, 4) for form, ms in times.items()},
        "ratio": round(times["dense"] / times["twell"], 3),
        "dense_strongest_ms": round(strongest_ms, 4),
        "ratio_strongest": round(strongest_ms / times["twell"], 3),
        "auto_path": path,
        "auto_ms": round(auto_ms, 4),
        "auto_ratio": round(times["dense"] / auto_ms, 3),
        "predicted_dense_ms": round(predicted_dense_ms, 4),
        "predicted_sparse_ms": round(predicted_sparse_ms, 4),
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
    tile = min(TILE, len(active))
    tiles = active[: len(active) // tile * tile].view(-1, tile, len(gate)).any(1)
    return {
        "active_mean": round(active.sum(1).float().mean().item(), 2),
        "union_mean": round(tiles.sum(1).float().mean().item(), 2),
    }


def repeated(x, tokens):
    return x.repeat(-(-tokens // len(x)), 1)[:tokens].contiguous()


def graph_of(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph


def forward_row(library, case, x, gate, up, down, tokens):
    x = repeated(x, tokens)
    y = torch.empty_like(x)
    layers = DECODE_LAYERS if tokens <= max(DECODE) else 1
    gates, ups, downs = ([own.clone() for _ in range(layers)] for own in (gate, up, down))
    downs_t = [own.T.contiguous() for own in downs]
    gate_ups = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    forward = Forward(library, tokens, gate)

    def in_layers(form, *weights):
        def run():
            for own in zip(*weights, strict=True):
                form(x, *own)

        return run

    calls = {
        "dense": in_layers(dense, gates, ups, downs_t),
        "dense_concatenated": in_layers(dense_concatenated, gate_ups, downs_t),
        "dense_compiled": in_layers(dense_compiled, gates, ups, downs_t),
        "dense_concatenated_compiled": in_layers(dense_concatenated_compiled, gate_ups, downs_t),
        "twell": in_layers(functools.partial(forward, y=y), gates, ups, downs),
    }
    repeats = 9
    if tokens <= GRAPH_TOKENS:
        case += ", graph"
        calls = {form: graph_of(call).replay for form, call in calls.items()}
        repeats = 30
    medians = medians_ms(calls.values(), repeats)
    times = {form: ms / layers for form, ms in zip(calls, medians, strict=True)}
    first = slice(TRACE_TOKENS)
    error = relative_error(y[first], dense(x[first], gate, up, downs_t[0]))
    stages = stage_ms(lambda: forward(x, gate, up, down, y))
    return result(library, case, x, gate, times, stages, error)


def gate_row(library, case, x, gate, up, down, tokens):
    """The gate's kernel, in the forward and with its words (gate_pack), and cuBLAS's product."""
    x = repeated(x, tokens)
    y = torch.empty_like(x)
    forward, pack = Forward(library, tokens, gate), GatePack(library, tokens, gate)
    calls = [
        lambda: linear(x, gate),
        lambda: forward(x, gate, up, down, y),
        lambda: pack(x, gate),
    ]
    for call in calls:
        call()
    cublas, ours, packed = profiled(calls, 11)
    cublas_ms, pack_ms = (
        statistics.median(sum(run.values()) for run in runs) for runs in (cublas, packed)
    )
    gate_ms = median_stages(ours)["gate"]
    row = {
        "case": case,
        "hidden": gate.shape[1],
        "neurons": gate.shape[0],
        "tokens": tokens,
        "cublas_ms": round(cublas_ms, 4),
        "gate_ms": gate_ms,
        "gate_pack_ms": round(pack_ms, 4),
        "ratio": round(cublas_ms / gate_ms, 3),
    }
    print(json.dumps(row), flush=True)
    return row


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


def write_report(arguments, rows, **more):
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    report = {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": arguments.commit,
        "results": rows,
        **more,
    }
    with open(arguments.json, "w") as file:
        json.dump(report, file, indent=1)
        file.write("\n")


@dataclasses.dataclass
class Case:
    make: Callable  # x and gate
    forward: tuple = ()  # tokens of each kind of row
    gate: tuple = ()


def uniform_case(hidden, neurons, **tokens):
    return Case(lambda: fit(uniform_pattern(29, neurons), hidden), **tokens)


def cases(traces):
    """By name."""
    found = {
        f"layer {layer}": Case(lambda layer=layer: fit(trace_pattern(traces, layer)), LARGE)
        for layer in (1, 2, 4, 5, 7)
    }
    every = {"forward": (*PREFILL, *DECODE), "gate": LARGE}
    found["layer 5"] = dataclasses.replace(found["layer 5"], **every)
    found["29 uniform"] = uniform_case(HIDDEN, NEURONS, forward=LARGE, gate=LARGE)
    found["50% active"] = Case(lambda: independent(0.5), **every)
    for (hidden, neurons), tokens in OTHER_SIZES.items():
        found[f"29 uniform, {hidden}x{neurons}"] = uniform_case(hidden, neurons, **tokens)
    return found


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=("forward", "gate"), help="default: all")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="default: all")
    arguments = parser.parse_args()
    library = load_library(arguments.library)
    torch.manual_seed(0)

    def wanted(kind, tokens):
        if arguments.only not in (None, kind):
            return []
        return [m for m in tokens if m in (arguments.tokens or tokens)]

    rows, gate_rows = [], []
    for name, case in cases(arguments.traces).items():
        sizes, gates = wanted("forward", case.forward), wanted("gate", case.gate)
        if name not in (arguments.cases or [name]) or not (sizes or gates):
            continue
        x, gate = case.make()
        up, down = random_weights(*gate.shape[::-1])
        rows += [forward_row(library, name, x, gate, up, down, tokens) for tokens in sizes]
        gate_rows += [gate_row(library, name, x, gate, up, down, tokens) for tokens in gates]

    write_report(arguments, rows, gate=gate_rows)


if __name__ == "__main__":
    main()
