"""Figures whose colours follow the reader's light or dark mode."""

import html
import io

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

# Roles, not colours: each is a CSS variable with a light and a dark value. Matplotlib is given
# stand-ins, which the drawn SVG has replaced by the variables.
ROLES = {
    "ink": ("#1c2024", "#e6e8eb"),
    "soft": ("#69707a", "#9aa2ad"),
    "line": ("#e1e4e8", "#31373f"),
    "paper": ("#ffffff", "#14171b"),
    "card": ("#f6f7f9", "#1b2026"),
    "dense": ("#8a929c", "#7d8590"),
    "twell": ("#0b7285", "#3bc9db"),
    "warm": ("#d9480f", "#ff922b"),
}
STAND_INS = {role: f"#0000{index:02x}" for index, role in enumerate(ROLES, 0xE0)}


def css_variables() -> str:
    """The roles as CSS: light, and dark where the reader prefers it."""
    light, dark = (
        " ".join(f"--{role}: {colours[i]};" for role, colours in ROLES.items()) for i in (0, 1)
    )
    return f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def layer_colours(count: int):
    """From dark teal to yellow: readable on white and on black."""
    return [colormaps["viridis"](0.32 + 0.48 * i / max(1, count - 1)) for i in range(count)]


def new_figure(width=6.2, height=3.3):
    with rc_context({"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
        axes = figure.add_subplot()
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STAND_INS["line"])
    axes.grid(axis="y", color=STAND_INS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=STAND_INS["soft"], length=0, pad=6)
    return figure, axes


def label(axes, x=None, y=None):
    if x:
        axes.set_xlabel(x, color=STAND_INS["soft"])
    if y:
        axes.set_title(y, loc="left", color=STAND_INS["soft"], fontsize=10)


def legend(axes, **options):
    axes.legend(frameon=False, labelcolor=STAND_INS["ink"], fontsize=9, **options)


def to_svg(figure, name: str) -> str:
    """The figure as inline SVG whose colours are the page's; text stays text."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for role, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{role})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ', 1)


def standalone(figure, name: str) -> str:
    """The figure as an SVG file. An image has no page around it: it brings colours and ground."""
    svg = to_svg(figure, name)
    end = svg.index(">") + 1
    ground = '<rect width="100%" height="100%" rx="8" fill="var(--paper)"/>'
    return f"{svg[:end]}<style>{css_variables()}</style>{ground}{svg[end:]}"
