"""The page of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tbrm.reporting.comparison import Group, answering, answers, differences, gaps, reached, title
from tbrm.reporting.facts import choose
from tbrm.reporting.html import write_page
from tbrm.reporting.page import SHOWN_SAMPLES, as_yaml
from tbrm.reporting.plots import plots


def write_comparison(groups: Sequence[Group], path: Path) -> Path:
    drawn = plots([list(group.runs.values()) for group in groups], [title(group) for group in groups])
    by_outcome = answers(groups)
    first = dict(list(by_outcome.items())[:SHOWN_SAMPLES])
    return write_page(
        path,
        "compare.html",
        groups=[
            line | {"label": group.label, "title": title(group), "reached": reached(group), "answering": _whose(group)}
            for group, line in zip(groups, drawn["groups"], strict=True)
        ],
        n_runs=sum(len(group.runs) for group in groups),
        gaps=gaps(groups),
        plots=drawn,
        differences=differences(groups),
        outcomes={outcome: len(problems) for outcome, problems in by_outcome.items()},
        shown=choose(first, SHOWN_SAMPLES),
        configs={name: as_yaml(run.config) for group in groups for name, run in group.runs.items()},
    )


def _whose(group: Group) -> str:
    said = answering(group)
    return group.label if said is None else f"{said[0]}, step {said[1]}"
