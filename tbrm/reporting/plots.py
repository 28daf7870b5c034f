"""The plots of a run's report, from the rows of metrics.jsonl and eval.jsonl.

A figure is drawn once. As PNG it has the colours of `LIGHT`; as SVG inside the page its colours are CSS variables of
the same names, so that the page can show it light or dark.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

LIGHT = {
    "ink": "#1f2933",
    "muted": "#66727f",
    "grid": "#e3e7eb",
    # Okabe and Ito's colours, told apart with any kind of colour vision. The first is the run's own.
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "pink": "#cc79a7",
    "sky": "#56b4e9",
    "yellow": "#e69f00",
    "lemon": "#f0e442",
    "grey": "#999999",
}
_SERIES = [LIGHT[name] for name in ("blue", "orange", "green", "pink", "sky", "yellow", "lemon", "grey")]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, and in the page's font
    "svg.hashsalt": "tbrm",  # the same run gives the same bytes
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "ytick.left": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
_MOST_POINTS = 200
"""Of a curve. In a longer run a point stands for several steps: it is their mean, and a band shows their range."""

_PANEL = (3.6, 2.3)
"""Inches of a small plot: about the width of a phone, so that its text is as large there as the page's."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One small plot: the metric `key`, with a band of `spread` (another metric) on both sides if given."""

    key: str
    title: str
    unit: str
    spread: str | None = None
    log: bool = False
    percent: bool = False


PANELS = [
    Panel("reward_mean", "Reward", "mean over trajectories"),
    Panel("loss", "Loss", "mean over trajectories", log=True),
    Panel("residual_mean", "Bellman residual", "mean ± standard deviation", spread="residual_std"),
    Panel("value_mean", "Value of the prompt", "mean V(s₁), nats"),
    Panel("log_ratio_mean", "Log-ratio to the reference", "mean per trajectory, nats"),
    Panel("entropy_mean", "Entropy", "mean per token, nats"),
    Panel("response_length_mean", "Response length", "mean, tokens"),
    Panel("truncated_share", "Truncated responses", "share of trajectories", percent=True),
    Panel("grad_norm", "Gradient norm", "before clipping"),
    Panel("tokens_per_second", "Throughput", "tokens per second"),
    Panel("peak_memory_mib", "Peak memory", "MiB"),
]

HELDOUT_REWARD = Panel("reward_mean", "Reward on held-out prompts", "mean over responses")


def draw_all(metrics: Rows, evals: Rows) -> dict[str, Figure]:
    """Name to figure, in the order of the page: accuracy first, then what the metrics hold. Without rows, no figure."""
    figures = {}
    with matplotlib.rc_context(_STYLE):
        if evals:
            figures["accuracy"] = _accuracy(evals, width=5.4, height=3.1)
        if np.isfinite(series(evals, HELDOUT_REWARD.key)).any():
            figures["heldout_reward"] = _panel(HELDOUT_REWARD, evals)
        for panel in [*PANELS[:1], *_reward_panels(metrics), *PANELS[1:]]:
            if np.isfinite(series(metrics, panel.key)).any():
                figures[panel.key.replace("/", "_")] = _panel(panel, metrics)
        if phases := list(dict.fromkeys(key for row in metrics for key in row if key.startswith("seconds/"))):
            figures["seconds"] = _seconds(metrics, phases)
    return figures


def _reward_panels(metrics: Rows) -> list[Panel]:
    """Of each of several verifiers."""
    keys = sorted({key for row in metrics for key in row if key.startswith("reward/")})
    return [Panel(key, f"Reward of {key.removeprefix('reward/')}", "mean over responses") for key in keys]


def draw_narrow_accuracy(evals: Rows) -> Figure:
    """The page's first plot for a screen as wide as a phone's, where the text of the other one would be too small to read."""
    with matplotlib.rc_context(_STYLE):
        return _accuracy(evals, width=_PANEL[0], height=_PANEL[1])


def series(rows: Rows, key: str) -> np.ndarray:
    """The metric as float64 [rows]; NaN where it is missing, null or text."""
    values = (row.get(key) for row in rows)
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)


def save_png(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, dpi=160, facecolor="white")


