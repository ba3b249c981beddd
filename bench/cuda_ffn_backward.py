"""Times the CUDA forward and backward together against PyTorch's bf16 autograd in one process.

usage: cuda_ffn_backward.py --library build/libtwell_cuda_bench.so --traces DIR --json FILE
                            [--commit ID]

Cases, input and timing as in cuda_ffn.py, and shares of the neurons that are active by chance. Peak
memory is what a pass allocates at most beyond its inputs and the gradients that both forms return.
auto_path is what the planner chooses, told the pattern's means.
"""

import ctypes

import torch
from cuda_ffn import (
    HIDDEN,
    NEURONS,
    choice,
    current_stream,
    dense,
    fit,
    independent,
    load_library,
    make_parser,
    medians_ms,
    random_weights,
    relative_error,
    sparsity,
    stage_ms,
    trace_pattern,
    uniform_pattern,
    write_report,
)

TOKENS = 16384
SHARES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.5)  # of the neurons, active by chance


class Training:
    """Forward and backward of the core; every buffer is allocated anew, as the operators do."""

    def __init__(self, library, tokens):
        self.library = library
        self.message = ctypes.create_string_buffer(1000)
        sizes = [ctypes.c_int64(v) for v in (tokens, HIDDEN, NEURONS)]
        self.plan = ctypes.c_void_p(library.twell_bench_plan(1, *sizes, self.message, 1000))
        if not self.plan:
            raise RuntimeError(self.message.value.decode())

    def __del__(self):
        self.library.twell_bench_free(self.plan)

    def bytes(self, what):
        size = getattr(self.library, f"twell_bench_{what}_bytes")(self.plan)
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def call(self, function, *tensors):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        if function(self.plan, *pointers, current_stream(), self.message, 1000):
            raise RuntimeError(self.message.value.decode())

    def __call__(self, x, gate, up, down, dy):
        """y and the gradients of x, gate, up and down."""
        y = torch.empty_like(x)
        saved = self.bytes("saved")
        forward, backward = self.library.twell_bench_forward, self.library.twell_bench_backward
        self.call(forward, x, gate, up, down, y, saved, self.bytes("workspace"))
        grads = [torch.empty_like(t) for t in (x, gate, up, down)]
        workspace = self.bytes("backward_workspace")
        self.call(backward, dy, x, gate, up, down, saved, *grads, workspace)
        return y, *grads


def dense_training(x, gate, up, down_t, dy):
    leaves = [t.detach().requires_grad_() for t in (x, gate, up, down_t)]
    y = dense(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def peak_bytes(call):
    """Allocated at most during the call, less what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    returned = sum(t.numel() * t.element_size() for t in result)
    return torch.cuda.max_memory_allocated() - before - returned


def measure(library, case, x, gate, up, down, tokens=TOKENS):
    x = x.repeat(-(-tokens // len(x)), 1)[:tokens].contiguous()
    dy = torch.randn_like(x)
    down_t = down.T.contiguous()
    training = Training(library, tokens)
    run = lambda: training(x, gate, up, down, dy)  # noqa: E731
    run_dense = lambda: dense_training(x, gate, up, down_t, dy)  # noqa: E731
    want = list(run_dense())
    want[4] = want[4].T
    names = ("y", "grad_x", "grad_gate", "grad_up", "grad_down")
    errors = {
        name: round(relative_error(a, b), 5) for name, a, b in zip(names, run(), want, strict=True)
    }
    del want
    memory, dense_memory = peak_bytes(run), peak_bytes(run_dense)
    twell_ms, dense_ms = medians_ms([run, run_dense], 15)
    means = sparsity(x, gate)
    path, predicted_dense_ms, predicted_sparse_ms = choice(library, tokens, gate, means, True)
    row = {
        "case": case,
        "hidden": HIDDEN,
        "neurons": NEURONS,
        "tokens": tokens,
        **means,
        "dense_ms": round(dense_ms, 4),
        "twell_ms": round(twell_ms, 4),
        "ratio": round(dense_ms / twell_ms, 3),
        "auto_path": path,
        "auto_ratio": 1 if path == "dense" else round(dense_ms / twell_ms, 3),
        "predicted_dense_ms": round(predicted_dense_ms, 4),
        "predicted_sparse_ms": round(predicted_sparse_ms, 4),
        "dense_peak_mb": round(dense_memory / 1e6, 1),
        "twell_peak_mb": round(memory / 1e6, 1),
        "memory_ratio": round(memory / dense_memory, 3),
        "errors": errors,
        "stages": stage_ms(run),
    }
    print(row, flush=True)
    return row


def main():
    arguments = make_parser(__doc__).parse_args()
    library = load_library(arguments.library)
    torch.manual_seed(0)
    up, down = random_weights()
    rows = []
    for layer in (1, 2, 4, 5, 7):
        x, gate = fit(trace_pattern(arguments.traces, layer))
        rows.append(measure(library, f"layer {layer}", x, gate, up, down))
    x, gate = fit(uniform_pattern(29))
    rows.append(measure(library, "29 uniform", x, gate, up, down))
    for share in SHARES:
        x, gate = independent(share)
        rows.append(measure(library, f"{share:.0%} active", x, gate, up, down))
    write_report(arguments, rows)


if __name__ == "__main__":
    main()
