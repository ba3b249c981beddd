"""Draws the report of a demo run.

usage: report.py FOLDER

FOLDER is what ``make demo`` fills: model/metrics.jsonl, results.json or summary.json, speed.json,
eval.json, sample.json, settings.json and traces/. Writes FOLDER/report.html: one file, nothing
fetched, readable in light and dark. Needs matplotlib.
"""

import argparse
import html
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator

from drawing import STAND_INS, css_variables, label, layer_colours, legend, new_figure, to_svg

STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .2rem }
p { margin: .2rem 0 1rem; color: var(--soft); max-width: 46rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1.6rem 0 }
.card { background: var(--card); border-radius: 10px; padding: .9rem 1rem }
.card b { display: block; font-size: 1.65rem; line-height: 1.2; font-weight: 650;
  font-variant-numeric: tabular-nums; letter-spacing: -.02em }
.card span { color: var(--soft); font-size: .86rem; line-height: 1.35; display: block;
  margin-top: .25rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr));
  gap: 0 1.6rem }
svg { width: 100%; height: auto; display: block }
pre { background: var(--card); border-radius: 10px; padding: 1rem 1.2rem; overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: .6rem 0 }
pre i { font-style: normal; color: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { text-align: right; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft); font-size: .88rem }
th:first-child, td:first-child { text-align: left }
"""


def draw_loss(metrics: list[dict], result: dict) -> str:
    figure, axes = new_figure()
    minutes = [line["seconds"] / 60 for line in metrics]
    axes.plot(
        minutes,
        [line["loss"] for line in metrics],
        color=STAND_INS["twell"],
        lw=1.8,
        label="training",
    )
    held = [line for line in metrics if "heldout_loss" in line]
    if held:
        seconds, losses = ([line[key] for line in held] for key in ("seconds", "heldout_loss"))
        held_minutes = [s / 60 for s in seconds]
        axes.plot(
            held_minutes,
            losses,
            color=STAND_INS["warm"],
            lw=0,
            marker="o",
            ms=4.5,
            label="held out",
        )
    axes.axhline(
        result["unigram_loss"],
        color=STAND_INS["dense"],
        lw=1.2,
        ls=(0, (4, 3)),
        label="token frequency alone",
    )
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    label(axes, "minutes", "loss, nats per token")
    legend(axes, loc="lower left")
    return to_svg(figure, "Loss over time")


def draw_active(metrics: list[dict], neurons: int) -> str:
    figure, axes = new_figure()
    minutes = [line["seconds"] / 60 for line in metrics]
    layers = len(metrics[0]["active_per_layer"])
    for layer, colour in enumerate(layer_colours(layers)):
        share = [100 * line["active_per_layer"][layer] / neurons for line in metrics]
        axes.plot(minutes, share, color=colour, lw=1.5, label=f"layer {layer}")
    mean = [100 * line["active"] / neurons for line in metrics]
    axes.plot(minutes, mean, color=STAND_INS["ink"], lw=2.2, label="mean")
    axes.margins(x=0)
    axes.set_yscale("log")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(mean) / 4 <= t]
    axes.set_yticks(ticks, [f"{t:g}%" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    label(axes, "minutes", "neurons active per token")
    legend(axes, loc="lower left", ncols=2)
    return to_svg(figure, "Active neurons over time, per layer")


def active_counts(traces: Path) -> list[np.ndarray]:
    """Per layer, the number of active neurons of every token."""
    layers = json.loads((traces / "meta.json").read_text())["layers"]
    rows = [np.fromfile(traces / f"layer{line['layer']}.rowptr.u32", "<u4") for line in layers]
    return [np.diff(row.astype(np.int64)) for row in rows]


def draw_histogram(counts: list[np.ndarray]) -> str:
    figure, axes = new_figure()
    top = max(1, int(np.percentile(np.concatenate(counts), 99.5)))
    edges = np.unique(np.linspace(0, top + 1, 41).astype(int))
    colours = layer_colours(len(counts))
    for layer, count in enumerate(counts):
        tokens, _ = np.histogram(np.minimum(count, top), edges)
        axes.stairs(
            100 * tokens / len(count), edges, color=colours[layer], lw=1.6, label=f"layer {layer}"
        )
    axes.set_xlim(0, top + 1)
    axes.set_ylim(bottom=0)
    label(axes, "active neurons of a token", "% of tokens")
    legend(axes, loc="upper right")
    return to_svg(figure, "Histogram of active neurons per token")


def draw_speed(speed: dict) -> str:
    figure, axes = new_figure()
    jobs = list(speed)
    for place, job in enumerate(jobs):
        for offset, ffn, name in ((0.19, "dense", "dense"), (-0.19, "twell", "TwELL")):
            ratio = speed[job][ffn] / speed[job]["dense"]
            axes.barh(
                -place + offset,
                ratio,
                height=0.34,
                color=STAND_INS[ffn],
                label=name if place == 0 else None,
            )
            text = f"{speed[job][ffn]:,.0f} tokens/s" + (
                "" if ffn == "dense" else f"  {ratio:.2f}×"
            )
            axes.text(
                ratio + 0.02,
                -place + offset,
                text,
                va="center",
                color=STAND_INS["ink"],
                fontsize=9.5,
            )
    axes.set_yticks([-i for i in range(len(jobs))], jobs)
    axes.tick_params(axis="y", labelcolor=STAND_INS["ink"])
    axes.grid(visible=False)
    widest = max(rates["twell"] / rates["dense"] for rates in speed.values())
    axes.set_xlim(0, 1.45 * max(1, widest))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    label(axes, y="whole model, relative to dense")
    legend(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return to_svg(figure, "Speed, dense and TwELL")


def card(value: str, text: str) -> str:
    return f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>'


def layer_table(inspect: dict) -> str:
    rows = [
        f"<tr><td>{layer['layer']}</td><td>{layer['active_mean']:.1f}</td>"
        f"<td>{100 * layer['active_mean'] / layer['neurons']:.2f}%</td>"
        f"<td>{layer['active_p99']}</td><td>{layer['active_max']}</td><td>{layer['silent']}</td>"
        f"<td>{layer['union_mean']['128']:.0f}</td></tr>"
        for layer in inspect["layers"]
    ]
    head = ("layer", "active, mean", "share", "p99", "max", "never active", "union of 128 tokens")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(rows)}</table>"


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        sys.exit(f"twell: {path}: {error.strerror}; is this the folder of a demo run?")
    except ValueError as error:
        sys.exit(f"twell: {path}: not JSON: {error}")


def draw(folder: Path) -> str:
    """The page as one string."""
    finished = folder / "summary.json"
    result = read_json(finished if finished.exists() else folder / "results.json")
    speed, sample = read_json(folder / "speed.json"), read_json(folder / "sample.json")
    neurons = read_json(folder / "model/config.json")["intermediate_size"]
    parameters = read_json(folder / "model/summary.json")["parameters"]
    inspect = read_json(folder / "traces/inspect.json")
    metrics = [
        json.loads(line) for line in (folder / "model/metrics.jsonl").read_text().splitlines()
    ]
    if not metrics:
        sys.exit(f"twell: {folder}/model/metrics.jsonl is empty; there is nothing to draw")

    cards = [
        card(f"{100 * result['active_share']:.1f}%", f"of {neurons:,} neurons active per token"),
        card(
            f"{result['twell_perplexity']:.2f}",
            f"held-out perplexity with TwELL; dense: {result['dense_perplexity']:.2f}",
        ),
        card(
            f"{result['heldout_loss']:.2f}",
            f"{result['loss_unit']} held out; token frequency alone: {result['unigram_loss']:.2f}",
        ),
        card(f"{result['prefill_ratio']:.2f}×", "prefill speed, whole model, TwELL over dense"),
        card(f"{result['decode_ratio']:.2f}×", "decode speed, whole model, TwELL over dense"),
        card(
            f"{result['train_seconds'] / 60:.1f} min", f"to train {parameters / 1e6:.1f} M weights"
        ),
    ]
    sample_text = f"<i>{html.escape(sample['prompt'])}</i>{html.escape(sample['text'])}"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>twell demo</title>
<style>{css_variables()}{STYLE}</style>
<h1>A sparse language model, trained here</h1>
<p>A small Llama with ReLU-gated feed-forward blocks learns the C++ headers of this machine. An L1
term, steered while it trains, silences most of its neurons; TwELL then computes only the rest.</p>
<div class="cards">{"".join(cards)}</div>
<div class="pair">
<section><h2>Loss</h2>{draw_loss(metrics, result)}</section>
<section><h2>Active neurons</h2>{draw_active(metrics, neurons)}</section>
<section><h2>How many neurons a token needs</h2>{draw_histogram(active_counts(folder / "traces"))}
</section>
<section><h2>Speed</h2>{draw_speed(speed)}</section>
</div>
<h2>Layers</h2>
<p>On held-out text. The union is of the neurons that any of 128 consecutive tokens activates: the
work that the tokens of a tile share.</p>
{layer_table(inspect)}
<h2>A sample</h2>
<pre>{sample_text}</pre>
</html>
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    page = draw(folder)
    temporary = folder / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(folder / "report.html")


if __name__ == "__main__":
    main()
