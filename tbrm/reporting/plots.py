"""The curves of one run, or of several side by side, from the rows of metrics.jsonl and eval.jsonl. They are drawn by the
page itself: web/plots.js.

Groups are runs that differ in nothing but their seed, or a run alone. Of several runs a curve is the mean at the steps that
all of them have, and its band goes from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tbrm.reporting.facts import phase_seconds
from tbrm.reporting.run_folder import Row, Run, number

AXES = {"step": "step", "responses": "responses", "tokens": "tokens generated", "seconds": "seconds of training"}
"""What curves can be drawn against: update steps, or what they had cost by then."""
COLOURS = ("blue", "orange", "green", "pink", "sky", "yellow", "grey")
"""Okabe and Ito's, told apart with any kind of colour vision; page.css has each light and dark. More groups are dashed."""
_DASHES = {"": [], "dashed": [6, 4], "dotted": [2, 3]}
_MOST_POINTS = 200
"""Of a curve. In a longer run a point stands for several steps: it is their mean, and a band shows their range."""


@dataclass(frozen=True)
class Panel:
    """One plot: the metric `key`, with a band of `spread` (another metric) on both sides if given, or between `bounds`."""

    key: str
    title: str
    unit: str
    spread: str | None = None
    log: bool = False
    percent: bool = False
    bounds: tuple[str, str] | None = None


PANELS = [
    Panel("reward_mean", "Reward", "mean over trajectories"),
    Panel("loss", "Loss", "mean over trajectories", log=True),
    Panel("residual_mean", "Bellman residual", "mean ± standard deviation", spread="residual_std"),
    Panel("value_mean", "Value of the prompt", "mean V(s₁), nats"),
    Panel("log_ratio_mean", "Log-ratio to the reference", "mean per trajectory, nats"),
    Panel("entropy_mean", "Entropy", "mean per token, nats"),
    Panel("response_length_mean", "Response length", "mean, tokens"),
    Panel("truncated_share", "Truncated responses", "share of trajectories", percent=True),
    Panel("behaviour_gap_mean", "Gap to what sampled", "mean |log π − log μ|, nats a token"),
    Panel("behaviour_kl", "KL of what sampled", "to the policy, nats a token"),
    Panel("clip_fraction", "Clipped", "share of tokens", percent=True),
    Panel("learned_value_explains", "Foreseen by the learned value", "share of the variance"),
    Panel("grad_norm", "Gradient norm", "before clipping"),
    Panel("tokens_per_second", "Throughput", "tokens per second"),
    Panel("peak_memory_mib", "Peak memory", "MiB"),
]

HELDOUT_REWARD = Panel("reward_mean", "Reward on held-out prompts", "mean over responses")
_ACCURACY = "Accuracy on held-out prompts"
_SECONDS = Panel("seconds", "Seconds per step", "all phases")

Groups = Sequence[Sequence[Run]]


def plots(groups: Groups, labels: Sequence[str]) -> dict[str, Any]:
    """What plots.js draws: `figures`, in the order of the page, accuracy first; their curves' places on each of `axes` are in
    `x`, which several share. What no run has is left out."""
    steps = [_Rows([(run, run.metrics) for run in group if run.metrics]) for group in groups]
    evals = [_Rows([(run, run.evals) for run in group if run.evals]) for group in groups]
    metrics = [row for group in groups for run in group for row in run.metrics]
    figures = {"accuracy": _figure(_accuracy(groups), evals), "heldout_reward": _figure(HELDOUT_REWARD, evals)}
    for panel in [*PANELS[:1], *_reward_panels(metrics), *PANELS[1:]]:
        figures[panel.key] = _figure(panel, steps)
    phases = list(dict.fromkeys(key for row in metrics for key in row if key.startswith("seconds/")))
    if phases:
        figures["seconds"] = _phases(phases, steps[0]) if len(groups) == 1 else _figure(_SECONDS, steps)
    places: list[dict[str, list[float | None]]] = []
    for figure in figures.values():
        for curve in figure["curves"]:
            if curve["x"] not in places:
                places.append(curve["x"])
            curve["x"] = places.index(curve["x"])
    return {
        "axes": AXES,
        "groups": [{"label": label, **_line(index)} for index, label in enumerate(labels)],
        "x": places,
        "figures": {key: each for key, each in figures.items() if each["curves"]},
    }


def series(rows: Sequence[Row], key: str) -> np.ndarray:
    """The metric as float64 [rows]; NaN where it is missing, null or text."""
    return np.array([np.nan if (value := number(row, key)) is None else value for row in rows], dtype=np.float64)


def spent(metrics: Sequence[Row], steps: np.ndarray) -> dict[str, np.ndarray]:
    """On each axis, what the updates up to each of `steps` had cost; NaN where the metrics do not tell."""
    at = series(metrics, "step")
    # What a rollout for several updates has generated stands in the line of its first.
    costs = {
        "responses": series(metrics, "generated_responses"),
        "tokens": series(metrics, "generated_tokens"),
        "seconds": series([_with_seconds(row) for row in metrics], _SECONDS.key),
    }
    if np.isnan(costs["responses"]).all():  # recorded ones, or a run of an earlier version
        fresh = series(metrics, "trajectories") * series(metrics, "fresh_share")
        costs["responses"] = fresh.round() + np.nan_to_num(series(metrics, "dropped"))
    known = (steps == 0) | (steps <= max(at, default=0))
    done = np.searchsorted(at, steps, side="right")
    totals = {axis: np.append(0.0, np.nancumsum(cost))[done] for axis, cost in costs.items()}
    unknown = {axis for axis, cost in costs.items() if np.isnan(cost).all()}
    return {"step": steps} | {
        axis: np.where(known & (axis not in unknown), total, np.nan) for axis, total in totals.items()
    }


