"""The plot of README.md, from runs of `make demo` with several seeds: `python -m docs.demo RUN ...` writes it anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tbrm.reporting.metrics import read_jsonl
from tbrm.reporting.plots import series

PLOT = Path(__file__).parent / "demo.png"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def draw(runs: list[Path]) -> Figure:
    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for colour, run in zip(COLOURS, runs, strict=False):
        evals = read_jsonl(run / "eval.jsonl")
        steps, accuracy = series(evals, "step"), series(evals, "accuracy")
        seed = json.loads((run / "result.json").read_text())["seed"]
        label = f"seed {seed}: {accuracy[0]:.1%} → {accuracy[-1]:.1%}"
        axes.plot(steps, accuracy, color=colour, marker="o", label=label, clip_on=False)
    axes.set(ylim=(0, 1), xlabel="training step", xticks=steps)
    axes.set_title(f"Greedy accuracy on {evals[-1]['n']} held-out sums", loc="left", fontweight="bold", fontsize=10)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(axis="y", color="#e3e7eb")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["font.size"] = 9
    draw([Path(run) for run in sys.argv[1:]]).savefig(PLOT, dpi=160, facecolor="white")
