"""What the cells say, as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench.microcosm.study import REGIMES, Plan, entries, saved, standard_error
from bench.pages import write_block

BASE = "tbrm"
"""What differences are from."""
NOISE = 2.0
"""Standard errors, within which a difference is called noise."""
PLOTTED = ("tbrm", "reval", "tba", "optimal", "learned", "reinforce", "rloo", "grpo", "dr_grpo", "ppo")
TITLES = {"success": "success", "regret": "normalised regret", "variation": "total variation from the best policy"}

Cells = dict[str, dict[str, dict[str, Any]]]
"""By regime, then by row."""


def read(out: Path, plan: Plan) -> Cells:
    """The cells that this plan has made."""
    found: Cells = {}
    for regime in REGIMES:
        for row in entries():
            if cell := saved(out, row, regime, plan):
                found.setdefault(regime, {})[row] = cell
    return found


def publish(out: Path, page: Path, plan: Plan) -> None:
    cells = read(out, plan)
    if not cells:
        raise SystemExit(f"{out} holds no cell that was made with these numbers: run it without --tables")
    (out / "tables.md").write_text("\n".join(_details(regime, rows) for regime, rows in cells.items()))
    plot(cells, plan, out / "curves.png")
    write_block(page, "microcosm", f"{_said(cells, plan)}\n\n{overview(cells)}")
    print(f"{out}/tables.md and curves.png are written, and {page}")


def overview(cells: Cells) -> str:
    """Regret, a column for each regime; bold is what is not seen to be worse than the best of its column."""
    rows = [row for row in entries() if any(row in column for column in cells.values())]
    lines = [f"| regret | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for row in rows:
        lines.append(f"| `{row}` | {' | '.join(_short(row, column) for column in cells.values())} |")
    return "\n".join(lines)


def _short(row: str, column: dict[str, dict[str, Any]]) -> str:
    if row not in column:
        return ""
    regret, best = _end(column[row], "regret"), min((_end(cell, "regret") for cell in column.values()), key=_mean)
    text = f"{_mean(regret):.3f}"
    return f"**{text}**" if not _worse(regret, best) else text


def _details(regime: str, rows: dict[str, dict[str, Any]]) -> str:
    heads = ["", "success", "regret", f"less {BASE}'s", "seeds lower", "total variation", "KL, nats", "rate"]
    lines = [f"### {regime}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, cell in sorted(rows.items(), key=lambda item: _mean(_end(item[1], "regret"))):
        success, regret, variation, kl = (_end(cell, name) for name in ("success", "regret", "variation", "kl"))
        lines.append(
            f"| `{row}` | {_mean(success):.3f} | {_mean(regret):.3f} | {_difference(regret, rows)} | {_mean(variation):.3f} | "
            f"{_mean(kl):.2f} | {_rate(cell)} |"
        )
    return "\n".join([*lines, ""])


def _difference(regret: Tensor, rows: dict[str, dict[str, Any]]) -> str:
    """Two cells of the table: in the mean, and in how many of the worlds."""
    if BASE not in rows:
        return " | "
    difference = regret - _end(rows[BASE], "regret")
    mean, error = _mean(difference), standard_error(difference)
    noise = ", noise" if abs(mean) <= NOISE * error else ""
    return f"{mean:+.3f} ± {error:.3f}{noise} | {int((difference < 0).sum())} of {len(difference)}"


def _rate(cell: dict[str, Any]) -> str:
    """An edge of those that were tried is marked: a better one may lie beyond."""
    rates = cell["plan"]["rates"]
    return f"{cell['rate']:g}{' (edge)' if cell['rate'] in (min(rates), max(rates)) else ''}"


def _worse(regret: Tensor, best: Tensor) -> bool:
    difference = regret - best
    return not _mean(difference) <= NOISE * standard_error(difference) + 1e-9  # of the best itself both are 0


def _end(cell: dict[str, Any], name: str) -> Tensor:
    """[S] at the end; infinite where a policy was lost."""
    values = [float("inf") if value is None else value for value in cell["at_the_end"][name]]
    return torch.tensor(values, dtype=torch.float64)


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _said(cells: Cells, plan: Plan) -> str:
    made = [cell for column in cells.values() for cell in column.values()]
    machines, commits = (sorted({cell[key] for cell in made}) for key in ("machine", "commit"))
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    return (
        f"{plan.size.steps} steps of {plan.size.batch} responses, beta {plan.beta:g}, {plan.seeds} worlds, the same for all "
        f"rows; each row's rate is the best of {rates} on {plan.tuning} other worlds. Made by `make science "
        f"SCIENCE=microcosm` on {' and '.join(machines)}, commit {', '.join(commits)}."
    )


def plot(cells: Cells, plan: Plan, path: Path) -> None:
    """A column of panels for each regime; what is not named is drawn grey."""
    figure, axes = plt.subplots(
        len(TITLES),
        len(cells),
        figsize=(3.4 * len(cells) + 1, 8),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    colours = {row: f"C{i}" for i, row in enumerate(PLOTTED)}
    responses = [plan.size.steps * plan.size.batch * (i + 1) / plan.size.points for i in range(plan.size.points)]
    for column, (regime, rows) in enumerate(cells.items()):
        for line, (name, title) in enumerate(TITLES.items()):
            ax = axes[line, column]
            for row, cell in rows.items():
                values = [float("nan") if mean is None else mean for mean, _ in cell["curve"][name]]
                named = row in colours
                ax.plot(
                    responses,
                    values,
                    color=colours.get(row, "0.8"),
                    lw=1.6 if named else 0.8,
                    zorder=2 if named else 1,
                    label=row,
                )
            ax.spines[["top", "right"]].set_visible(False)
            if column == 0:
                ax.set_ylabel(title)
        axes[0, column].set_title(regime)
        axes[-1, column].set_xlabel("responses")
    handles = {
        label: h
        for ax in axes.flat
        for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
        if label in colours
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)
