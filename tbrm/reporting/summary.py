"""What a run came to, in the terminal: nothing need be opened to see what was learnt."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tbrm.reporting.facts import accuracies, facts, group_by_outcome, mean_rewards, n_heldout, with_interval
from tbrm.reporting.page import write_report
from tbrm.reporting.run_folder import Row, Run, number, read_run

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 40
_SHOWN_PROBLEMS = 3
_TELLING = ("fixed", "broke", "still wrong", "stayed right", "wrong before", "right before")
"""Outcomes: of the first that occur, a problem each is shown."""


def conclude(run_dir: Path, *, page: bool) -> None:
    """Of a run that has ended: writes its `page`, if that is wanted, and prints what came of it."""
    print(f"{run_dir} holds the run", flush=True)
    print_summary(run_dir, str(write_report(run_dir)) if page else f"`tbrm report {run_dir}` writes it")


def print_summary(run_dir: Path, report: str) -> None:
    """To stdout; `report` says where the page is."""
    print_lines([*summary_lines(run_dir, terminal_width()), f"report    {report}"])


def print_lines(lines: Sequence[str]) -> None:
    """To stdout, which may not know all of their characters."""
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).encode(encoding, errors="replace").decode(encoding), flush=True)


def terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def summary_lines(run_dir: Path, width: int = 100) -> list[str]:
    """What was reached, how, on what and at what cost, and a few problems with the responses before and after. Lines with text
    of a model or data set have at most `width` characters."""
    run = read_run(run_dir)
    known = facts(run)

    def line(*labels: str) -> str:
        shown = (f"{label.lower()} {fitting(known[label], width)}" for label in labels if label in known)
        return ", ".join(shown) or "not recorded"

    return [
        *_reached(run),
        f"training  {line('Objective', 'Beta', 'Steps', 'Seed')}",
        f"setting   {line('Model', 'Task')}",
        f"cost      {line('Training time', 'Tokens generated', 'Tokens trained on', 'Throughput', 'Peak memory')}",
        *_problems(run, width),
    ]


def _reached(run: Run) -> list[str]:
    before, after = (with_interval(accuracy) for accuracy in accuracies(run))
    steps = [row["step"] for row in run.evals]
    at = f", at steps {', '.join(map(str, _spread(steps, 8)))}" if len(steps) > 2 else ""
    lines = [
        f"accuracy  {bars(run.evals, 'accuracy')}{before} -> {after} on {n_heldout(run) or 'the'} held-out prompts{at}"
    ]
    if reward := mean_rewards(run):
        lines.append(f"reward    {bars(run.evals, 'reward_mean')}{reward}, their mean")
    if not run.evals and (in_training := bars(run.metrics, "reward_mean")):
        lines.append(f"reward    {in_training}in training")
    return lines


def bars(rows: Sequence[Row], key: str) -> str:
    """The metric over the steps, from 0 to its largest, and a space; nothing of fewer than two."""
    values = [value for row in rows if (value := number(row, key)) is not None]
    if len(values) < 2:
        return ""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(_BARS[round((value - low) * scale)] for value in _spread(values, _MOST_BARS)) + " "


def _spread(values: Sequence[Any], count: int) -> Sequence[Any]:
    """At most `count` of them, from the first to the last."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _problems(run: Run, width: int) -> list[str]:
    groups = group_by_outcome(run.samples)
    ranked = [[(outcome, pair) for pair in groups[outcome]] for outcome in _TELLING if outcome in groups]
    chosen = [each for rank in zip_longest(*ranked) for each in rank if each is not None][:_SHOWN_PROBLEMS]
    lines: list[str] = []
    for outcome, (before, after) in chosen:
        lines += ["", f"{outcome} ({len(groups[outcome])} of {len(run.samples)}): {before['prompt']}"]
        lines += [f"  answer: {before['answer']}", _response("before", before), _response("after", after)]
    return [fitting(line, width) for line in lines] + [""] * bool(lines)


def _response(when: str, sample: Row | None) -> str:
    if sample is None:
        return f"  {when}: not asked again yet"
    return f"  {when} (reward {sample['reward']:g}): {sample['response'] or '(empty)'}"


def fitting(line: str, width: int) -> str:
    """In one line, whatever is in it, and without what a terminal would obey."""
    head = line[: len(line) - len(line.lstrip())]
    shown = head + " ".join("".join(c if c.isprintable() else " " for c in line).split())
    return shown if len(shown) <= width else shown[: width - 1] + "…"