class _Rows:
    """Rows of a group's runs, at the steps that all of them have: several to a point in long runs."""

    def __init__(self, members: Sequence[tuple[Run, Sequence[Row]]]) -> None:
        common = set.intersection(*({row["step"] for row in rows} for _, rows in members)) if members else set()
        self.of_run = [[_with_seconds(row) for row in rows if row["step"] in common] for _, rows in members]
        self.per_point = max(1, -(-len(common) // _MOST_POINTS))
        steps = np.array(sorted(common), dtype=np.float64)
        costs = [spent(run.metrics, steps) for run, _ in members]
        self.x = {axis: _shown(self.points(np.mean([each[axis] for each in costs], axis=0))) for axis in AXES if costs}

    def points(self, values: np.ndarray) -> np.ma.MaskedArray:
        """[rows] to the mean of each point, with NaN masked out."""
        return self._spans(values).mean(axis=1)

    def curve(self, panel: Panel) -> dict[str, Any] | None:
        """With its band, where there is one; None if no run has the metric."""
        measured = [values for rows in self.of_run if np.isfinite(values := series(rows, panel.key)).any()]
        if not measured:
            return None
        means = np.ma.stack([self.points(values) for values in measured])
        low, high = means.min(axis=0), means.max(axis=0)
        if len(self.of_run) == 1:
            low, high = self._band(panel, self.of_run[0])
        band = {} if np.ma.allequal(low, high) else {"low": _shown(low), "high": _shown(high)}
        return {"x": self.x, "y": _shown(means.mean(axis=0)), **band}

    def _band(self, panel: Panel, rows: Sequence[Row]) -> Sequence[np.ma.MaskedArray]:
        """Of a run alone."""
        if panel.bounds is not None:
            return [self.points(series(rows, bound)) for bound in panel.bounds]
        values = series(rows, panel.key)
        if panel.spread is not None:
            spread = series(rows, panel.spread)
            return self.points(values - spread), self.points(values + spread)
        return self._spans(values).min(axis=1), self._spans(values).max(axis=1)

    def _spans(self, values: np.ndarray) -> np.ma.MaskedArray:
        """[rows] to [points, steps per point], with NaN, and what the last point lacks, masked out."""
        padded = np.pad(values, (0, -len(values) % self.per_point), constant_values=np.nan)
        return np.ma.masked_invalid(padded.reshape(-1, self.per_point))


def _figure(panel: Panel, groups: Sequence[_Rows]) -> dict[str, Any]:
    curves = [{"group": index, **curve} for index, rows in enumerate(groups) if (curve := rows.curve(panel))]
    lowest = [value for curve in curves for value in curve.get("low", curve["y"]) if value is not None]
    log = panel.log and bool(lowest) and min(lowest) > 0
    per_point = max((rows.per_point for rows in groups), default=1)
    unit = f"{panel.unit}{', log scale' * log}{f', {per_point} steps a point' * (per_point > 1)}"
    return {
        "title": panel.title,
        "unit": unit,
        "log": log,
        "percent": panel.percent,
        "stacked": False,
        "curves": curves,
    }


def _accuracy(groups: Groups) -> Panel:
    counts = {run.evals[-1].get("n") for group in groups for run in group if run.evals}
    prompts = f" of {counts.pop()} prompts" if len(counts) == 1 and counts != {None} else ""
    seeds = ", of several seeds lowest to highest" * any(len(group) > 1 for group in groups)
    unit = f"share right{prompts}, with 95% interval{seeds}"
    return Panel("accuracy", _ACCURACY, unit, percent=True, bounds=("ci_low", "ci_high"))


def _reward_panels(metrics: Sequence[Row]) -> list[Panel]:
    """Of each of several verifiers."""
    keys = sorted({key for row in metrics for key in row if key.startswith("reward/")})
    return [Panel(key, f"Reward of {key.removeprefix('reward/')}", "mean over responses") for key in keys]


def _phases(keys: Sequence[str], rows: _Rows) -> dict[str, Any]:
    """Where the time of a step went, one phase on top of the other."""
    panels = [Panel(key, _SECONDS.title, "by phase") for key in keys]
    figure = _figure(panels[0], [rows])
    curves = [(key, curve) for key, panel in zip(keys, panels, strict=True) if (curve := rows.curve(panel))]
    named = [
        {"x": c["x"], "y": c["y"], "label": key.removeprefix("seconds/"), **_line(index)}
        for index, (key, c) in enumerate(curves)
    ]
    return figure | {"stacked": True, "curves": named}


def _line(index: int) -> dict[str, Any]:
    """How the curve of that place among others looks."""
    style, dash = list(_DASHES.items())[index // len(COLOURS) % len(_DASHES)]
    return {"colour": COLOURS[index % len(COLOURS)], "style": style, "dash": dash}


def _with_seconds(row: Row) -> Row:
    return row | {_SECONDS.key: phase_seconds(row) or None}


def _shown(values: np.ma.MaskedArray) -> list[float | None]:
    """With as many digits as a person reads."""
    return [None if value is None else float(f"{value:.6g}") for value in np.ma.masked_invalid(values).tolist()]
