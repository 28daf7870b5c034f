"""What the runs say, as tables and plots."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.pages import write_block
from tbrm.rollout.evaluate import wilson_interval

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""By task, then by row: what is kept of the reported seeds' runs."""


def publish(found: Found, rates: dict[tuple[str, str], float], out: Path, page: Path) -> None:
    for task, rows in found.items():
        plot(task, rows, out / f"{task}.png")
    made = [run for rows in found.values() for runs in rows.values() for run in runs]
    machines, commits = (sorted({run[key] for run in made}) for key in ("machine", "commit"))
    said = f"Made by `make science SCIENCE=real` on {' and '.join(machines)}, commit {', '.join(commits)}."
    tables = [f"### {task}\n\n{table(task, rows, rates)}" for task, rows in found.items()]
    write_block(page, "real", "\n\n".join([said, *tables]))
    print(f"{page} and the plots in {out} are written")


def table(task: str, rows: dict[str, list[dict[str, Any]]], rates: dict[tuple[str, str], float]) -> str:
    """Bold is what is within noise of the best: the intervals of both, over all their responses, have something in common."""
    heads = [
        "",
        "seeds",
        "accuracy",
        "95% interval",
        "seconds",
        "peak, MiB",
        "KL, nats",
        "entropy, nats a token",
        "rate",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    best = max((accuracy(runs) for runs in rows.values()), default=0.0)
    best_low = max(interval(runs)[0] for runs in rows.values() if accuracy(runs) == best)
    for row, runs in sorted(rows.items(), key=lambda item: -accuracy(item[1])):
        low, high = interval(runs)
        mean, ends = f"{accuracy(runs):.1%}", [run["evaluations"][-1] for run in runs]
        cells = [
            f"`{row}`",
            ", ".join(f"{end['accuracy']:.1%}" for end in ends),
            f"**{mean}**" if high >= best_low else mean,
        ]
        cells += [f"{low:.1%} to {high:.1%}", f"{fmean(end['seconds'] for end in ends):,.0f}"]
        cells += [
            f"{max(run['peak_memory_mib'] for run in runs):,.0f}",
            *(_of(ends, name) for name in ("kl", "entropy")),
        ]
        lines.append(f"| {' | '.join(cells)} | {rates[task, row]:g} |")
    return "\n".join(lines)


def accuracy(runs: list[dict[str, Any]]) -> float:
    return fmean(run["evaluations"][-1]["accuracy"] for run in runs)


def interval(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Wilson's, of all responses of all seeds as if each were to a problem of its own."""
    return wilson_interval(accuracy(runs), sum(run["n_heldout"] for run in runs))


def _of(ends: list[dict[str, Any]], name: str) -> str:
    values = [end[name] for end in ends if end[name] is not None]
    return f"{fmean(values):.2f}" if values else ""


def plot(task: str, rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against responses and against seconds: the mean of the seeds, and their range."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for number, (row, runs) in enumerate(rows.items()):
        curves = [[point["accuracy"] for point in run["evaluations"]] for run in runs]
        mean, low, high = ([of(values) for values in zip(*curves, strict=True)] for of in (fmean, min, max))
        for ax, cost in zip(axes, ("responses", "seconds"), strict=True):
            costs = [
                fmean(point[cost] for point in points)
                for points in zip(*(run["evaluations"] for run in runs), strict=True)
            ]
            ax.plot(costs, mean, color=f"C{number % 10}", ls="--" if number > 9 else "-", label=row)
            ax.fill_between(costs, low, high, color=f"C{number % 10}", alpha=0.12, lw=0)
            ax.set_xlabel(cost if cost == "responses" else "seconds of training")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="held-out accuracy", title=task)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
