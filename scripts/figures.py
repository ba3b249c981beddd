"""Redraws what the docs show of the result files under bench/results/: run it after a benchmark.

usage: figures.py [--check]

Writes README.md's table and docs/training.md's run (between their `figures` marks),
docs/benchmarks.md and docs/pictures/*.svg.
With --check it writes nothing and fails if any of them is not what it would write.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import run_figures
from drawing import STAND_INS, label, new_figure, standalone

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

# The rows of the first page; all others are in docs/benchmarks.md.
HEADLINE = [
    ("layer4", 512, "gated"),
    ("layer5", 512, "gated"),
    ("layer7", 512, "gated"),
    ("layer5", 1, "gated"),
    ("random50%", 512, "gated"),
]

GPU_HEADLINE = [
    ("layer 1", 131072),
    ("layer 4", 131072),
    ("layer 5", 131072),
    ("layer 7", 131072),
    ("layer 5, graph", 1),
    ("50% active", 131072),
]

# The picture of a GPU: every pattern with many tokens, then few tokens.
GPU_PICTURE = [
    *((f"layer {layer}", 131072) for layer in (1, 2, 4, 5, 7)),
    ("29 uniform", 131072),
    ("50% active", 131072),
    *(("layer 5, graph", tokens) for tokens in (1, 4, 16, 32, 64)),
    ("50% active, graph", 1),
]

GPU_TRAINING_HEADLINE = ["layer 1", "layer 4", "layer 5", "layer 7"]


def load(path: Path) -> dict:
    report = json.loads(path.read_text())
    return {"path": path, **report}


def reports() -> list[dict]:
    """All result files, the CPU with the widest instructions first."""
    cpu = sorted((RESULTS / "cpu").glob("ffn*.json"), key=lambda path: path.name != "ffn.json")
    return [load(path) for path in cpu]


def gpu_reports() -> list[dict]:
    return [load(path) for path in sorted(RESULTS.glob("*/ffn_forward.json"))]


def gpu_training_reports() -> list[dict]:
    return [load(path) for path in sorted(RESULTS.glob("*/ffn_backward.json"))]


def model_reports() -> list[dict]:
    return [load(path) for path in sorted(RESULTS.glob("*/model.json"))]


def training_runs() -> list[dict]:
    runs = [load(path) for path in sorted(RESULTS.glob("*/train_run.json"))]
    return [run for run in runs if run["complete"]]


def pattern(row: dict) -> str:
    name = row["case"]
    if name.startswith("layer"):
        return f"trace, layer {name.removeprefix('layer')}"
    return f"random, {name.removeprefix('random')} active"


def job(row: dict) -> str:
    tokens = row["tokens"]
    return "decode, 1 token" if tokens == 1 else f"{tokens} tokens"


def forced(row: dict) -> str:
    return "" if row["path"] == "twell" else " (auto: dense)"


def table(rows: list[dict]) -> str:
    lines = [
        "| activation pattern | active of N | tokens | PyTorch dense | twell | speed-up |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        kind = "" if row["ffn_kind"] == "gated" else f", {row['ffn_kind']} FFN"
        share = 100 * row["active_mean"] / row["neurons"]
        lines.append(
            f"| {pattern(row)}{kind}{forced(row)} | {share:.2f}% |"
            f" {job(row)} | {row['dense_ms']:.2f} ms | {row['twell_ms']:.2f} ms |"
            f" **{row['ratio']:.2f}×** |"
        )
    return "\n".join(lines)


def machine_line(report: dict) -> str:
    machine, first = report["machine"], report["results"][0]
    file = report["path"].relative_to(ROOT)
    return (
        f"One FFN, K={first['hidden']}, N={first['neurons']}, bf16, {machine['threads']} threads of"
        f" an {machine['cpu']} ({machine['isa'].replace('_', '-')}), PyTorch {machine['torch']},"
        f" {machine['date'][:10]}, commit {machine['commit']}; medians, same process, weights from"
        f" memory. Data: [{file}]({file})."
    )


def gpu_pattern(row: dict) -> str:
    return row["case"].replace("layer", "trace, layer").replace(", graph", ", CUDA graph")


def milliseconds(name: str):
    return lambda row: f"{row[name]:.3f} ms"


def times(name: str):
    return lambda row: f"**{row[name]:.2f}×**"


# Title and cell of each column.
Columns = list[tuple[str, Callable[[dict], str]]]
GPU_COLUMNS: Columns = [
    ("activation pattern", gpu_pattern),
    ("tokens", lambda row: f"{row['tokens']:,}"),
    ("PyTorch dense", milliseconds("dense_ms")),
    ("twell", milliseconds("twell_ms")),
    ("speed-up", times("ratio")),
]
GPU_MORE_COLUMNS: Columns = [
    ("strongest dense", milliseconds("dense_strongest_ms")),
    ("speed-up over it", times("ratio_strongest")),
    ("auto", lambda row: f"{row['auto_path']}, {row['auto_ratio']:.2f}×"),
]
GATE_COLUMNS: Columns = [
    *GPU_COLUMNS[:2],
    ("cuBLAS", milliseconds("cublas_ms")),
    ("gate", milliseconds("gate_ms")),
    ("cuBLAS / gate", times("ratio")),
    ("gate_pack", milliseconds("gate_pack_ms")),
]


def gpu_table(rows: list[dict], columns: Columns) -> str:
    """The first column is words, all others numbers."""
    lines = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
    ]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def gpu_section(report: dict) -> str:
    """Every case, its picture, and the gate."""
    return (
        f"\n## {report['device']}\n\n{gpu_line(report).replace('](bench/', '](../bench/')}\n\n"
        f"![Speed-up of one feed-forward block](pictures/{gpu_picture(report)})\n\n"
        "The strongest dense form is the fastest of PyTorch's two projections and its"
        " concatenated one, each as it is and compiled. auto is what the planner chooses by"
        " itself, told the pattern's means, and its speed-up over PyTorch dense. Where it says CUDA"
        " graph, every form is replayed from one, so that no time contains the host's launches; up"
        " to 64 tokens a graph has eight layers, and the times are a layer's.\n\n"
        f"{gpu_table(report['results'], GPU_COLUMNS + GPU_MORE_COLUMNS)}\n"
        f"\n## {report['device']}, the gate\n\nThe gate's kernel in that forward, and"
        " gate_pack, which writes its words too, against cuBLAS's product of the same shape;"
        " medians, by the profiler, in turns, L2 flushed.\n\n"
        f"{gpu_table(report['gate'], GATE_COLUMNS)}\n"
    )


def gpu_picture(report: dict) -> str:
    return f"ffn-{report['path'].parent.name}.svg"


def gpu_line(report: dict) -> str:
    file = report["path"].relative_to(ROOT)
    return (
        f"The same FFN's forward on an {report['device']}, PyTorch {report['torch']}, commit"
        f" {report['commit']}; medians, same process, L2 flushed. Data: [{file}]({file})."
    )


def gpu_training_table(rows: list[dict]) -> str:
    lines = [
        "| activation pattern | tokens | PyTorch dense | twell | speed-up | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['case'].replace('layer', 'trace, layer')} | {row['tokens']:,} |"
            f" {row['dense_ms']:.2f} ms | {row['twell_ms']:.2f} ms | **{row['ratio']:.2f}×** |"
            f" {row['dense_peak_mb']:.0f} → {row['twell_peak_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def gpu_training_line(report: dict) -> str:
    file = report["path"].relative_to(ROOT)
    return (
        f"Its forward and backward together against PyTorch's autograd, on an {report['device']},"
        f" commit {report['commit']}; peak memory beyond inputs and gradients. Data:"
        f" [{file}]({file})."
    )


JOBS = {"forward": "forward", "eval": "forward and loss", "train": "training step"}


def model_job(row: dict) -> str:
    again = ", checkpointing" if row["checkpoint_activations"] else ""
    return f"{JOBS[row['mode']]}, {row['batch']}×{row['tokens']}{again}"


def model_table(rows: list[dict], forms: tuple[str, ...] = ("twell", "auto")) -> str:
    """A line for each row and each of the forms that it compares with the dense one."""

    def per_token(row, form):
        energy = row["energy_mj_per_token"][form]
        return "–" if energy is None else f"{energy:.3f}"

    lines = [
        "| layers | job | activity | dense | twell | speed-up | peak memory | mJ per token |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, form in ((row, form) for row in rows for form in forms if f"{form}_ms" in row):
        active = sum(row["active_per_layer"]) / len(row["active_per_layer"])
        peak = [row["peak_bytes"][name] / 1e9 for name in ("dense", form)]
        ratio = row["dense_ms"] / row[f"{form}_ms"]
        note = ", auto" if form == "auto" else ""
        lines.append(
            f"| {row['layers']} | {model_job(row)}{note} | {row['source']}, {active:.0f} active |"
            f" {row['dense_ms']:.1f} ms | {row[f'{form}_ms']:.1f} ms | **{ratio:.2f}×** |"
            f" {peak[0]:.1f} → {peak[1]:.1f} GB |"
            f" {per_token(row, 'dense')} → {per_token(row, form)} |"
        )
    return "\n".join(lines)


def is_headline(row: dict) -> bool:
    return row["mode"] != "eval" and (row["source"] == "checkpoint" or row["layers"] > 28)


KERNELS = {  # the first that a kernel's name matches
    "feed-forward, twell": "twell::",
    "attention": "cudnn|flash|fmha",
    "rotary embedding": "64x32_64x16|64x64_64x13",
    "other products": "nvjet|gemm",
    "optimizer": "FusedOptimizer|LpNorm|lpnorm",
    "norms": "layer_norm|GammaBeta",
    "softmax and its gradient": "SoftMax|exp_kernel",
    "sums, conversions, elementwise": "",
}


def kernel_sums(row: dict, form: str) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel."""
    sums = dict.fromkeys(KERNELS, 0.0)
    for kernel in row["kernels"][form]:
        kind = next(kind for kind, name in KERNELS.items() if re.search(name, kernel["name"]))
        sums[kind] += kernel["ms"]
    return sums


