"""Runs side by side: which of them differ in nothing but their seed, what differs in the recipes of the others, what each came
to, and how they answered the same held-out problems."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tbrm.reporting.facts import Accuracy, accuracies, duration, facts
from tbrm.reporting.plots import series, spent
from tbrm.reporting.run_folder import Row, Run, number, read_run

_OF_A_RUN = {"seed", "run.dir"}
"""Keys in which the runs of a group may differ."""
_UNKNOWN = "–"


@dataclass(frozen=True)
class Group:
    """A run, or several that differ in nothing but their seed."""

    label: str
    runs: dict[str, Run]
    """By their names."""


@dataclass(frozen=True)
class Answers:
    """To a held-out problem that all groups were asked: one of each group, in their order; None: it has no responses."""

    prompt: str
    answer: str
    responses: list[Row | None]


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """In the order of their first runs. Raises ValueError if there are fewer than two runs, or one of the folders has none."""
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    if len(distinct) < 2:
        raise ValueError(f"{folders[0]} is one run: give two or more, or see it alone with `tbrm report {folders[0]}`")
    alike: dict[str, dict[str, Run]] = {}
    for folder, name in zip(distinct, _names(distinct), strict=True):
        run = read_run(folder)
        alike.setdefault(_recipe(run) if run.config else f"unknown: {name}", {})[name] = run
    groups: list[Group] = []
    for runs in alike.values():
        label = _common(list(runs))
        taken = sum(label in (group.label, *group.runs) for group in groups)
        groups.append(Group(f"{label} [{taken + 1}]" if taken else label, runs))
    return groups


def gaps(groups: Sequence[Group]) -> list[str]:
    """What is not there of which run."""
    lines = [f"{name}: {gap}" for group in groups for name, run in group.runs.items() for gap in run.gaps]
    for group in groups:
        ends = {run.metrics[-1]["step"] for run in group.runs.values() if run.metrics}
        if len(ends) > 1:
            lines.append(f"{title(group)}: its curves end after step {min(ends)}, the last that all of its runs have.")
    return lines


def title(group: Group) -> str:
    seeds = {str(run.setting("seed")) for run in group.runs.values()}
    of = "seeds" if len(seeds) == len(group.runs) else "runs"
    return f"{group.label} ({len(group.runs)} {of})" if len(group.runs) > 1 else group.label


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What is not the same in all recipes: a key's value in each group."""
    recipes = [[dict(_flat(run.config)) for run in group.runs.values()] for group in groups]
    keys = dict.fromkeys(key for of_group in recipes for recipe in of_group for key in recipe if key != "run.dir")
    rows = {key: [_values(recipe.get(key, _UNKNOWN) for recipe in of_group) for of_group in recipes] for key in keys}
    known = [any(of_group) for of_group in recipes]
    differing = {
        key: cells
        for key, cells in rows.items()
        if len({cell for cell, there in zip(cells, known, strict=True) if there}) > 1
    }
    changed = [_values(facts(run).get("Changed", "nothing") for run in group.runs.values()) for group in groups]
    return differing | ({"changed by a resume": changed} if set(changed) != {"nothing"} else {})


def reached(group: Group) -> dict[str, str]:
    """What the group came to and what it had cost by then, by label. Of several seeds it is their mean, and the interval goes
    from the lowest to the highest."""
    runs = list(group.runs.values())
    before, after = (_mean(each) for each in zip(*map(accuracies, runs), strict=True))
    evaluated = _values(str(run.evals[-1]["step"]) for run in runs if run.evals)
    done = _values(str(run.metrics[-1]["step"]) for run in runs if run.metrics)
    costs = [spent(run.metrics, series(run.metrics, "step")[-1:]) for run in runs if run.metrics]
    responses, tokens, seconds = (_cost([each[axis] for each in costs]) for axis in ("responses", "tokens", "seconds"))
    memory = [value for run in runs for row in run.metrics if (value := number(row, "peak_memory_mib")) is not None]
    return {
        "accuracy": " -> ".join(str(each or _UNKNOWN) for each in (before, after))
        + (f" at step {evaluated}" if after and done not in (evaluated, "") else ""),
        "interval": (after or before or Accuracy(0)).interval or _UNKNOWN,
        "reward": " -> ".join(_UNKNOWN if each is None else f"{each:.4g}" for each in _rewards(runs)),
        "steps": _values(facts(run)["Steps"] for run in runs),
        "responses": f"{responses:,.0f}" if responses else _UNKNOWN,
        "tokens": f"{tokens:,.0f}" if tokens else _UNKNOWN,
        "training": duration(seconds) if seconds else _UNKNOWN,
        "memory": f"{max(memory):,.0f} MiB" if memory else _UNKNOWN,
    }


