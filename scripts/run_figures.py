"""What docs/training.md shows of bench/results/h200/train_run.json; see bench/train_run.py."""

from matplotlib.ticker import NullLocator

from drawing import STAND_INS, label, layer_colours, legend, new_figure, standalone

NAMES = {"dense": "dense", "sparse": "sparse, twell"}
COLOURS = {"dense": STAND_INS["dense"], "sparse": STAND_INS["twell"]}


def minutes(run: dict) -> list[float]:
    return [seconds / 60 for seconds in run["curves"]["step_seconds"]]


def draw_loss(report: dict) -> str:
    figure, axes = new_figure()
    for leg, colour in COLOURS.items():
        run = report[leg]
        axes.plot(minutes(run), run["curves"]["loss"], color=colour, lw=1.2, alpha=0.45)
        held_out = run["heldout"]
        axes.plot(
            [seconds / 60 for seconds in held_out["step_seconds"]],
            held_out["heldout_loss"],
            color=colour,
            lw=1.8,
            marker="o",
            ms=3.5,
            label=f"{NAMES[leg]}, held out",
        )
    last = min(run["heldout"]["heldout_loss"][-1] for run in (report["dense"], report["sparse"]))
    axes.set_ylim(0.85 * last, 2.2 * last)
    axes.margins(x=0)
    label(axes, "minutes of training", "loss, nats per token")
    legend(axes, loc="upper right")
    return standalone(figure, TEXTS["run-loss"])


def draw_active(report: dict) -> str:
    figure, axes = new_figure()
    run = report["sparse"]
    layers = list(zip(*run["curves"]["active_per_layer"], strict=True))
    for layer, colour in enumerate(layer_colours(len(layers))):
        axes.plot(minutes(run), layers[layer], color=colour, lw=1.4, label=f"layer {layer}")
    axes.margins(x=0)
    axes.set_yscale("log")
    least = min(map(min, layers))
    ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000, 3000) if tick >= least / 3]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    label(axes, "minutes of training", "active neurons per token, sparse run")
    legend(axes, loc="upper right", ncols=2)
    return standalone(figure, TEXTS["run-active"])


def draw_legs(report: dict, values, words: str, picture: str) -> str:
    """values(curves) over time, a line for each leg."""
    figure, axes = new_figure()
    for leg, colour in COLOURS.items():
        run = report[leg]
        axes.plot(minutes(run), values(run["curves"]), color=colour, lw=1.8, label=NAMES[leg])
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    label(axes, "minutes of training", words)
    legend(axes, loc="lower right")
    return standalone(figure, TEXTS[picture])


def draw_silent(report: dict) -> str:
    neurons = report["settings"]["layers"] * report["settings"]["neurons"]
    return draw_legs(
        report,
        lambda curves: [100 * sum(layers) / neurons for layers in curves["silent_per_layer"]],
        "% of neurons that did not fire",
        "run-silent",
    )


def draw_speed(report: dict) -> str:
    return draw_legs(
        report,
        lambda curves: [rate / 1000 for rate in curves["tokens_per_second"]],
        "thousand tokens per second",
        "run-speed",
    )


PICTURES = {
    "run-loss": draw_loss,
    "run-active": draw_active,
    "run-silent": draw_silent,
    "run-speed": draw_speed,
}
TEXTS = {
    "run-loss": "Loss over wall time, dense and sparse",
    "run-active": "Active neurons per layer over time",
    "run-silent": "Neurons that no token fires over time, dense and sparse",
    "run-speed": "Training speed over time, dense and sparse",
}


def section(report: dict, file: str) -> str:
    """The section as Markdown; `file` is the result's path from the root."""
    machine, settings, both = report["machine"], report["settings"], report["comparison"]
    dense, sparse = report["dense"], report["sparse"]
    summary = sparse["summary"]
    reached = both["seconds_to_within_2_percent"]
    when = "not reached" if reached is None else f"after {reached / 60:.1f} minutes"

    def row(name, value):
        return f"| {name} | {value(dense)} | {value(sparse)} |"

    def speed(run, part):  # the mean over the first or last tenth of the lines
        rates = run["curves"]["tokens_per_second"]
        count = max(1, len(rates) // 10)
        rates = rates[1 : count + 1] if part == "first" else rates[-count:]
        return f"{sum(rates) / len(rates):,.0f}"

    table = [
        "| | dense, no L1 | sparse, twell |",
        "| --- | ---: | ---: |",
        row("held-out loss, nats per token", lambda r: f"{r['summary']['heldout_loss']:.4f}"),
        row("minutes in steps", lambda r: f"{r['curves']['step_seconds'][-1] / 60:.2f}"),
        row("tokens/s, first tenth", lambda r: speed(r, "first")),
        row("tokens/s, last tenth", lambda r: speed(r, "last")),
        row("active neurons per token, held out", lambda r: f"{r['summary']['active']:.1f}"),
        row(
            "never active on held-out text, of all",
            lambda r: (
                f"{sum(r['summary']['silent_per_layer']):,} of"
                f" {settings['layers'] * settings['neurons']:,}"
            ),
        ),
    ]
    return "\n\n".join(
        [
            "## A real run",
            f"{summary['parameters'] / 1e6:.0f} M parameters ({settings['layers']} layers,"
            f" {settings['hidden']} wide, {settings['neurons']} neurons), {summary['steps']:,}"
            f" steps, {summary['tokens'] / 1e6:.0f} M tokens of Python sources"
            f" ({settings['data']['bytes'] / 1e6:.0f} MB of text), each run on one"
            f" {machine['gpu']}: once dense without an L1 term, once with `--ffn auto` and steered"
            f" to {settings['sparse']['target-active']} active neurons; the same tokens in the same"
            f" order. The sparse run's loss is {100 * (both['loss_ratio'] - 1):+.1f}% of the dense"
            f" one's, in {both['time_ratio']:.2f} of its time; within 2% of the dense run's last"
            f" held-out loss: {when}.",
            "\n".join(table),
            "\n".join(f"![{text}](pictures/{name}.svg)" for name, text in TEXTS.items()),
            "A neuron counts as silent that did not fire since the line before, ten steps at most."
            " Time is that of steps: no evaluation, no checkpoint. Both runs are a little slower"
            " than `twell bench model`, as attention's backward is the deterministic one, and count"
            f" active neurons in every step. PyTorch {machine['torch']},"
            f" driver {machine['driver']}, commit {machine['commit']}. Data: [{file}](../{file});"
            " `bench/train_run.py` takes it.",
        ]
    )