def is_trained(row: dict) -> bool:
    return row["source"].startswith("checkpoint")


def kernels_table(rows: list[dict]) -> str:
    columns = []
    for row in rows:
        title = model_job(row) + (", trained model" if is_trained(row) else "")
        for form in ("dense", "twell"):
            columns.append((f"{title}, {form}", kernel_sums(row, form)))
    lines = [
        "| ms | " + " | ".join(title for title, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for kind in KERNELS:
        lines.append(f"| {kind} | " + " | ".join(f"{sums[kind]:.1f}" for _, sums in columns) + " |")
    return "\n".join(lines)


def beyond_the_blocks(row: dict) -> str:
    """What bounds the speed-up of a training step: all that is not feed-forward."""
    sums = kernel_sums(row, "twell")
    total, dense = sum(sums.values()), sum(kernel_sums(row, "dense").values())
    rest = total - sums["feed-forward, twell"]
    # Multiply-adds of a token outside the blocks: queries and outputs, keys and values, logits.
    groups = row["kv_heads"] / row["heads"]
    projections = row["layers"] * 2 * (1 + groups) * row["hidden"] ** 2
    products = projections + row["vocabulary"] * row["hidden"]
    flops = 6 * products * row["batch"] * row["tokens"]  # forward and twice as many back
    adamw = sum(
        kernel["ms"] for kernel in row["kernels"]["twell"] if "FusedOptimizer" in kernel["name"]
    )
    # A weight, its gradient and two moments are read, three of them are written, all float32.
    bandwidth = 28 * row["parameters"] / adamw
    passes = rest - sums["other products"] - sums["attention"]
    return (
        f"Why a training step gains {row['ratio']:.2f}× and not 1.5×: all but the blocks takes"
        f" {rest:.0f} of the {total:.0f} ms, so that even blocks that cost nothing would give"
        f" {dense / rest:.2f}×. Of the {rest:.0f} ms, the other products take"
        f" {sums['other products']:.0f}, at {flops / sums['other products'] / 1e9:.0f} TFLOP/s, and"
        f" attention {sums['attention']:.0f}, in cuDNN's flash kernels. The last {passes:.0f} are"
        f" bound by memory, among them {adamw:.0f} of AdamW (28 bytes per parameter, at"
        f" {bandwidth / 1e9:.1f} TB/s) and {sums['softmax and its gradient']:.0f} of the softmax"
        f" over {row['vocabulary']:,} words and its gradient. The dense step has them too: if they"
        f" all took no time, the gain would be {(dense - passes) / (total - passes):.2f}×."
    )


def model_line(report: dict) -> str:
    machine, file = report["machine"], report["path"].relative_to(ROOT)
    return (
        f"Whole models, {report['results'][0]['hidden']} wide, on one {machine['gpu']} (driver"
        f" {machine['driver']}), PyTorch {machine['torch']}, commit {machine['commit']}; medians,"
        f" same process, equal loss in every round. Data: [{file}](../{file})."
    )


def headline_rows(report: dict) -> list[dict]:
    rows = reversed(report["results"])  # of equals, the first counts
    found = {(row["case"], row["tokens"], row["ffn_kind"]): row for row in rows}
    return [found[key] for key in HEADLINE if key in found]


def bar_name(pattern: str, job: str, row: dict) -> str:
    if "active" not in pattern:
        pattern += f" · {100 * row['active_mean'] / row['neurons']:.1f}% active"
    return f"{pattern} · {job}"


def draw_speedup(bars: list[tuple[str, float]], title: str) -> str:
    """A bar for each name and ratio to PyTorch's dense block."""
    figure, axes = new_figure(7.6, 0.55 * len(bars) + 0.75)
    for place, (_, ratio) in enumerate(bars):
        axes.barh(-place, ratio, height=0.62, color=STAND_INS["twell"])
        axes.text(
            max(1, ratio) + 0.05,  # clear of the bar and of the dashed line
            -place,
            f"{ratio:.2f}×",
            va="center",
            color=STAND_INS["ink"],
            fontsize=10.5,
            fontweight="bold",
        )
    axes.axvline(1, color=STAND_INS["dense"], lw=1.4, ls=(0, (4, 3)))
    axes.set_yticks([-place for place in range(len(bars))], [name for name, _ in bars])
    axes.tick_params(axis="y", labelcolor=STAND_INS["ink"])
    axes.grid(visible=False)
    axes.set_xlim(0, 1.12 * max(1, *(ratio for _, ratio in bars)))
    axes.set_xticks([1], ["PyTorch's dense FFN"])
    axes.spines["bottom"].set_visible(False)
    label(axes, y="speed-up of one feed-forward block")
    return standalone(figure, title)


def draw_cpu(report: dict) -> str:
    bars = [(bar_name(pattern(row), job(row), row), row["ratio"]) for row in headline_rows(report)]
    return draw_speedup(bars, "Speed-up of one feed-forward block over PyTorch's dense one")


def draw_gpu(report: dict) -> str:
    rows = {(row["case"], row["tokens"]): row for row in report["results"]}
    bars = []
    for row in (rows[key] for key in GPU_PICTURE if key in rows):
        name = gpu_pattern(row).removesuffix(", CUDA graph")
        tokens = "1 token" if row["tokens"] == 1 else f"{row['tokens']:,} tokens"
        bars.append((bar_name(name, tokens, row), row["ratio"]))
    return draw_speedup(
        bars,
        f"Speed-up of one feed-forward block over PyTorch's dense one on an {report['device']}",
    )


def readme_block(all_reports: list[dict]) -> str:
    if not all_reports:
        return f"{BEGIN}\nNo figures have been taken yet: run `make bench`.\n{END}"
    report = all_reports[0]
    parts = [
        "![Speed-up of one feed-forward block](docs/pictures/ffn-cpu.svg)",
        table(headline_rows(report)),
        machine_line(report),
    ]
    for gpu in gpu_reports():
        rows = [row for row in gpu["results"] if (row["case"], row["tokens"]) in GPU_HEADLINE]
        parts += [gpu_table(rows, GPU_COLUMNS), gpu_line(gpu)]
    for gpu in gpu_training_reports():
        rows = [row for row in gpu["results"] if row["case"] in GPU_TRAINING_HEADLINE]
        parts += [gpu_training_table(rows), gpu_training_line(gpu)]
    for report in model_reports():
        rows = [row for row in report["results"] if is_headline(row)]
        parts += [model_table(rows, ("twell",)), model_line(report).replace("](../", "](")]
    parts.append("[All cases](docs/benchmarks.md), the slower ones too.")
    return f"{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}"


def benchmarks_page(all_reports: list[dict]) -> str:
    parts = [
        "# Benchmarks\n\nGenerated by scripts/figures.py from the files under bench/results/; how"
        " they are measured is in [DEVELOPING.md](../DEVELOPING.md#benchmarks).\n"
    ]
    for report in all_reports:
        machine = report["machine"]
        line = machine_line(report).replace("](bench/", "](../bench/")
        parts.append(
            f"\n## CPU, {machine['isa'].replace('_', '-')}\n\n{line}\n\n"
            f"{table(report['results'])}\n"
        )
    for gpu in gpu_reports():
        parts.append(gpu_section(gpu))
    for gpu in gpu_training_reports():
        line = gpu_training_line(gpu).replace("](bench/", "](../bench/")
        parts.append(
            f"\n## {gpu['device']}, training\n\n{line}\n\n{gpu_training_table(gpu['results'])}\n"
        )
    for report in model_reports():
        parts.append(
            f"\n## Whole models, {report['machine']['gpu']}\n\n{model_line(report)}\n\n"
            f"{model_table(report['results'])}\n"
        )
    for path in sorted(RESULTS.glob("*/model_kernels.json")):
        report = load(path)
        file = report["path"].relative_to(ROOT)
        parts.append(
            f"\n## Kernels of a model's step\n\n{report['results'][0]['layers']} layers with the"
            f" traces' patterns, commit {report['machine']['commit']}, by `twell bench model"
            f" --kernels`. A dense block's kernels are among the other products and the elementwise"
            f" ones. Data: [{file}](../{file}).\n\n{kernels_table(report['results'])}\n"
        )
        for row in report["results"]:
            if row["mode"] == "train" and not row["checkpoint_activations"] and not is_trained(row):
                parts.append(f"\n{beyond_the_blocks(row)}\n")
    return "".join(parts)


def marked(path: Path, block: str) -> str:
    """The file's text with `block` between its marks."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"twell: {path} lacks the marks {BEGIN} and {END}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return before + block + after


def outputs() -> dict[Path, str]:
    """Every generated file and its text."""
    all_reports, runs = reports(), training_runs()
    readme, training = ROOT / "README.md", ROOT / "docs/training.md"
    sections = [
        run_figures.section(run, str(run["path"].relative_to(ROOT))) + "\n\n" for run in runs[:1]
    ]
    texts = {
        readme: marked(readme, readme_block(all_reports)),
        ROOT / "docs/benchmarks.md": benchmarks_page(all_reports),
        training: marked(training, f"{BEGIN}\n\n{''.join(sections)}{END}"),
    }
    pictures = ROOT / "docs/pictures"
    if all_reports:
        texts[pictures / "ffn-cpu.svg"] = draw_cpu(all_reports[0])
    texts |= {pictures / gpu_picture(gpu): draw_gpu(gpu) for gpu in gpu_reports()}
    for run in runs[:1]:
        texts |= {pictures / f"{name}.svg": d(run) for name, d in run_figures.PICTURES.items()}
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in outputs().items():
        if path.exists() and path.read_text() == text:
            continue
        if check:
            sys.exit(f"twell: {path} is not what scripts/figures.py writes; run it")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
