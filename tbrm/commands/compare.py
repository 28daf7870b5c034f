"""`tbrm compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tbrm.commands.command import Command, path
from tbrm.commands.table import table

if TYPE_CHECKING:
    from tbrm.reporting.comparison import Group

_WIDEST = 40
"""Characters of a cell."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=path, help="the folder of a run, such as runs/demo")
    parser.add_argument(
        "--out", metavar="PAGE", type=path, default="compare.html", help="the page to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from tbrm.reporting.comparison import read_groups
    from tbrm.reporting.comparison_page import write_comparison
    from tbrm.reporting.summary import print_lines

    groups = read_groups([Path(folder) for folder in args.runs])
    page = Path(args.out)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(groups, page)
    print_lines([*_summary(groups), "", f"page  {page}"])


def _summary(groups: Sequence[Group]) -> list[str]:
    """What each came to, what differs in their recipes, and how many problems who of them got right."""
    from tbrm.reporting.comparison import answers, differences, gaps, reached, title
    from tbrm.reporting.summary import bars, fitting

    def cells(texts: Sequence[str]) -> list[str]:
        return [fitting(text, _WIDEST) for text in texts]

    head = [title(group) for group in groups]
    came_to = [reached(group) for group in groups]
    curves = [bars(next(iter(group.runs.values())).evals, "accuracy") for group in groups]
    rows = [cells([name, curve, *each.values()]) for name, curve, each in zip(head, curves, came_to, strict=True)]
    lines = [table(rows, ["", "", *came_to[0]])]
    if differing := differences(groups):
        lines += ["", table([cells([key, *values]) for key, values in differing.items()], cells(["differs", *head]))]
    if counts := answers(groups):
        told = [f"{len(problems)} {who}" for who, problems in counts.items()]
        lines += ["", f"of the same held-out problems: {fitting('; '.join(told), 10 * _WIDEST)}"]
    return lines + [fitting(f"not complete: {gap}", 4 * _WIDEST) for gap in gaps(groups)]


COMPARE = Command(
    "compare",
    "Show runs side by side: a page of their curves, what differs in their recipes, and how each answered the same problems.",
    arguments,
    run,
    of_one_process=True,
)