def to_svg(figure: Figure) -> str:
    """An <svg> element to put into a page that defines the variables --ink, --muted, and so on."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _axes(title: str, unit: str, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty plot of that size in inches, with its title and unit in the upper left corner."""
    figure = Figure(figsize=(width, height))
    heading = 0.5
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - heading / height), w_pad=0.08, h_pad=0.06)
    left = 0.1 / width
    figure.text(left, 1 - 0.1 / height, title, va="top", fontsize=10, fontweight="bold")
    figure.text(left, 1 - 0.28 / height, unit, va="top", color=LIGHT["muted"])
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure, axes


def _accuracy(evals: Rows, width: float, height: float) -> Figure:
    count = evals[-1].get("n")
    unit = f"share right{f' of {count} prompts' if count else ''}, with 95% interval"
    figure, axes = _axes("Accuracy on held-out prompts", unit, width, height)
    steps, accuracy = series(evals, "step"), series(evals, "accuracy")
    low, high = series(evals, "ci_low"), series(evals, "ci_high")
    axes.fill_between(steps, low, high, color=LIGHT["blue"], alpha=0.18, linewidth=0)
    axes.plot(steps, accuracy, color=LIGHT["blue"], linewidth=2.2, marker="o", markersize=5, clip_on=False)
    top = np.nanmax(np.concatenate([accuracy, high, [0.1]]))
    rising = accuracy[-1] >= accuracy[0]
    for index in sorted({0, len(evals) - 1}):
        above = rising == (index > 0) or accuracy[index] < 0.15 * top  # off the curve, and off the axis
        axes.annotate(f"{accuracy[index]:.1%}", (steps[index], accuracy[index]),
                      xytext=(0, 9 if above else -9), textcoords="offset points",
                      ha="left" if index == 0 else "right", va="bottom" if above else "top",
                      fontsize=12, fontweight="bold", color=LIGHT["blue"])  # fmt: skip
    axes.set_ylim(0, min(1.0, 1.15 * top) if top < 0.97 else 1.08)
    axes.margins(x=0.08)
    axes.set_xlabel("training step")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    return figure


def _panel(panel: Panel, metrics: Rows) -> Figure:
    values = _points(series(metrics, panel.key))
    steps, mean = _points(series(metrics, "step")).mean(axis=1), values.mean(axis=1)
    log = panel.log and values.min() > 0
    figure, axes = _axes(panel.title, f"{panel.unit}, log scale" if log else panel.unit, *_PANEL)
    low, high = values.min(axis=1), values.max(axis=1)
    if panel.spread is not None:
        spread = _points(series(metrics, panel.spread)).mean(axis=1)
        low, high = mean - spread, mean + spread
    axes.fill_between(steps, low, high, color=LIGHT["blue"], alpha=0.18, linewidth=0)
    axes.plot(steps, mean, color=LIGHT["blue"], marker="o", markersize=2.5 if len(steps) < 50 else 0)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_ylim(bottom=0)
    _label_steps(axes, values)
    return figure


def _seconds(metrics: Rows, phases: list[str]) -> Figure:
    figure, axes = _axes("Seconds per step", "by phase", *_PANEL)
    steps = _points(series(metrics, "step"))
    # A point is a block from half a step before its first step to half a step after its last one.
    edges = np.stack([steps.min(axis=1) - 0.5, steps.max(axis=1) + 0.5], axis=1).ravel()
    blocks = [_points(series(metrics, phase)).mean(axis=1).filled(0.0).repeat(2) for phase in phases]
    axes.stackplot(edges, blocks, labels=[phase.removeprefix("seconds/") for phase in phases], colors=_SERIES)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, handlelength=0.8, columnspacing=1)
    _label_steps(axes, steps)
    return figure


def _points(values: np.ndarray) -> np.ma.MaskedArray:
    """[rows] to [points, steps per point], with NaN, and what the last point lacks, masked out."""
    per_point = -(-len(values) // _MOST_POINTS)
    padded = np.pad(values, (0, -len(values) % per_point), constant_values=np.nan)
    return np.ma.masked_invalid(padded.reshape(-1, per_point))


def _label_steps(axes: Axes, points: np.ma.MaskedArray) -> None:
    per_point = points.shape[1]
    axes.set_xlabel("step" if per_point == 1 else f"step, {per_point} per point")
