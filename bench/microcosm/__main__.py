"""Every objective in worlds whose best policy is known exactly: what each reaches with the same responses.

    python -m bench.microcosm                              # all cells that are not there yet, then tables and plots
    python -m bench.microcosm --workers 2                  # two cells at a time, a core each
    python -m bench.microcosm --regimes fresh stale32 --entries tbrm optimal
    python -m bench.microcosm --tables                     # tables and plots alone, of the cells that are there

A cell is one objective (a row) under one regime (a column): its rate is the best of --rates on --tuning worlds that are not
reported, then it trains in --seeds others, the same ones, with the same prompts and random numbers, for every row. Stop it
whenever you like: finished cells stay in --out and are not run again, unless they were made with other numbers. The tables
are written beside them, and into docs/science.md.

regimes: {regimes}
rows: {entries}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.microcosm.study import REGIMES, Plan, entries, run, save, saved
from bench.microcosm.tables import publish
from bench.microcosm.train import Size

Cell = tuple[str, str]


def main() -> None:
    args = _arguments()
    plan = Plan(Size(args.steps, args.batch), args.seeds, args.tuning, tuple(args.rates), args.beta)
    if not args.tables:
        cells = [(row, regime) for regime in args.regimes for row in args.entries]
        todo = [cell for cell in cells if saved(args.out, *cell, plan) is None]
        for found in tqdm(_results(todo, plan, args.workers), total=len(todo), desc="cells", file=sys.stdout):
            save(args.out, found)
    publish(args.out, args.page, plan)


def _results(todo: list[Cell], plan: Plan, workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from (run(*cell, plan) for cell in todo)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = [pool.submit(run, *cell, plan) for cell in todo]
        yield from (done.result() for done in as_completed(running))


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    plan, rows = Plan(), list(entries())
    about = __doc__.format(regimes=", ".join(REGIMES), entries=", ".join(rows))
    parser = argparse.ArgumentParser(
        "python -m bench.microcosm", None, about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/science/microcosm"))
    parser.add_argument("--page", type=Path, default=Path("docs/science.md"), help="where the tables go")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), metavar="REGIME")
    parser.add_argument("--entries", nargs="+", choices=rows, default=rows, metavar="ROW")
    parser.add_argument("--steps", type=int, default=plan.size.steps, help=f"of training (default {plan.size.steps})")
    parser.add_argument("--batch", type=int, default=plan.size.batch, help="responses a step (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=plan.seeds, help="worlds that are reported (default %(default)s)")
    parser.add_argument(
        "--tuning", type=int, default=plan.tuning, help="worlds to choose the rate on (default %(default)s)"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=plan.rates, help="(default %(default)s)")
    parser.add_argument("--beta", type=float, default=plan.beta, help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, a core each (default %(default)s)")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
