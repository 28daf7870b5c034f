"""Objectives on a real model: the same tasks, the same number of responses, rates tuned alike on a seed that is not reported.

    python -m bench.real                           # whatever is not there yet, then tables and plots
    python -m bench.real --list                    # what there is to do, and do nothing
    python -m bench.real --tasks sums --rows tbrm optimal grpo --seeds 0
    python -m bench.real --tables                  # tables and plots alone

For each task and row (an objective) first {rates} runs with seed {tuning}, one for each rate; the rate that ends best trains
the reported seeds. That takes hours: stop it with Ctrl-C whenever you like. The run under way saves a checkpoint and goes on
from there the next time; of finished ones some kilobytes stay in --out, which are committed, and they are not made again, on
this machine or another. To see it work in minutes, without a model to download:

    python -m bench.real --runs /tmp/runs --out /tmp/real --page /tmp/page.md --tasks tiny --rows tbrm tba --seeds 0 --steps 8

tasks: {tasks}
rows: {rows}
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.real.plan import ROWS, SHOWN, TASKS, TUNING_SEED, Run, Size
from bench.real.runs import Stopped, make, result
from bench.real.tables import Found, publish

Rates = dict[tuple[str, str], float]


class Comparison:
    """All runs of a command's arguments, made where they are not there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.size = Size(args.steps, args.responses, args.evaluations)
        self.rates: Rates = {}
        self.found: Found = {}

    def kept(self, run: Run) -> dict[str, Any] | None:
        return result(self.args.out, run, self.size)

    def tuning(self, task: str, row: str) -> list[Run]:
        return [Run(task, row, rate, TUNING_SEED) for rate in TASKS[task].rates]

    def reported(self, task: str, row: str) -> list[Run]:
        """None of them while the rate is not known."""
        tried = {run.rate: kept for run in self.tuning(task, row) if (kept := self.kept(run))}
        if len(tried) < len(TASKS[task].rates):
            return []
        # Of equal ones the lower rate: it changes less.
        best = max(tried, key=lambda rate: (tried[rate]["evaluations"][-1]["accuracy"], -rate))
        self.rates[task, row] = best
        return [Run(task, row, best, seed) for seed in self.args.seeds]

    def todo(self) -> Iterator[Run]:
        """One after the other, in the order in which tables get whole: a task's rates, then seed after seed of all rows."""
        for task in self.args.tasks:
            for row in self.args.rows:
                yield from (run for run in self.tuning(task, row) if not self.kept(run))
            for number in range(len(self.args.seeds)):
                runs = [self.reported(task, row)[number] for row in self.args.rows]
                yield from (run for run in runs if not self.kept(run))

    def count(self) -> int:
        """How many are still to be made."""
        pairs = [(task, row) for task in self.args.tasks for row in self.args.rows]
        tuning = sum(not self.kept(run) for pair in pairs for run in self.tuning(*pair))
        done = sum(self.kept(run) is not None for pair in pairs for run in self.reported(*pair))
        return tuning + len(pairs) * len(self.args.seeds) - done

    def make(self) -> None:
        begun, total = time.monotonic(), self.count()
        for number, run in enumerate(self.todo(), start=1):
            left = (
                f", {(time.monotonic() - begun) / (number - 1) * (total - number + 1) / 3600:.1f} h left"
                if number > 1
                else ""
            )
            print(f"run {number} of {total}: {run.name}{left}", flush=True)
            make(self.args.runs, self.args.out, run, self.size)

    def publish(self) -> None:
        """What there is of the reported seeds."""
        for task in self.args.tasks:
            for row in self.args.rows:
                if runs := [kept for run in self.reported(task, row) if (kept := self.kept(run))]:
                    self.found.setdefault(task, {})[row] = runs
        if not self.found:
            raise SystemExit("no reported run is there yet")
        publish(self.found, self.rates, self.args.out, self.args.page)


def main() -> None:
    comparison = Comparison(_arguments())
    args = comparison.args
    if args.list:
        for task in args.tasks:
            for row in args.rows:
                for run in [*comparison.tuning(task, row), *comparison.reported(task, row)]:
                    print("done" if comparison.kept(run) else "to do", run.name)
        print(f"{comparison.count()} runs to do")
        return
    if not args.tables:
        try:
            comparison.make()
        except Stopped as stopped:
            raise SystemExit(f"{stopped}: the same command goes on") from None
    comparison.publish()


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    size = Size()
    about = __doc__.format(
        rates=len(TASKS["sums"].rates), tuning=TUNING_SEED, tasks=", ".join(TASKS), rows=", ".join(ROWS)
    )
    parser = argparse.ArgumentParser(
        "python -m bench.real", None, about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/science"), help="the runs themselves, and a checkpoint or two"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/science/real"), help="what is kept and committed"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/science.md"), help="where the tables go")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(SHOWN), metavar="TASK")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=size.steps, help="of each run (default %(default)s)")
    parser.add_argument("--responses", type=int, default=size.responses, help="a step (default %(default)s)")
    parser.add_argument("--evaluations", type=int, default=size.evaluations, help="of each run (default %(default)s)")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