def answers(groups: Sequence[Group]) -> dict[str, list[Answers]]:
    """The problems that all groups with responses were asked, by who was right: first those that divide them."""
    last = [_last_responses(group) for group in groups]
    asked = [responses for responses in last if responses]
    if not asked:
        return {}
    found: dict[tuple[bool | None, ...], list[Answers]] = {}
    for prompt, answer in asked[0]:
        if all((prompt, answer) in responses for responses in asked):
            said = [responses.get((prompt, answer)) for responses in last]
            right = tuple(None if each is None else each["correct"] for each in said)
            found.setdefault(right, []).append(Answers(prompt, answer, said))
    ranked = sorted(found, key=lambda right: (right.count(False) == 0, right.count(True) == 0, -len(found[right])))
    labels = [group.label for group in groups]
    return {_who(right, labels): found[right] for right in ranked}


def answering(group: Group) -> tuple[str, int] | None:
    """Whose responses stand for the group, and of which step."""
    return next(((name, run.sample_steps[-1]) for name, run in group.runs.items() if run.samples), None)


def _names(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder.resolve()) for folder in folders]


def _common(names: Sequence[str]) -> str:
    """What the names of a group's runs begin with: `tbrm-seed0` and `tbrm-seed1` are `tbrm`."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*names, strict=False))
    begin = "".join(characters[0] for characters in alike).rstrip("0123456789")
    stem = re.sub(r"[-_./ ]+(seed|s)?[-_./= ]*$", "", begin)
    numbered = all(name[len(begin) :].isdecimal() for name in names)
    return stem if stem and (numbered or stem != begin) else names[0]


def _recipe(run: Run) -> str:
    """The same for runs that differ in nothing but their seed."""
    recipe = {key: value for key, value in _flat(run.config) if key not in _OF_A_RUN}
    return json.dumps([recipe, [row["changed"] for row in run.changes]], sort_keys=True)


def _flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)


def _values(texts: Iterable[str]) -> str:
    """Of several seeds: each value once."""
    return ", ".join(dict.fromkeys(texts))


def _mean(accuracies: Sequence[Accuracy | None]) -> Accuracy | None:
    """Of several seeds with the lowest and the highest, of one with its interval."""
    known = [each for each in accuracies if each is not None]
    if len(known) < 2:
        return known[0] if known else None
    values = [each.value for each in known]
    return Accuracy(fmean(values), min(values), max(values))


def _rewards(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """On held-out problems, before training and at the last evaluation."""
    rows = [[row for row in run.evals if number(row, "reward_mean") is not None] for run in runs]
    before = [each[0]["reward_mean"] for each in rows if each and each[0]["step"] == 0]
    after = [each[-1]["reward_mean"] for each in rows if each and each[-1]["step"] > 0]
    return fmean(before) if before else None, fmean(after) if after else None


def _cost(costs: Sequence[np.ndarray]) -> float | None:
    known = [float(cost[0]) for cost in costs if np.isfinite(cost[0])]
    return fmean(known) if known else None


def _last_responses(group: Group) -> dict[tuple[str, str], Row]:
    run = next((run for run in group.runs.values() if run.samples), None)
    if run is None:
        return {}
    last = [(after if len(run.sample_steps) > 1 else before) for before, after in run.samples]
    return {(row["prompt"], row["answer"]): row for row in last if row is not None}


def _who(right: Sequence[bool | None], labels: Sequence[str]) -> str:
    known = [(label, each) for label, each in zip(labels, right, strict=True) if each is not None]
    good, bad = ([label for label, each in known if each is wanted] for wanted in (True, False))
    if not bad:
        return "all right"
    if not good:
        return "all wrong"
    if len(bad) == 1 and len(good) > 1:
        return f"all but {bad[0]} right"
    return f"only {good[0]} right" if len(good) == 1 else f"right: {', '.join(good)}"
