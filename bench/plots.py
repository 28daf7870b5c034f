"""Plots of the head's benchmark, one panel per shape or vocabulary, for each dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.problem import D
from bench.ways import WAYS

COLOURS = dict(
    zip(WAYS, ["#c44e52", "#e08e90", "#333333", "#4c72b0", "#937860", "#55a868", "#8172b3", "#ccb974"], strict=True)
)
LONGEST_BAR = 8  # times the floor; beyond it only the figure grows


def plot_time(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time over the floor, at the middle number of tokens: a row of panels per dtype, a column per vocabulary."""
    dtypes, vocabularies = sorted({r["dtype"] for r in rows}), sorted({r["vocab"] for r in rows})
    counts = sorted({r["tokens"] for r in rows})
    tokens = counts[len(counts) // 2]
    figure, axes = _panels(len(dtypes), len(vocabularies), (3.4, 2.6), sharex=True)
    for dtype, line in zip(dtypes, axes, strict=True):
        for vocab, ax in zip(vocabularies, line, strict=True):
            found = {r["way"]: r for r in rows if (r["dtype"], r["tokens"], r["vocab"]) == (dtype, tokens, vocab)}
            for place, way in enumerate(WAYS):
                row = found.get(way, {})
                ratio = row.get("over_floor", 0.0)
                length = min(ratio, LONGEST_BAR)
                ax.barh(place, length, color=COLOURS[way])
                note = row.get("note", "").partition(":")[0]
                ax.annotate(
                    f"{ratio:.2f}" if ratio else note,
                    (length, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            ax.axvline(1, color="black", lw=0.8, ls=":")
            ax.set_yticks(range(len(WAYS)), WAYS, fontsize=8)
            ax.set_title(f"{dtype}, V = {vocab}, T = {tokens}", fontsize=9)
            ax.set(xlim=(0, 1.15 * LONGEST_BAR), ylim=(len(WAYS) - 0.4, -0.6))
    for ax in axes[-1]:
        ax.set_xlabel("time over three bare products")
    _save(figure, f"TBRM loss and gradients, D = {D} (bars end at {LONGEST_BAR})", path)


def plot_memory(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory against the number of tokens: a row of panels per dtype, a column per vocabulary."""
    dtypes, vocabularies = sorted({r["dtype"] for r in rows}), sorted({r["vocab"] for r in rows})
    tokens = sorted({r["tokens"] for r in rows})
    figure, axes = _panels(len(dtypes), len(vocabularies), (3.4, 3.0), sharey="row")
    for dtype, line in zip(dtypes, axes, strict=True):
        for vocab, ax in zip(vocabularies, line, strict=True):
            for way in WAYS:
                points = [
                    (r["tokens"], r["peak_mib"])
                    for r in rows
                    if (r["way"], r["vocab"], r["dtype"]) == (way, vocab, dtype) and r.get("peak_mib")
                ]
                xs, ys = zip(*sorted(points), strict=True) if points else ((), ())
                ours = way.startswith("tbrm")
                ax.plot(xs, ys, marker="o", ms=4, lw=2.4 if ours else 1.2, color=COLOURS[way], label=way)
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(tokens, map(str, tokens))
            ax.minorticks_off()
            ax.set_title(f"{dtype}, V = {vocab}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("tokens")
    for ax in axes[:, 0]:
        ax.set_ylabel("MiB beyond inputs")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, fontsize=8, frameon=False, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 0)
    )
    _save(figure, f"Peak memory, gradients included, D = {D} (missing points: see the table)", path)


def _panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained", **shared
    )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.label_outer()
    return figure, axes


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
