"""The study, cell by cell: one objective under one regime, its rate chosen on worlds that are not reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bench.machine import commit, processor
from bench.microcosm.related import RELATED
from bench.microcosm.train import Regime, Size, train
from bench.microcosm.world import Exact, Measures, Worlds
from tbrm.objectives import OBJECTIVES, Objective
from tbrm.registry import GIVEN

REGIMES = {
    "fresh": Regime(),
    "stale32": Regime(stale=32),
    "hopeless": Regime(hopeless=True),
    "fresh-x4": Regime(responses=4),
    "replay32": Regime(replay=32),
    "stale8": Regime(stale=8),
    "hopeless-stale32": Regime(stale=32, hopeless=True),
    "hopeless-x4": Regime(responses=4, hopeless=True),
    "stale32-x4": Regime(responses=4, stale=32),
    "hopeless-replay32": Regime(replay=32, hopeless=True),
}
"""The most telling first: a study that is stopped has whole tables of these."""

MEANING = {
    "fresh": "by the weights of the step, one to a prompt",
    "stale": "by weights of 8 or 32 steps before",
    "replay32": "a second update a step, on responses of one of the last 32",
    "hopeless": "half of the prompts are never rewarded",
    "x4": "four to each of 8 prompts",
}

RECIPES = Path(__file__).parents[2] / "recipes/objectives"
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {"name": "tbrm", "value": "learned"},
    "tbrm+0.2": {"name": "tbrm", "reward_offset": 0.2},
}
"""More rows of the product's, as those of recipes/objectives/: an objective's name, and its keys but for beta."""

NOT_HERE = {GIVEN, "ppo"}
"""What stands for an object, and what wants a critic, which learns in the trainer."""

TUNING_SEED, REPORTED_SEED, DRAWS = 1, 2, 1009
MEASURES = ("success", "regret", "variation", "kl")


@dataclass(frozen=True)
class Plan:
    """What all cells have in common."""

    size: Size = field(default_factory=Size)
    seeds: int = 32
    """Worlds that are reported."""
    tuning: int = 6
    """Other worlds, on which the rate is chosen."""
    rates: tuple[float, ...] = (0.0025, 0.005, 0.01, 0.02, 0.04)
    beta: float = 0.1


def entries() -> dict[str, Callable[[float], Objective]]:
    """The rows of the tables: every objective of the product's registry, variants of them, and estimators of others."""

    def built(keys: dict[str, Any]) -> Callable[[float], Objective]:
        return lambda beta: OBJECTIVES(keys["name"])(**{"beta": beta, **keys})

    def related(kind: type[Objective]) -> Callable[[float], Objective]:
        return lambda beta: kind(beta=beta)

    ours = {name: built({"name": name}) for name in OBJECTIVES.builtin if name not in NOT_HERE}
    recipes = {path.stem: yaml.safe_load(path.read_text())["objective"] for path in sorted(RECIPES.glob("*.yaml"))}
    # What goes by a name of its own has no penalty for leaving the reference, if its recipe has none.
    named = {row: {"beta": 0.0, **keys} for row, keys in recipes.items() if row not in {*ours, *NOT_HERE}}
    variants = {row: built(keys) for row, keys in (named | VARIANTS).items()}
    return ours | variants | {row: related(kind) for row, kind in RELATED.items()}


@cache
def exact(count: int, seed: int, beta: float, hopeless: bool) -> Exact:
    return Exact(replace(_worlds(count, seed), hopeless=hopeless), beta)


@cache
def _worlds(count: int, seed: int) -> Worlds:
    return Worlds.make(count, seed)


def run(entry: str, regime_name: str, plan: Plan) -> dict[str, Any]:
    """A cell: how the objective did in each of the reported worlds at the best rate of the others."""
    objective, regime = entries()[entry](plan.beta), REGIMES[regime_name]
    others = exact(plan.tuning, TUNING_SEED, plan.beta, regime.hopeless)
    tried = train(others, objective, regime, list(plan.rates), plan.size, DRAWS)
    regrets = [float(curve[-1].regret.mean()) for curve in tried]
    best = min(range(len(regrets)), key=lambda i: regrets[i] if math.isfinite(regrets[i]) else math.inf)
    worlds = exact(plan.seeds, REPORTED_SEED, plan.beta, regime.hopeless)
    (curve,) = train(worlds, objective, regime, [plan.rates[best]], plan.size, DRAWS + 1)
    return {
        "entry": entry,
        "regime": regime_name,
        **_numbers(objective, plan),
        "machine": processor(),
        "commit": commit(),
        "rate": plan.rates[best],
        "tuning_regret": [_rounded(x) for x in regrets],
        "at_the_end": {name: [_rounded(x) for x in getattr(curve[-1], name).tolist()] for name in MEASURES},
        "curve": {name: [_mean_and_error(point, name) for point in curve] for name in MEASURES},
    }


def saved(out: Path, entry: str, regime: str, plan: Plan) -> dict[str, Any] | None:
    """The cell, if it is there and was made with the same numbers."""
    path = _path(out, entry, regime)
    if not path.exists():
        return None
    cell = json.loads(path.read_text())
    same = json.loads(json.dumps(_numbers(entries()[entry](plan.beta), plan)))
    return cell if same.items() <= cell.items() else None


def save(out: Path, cell: dict[str, Any]) -> None:
    """Whole or not at all."""
    path = _path(out, cell["entry"], cell["regime"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell) + "\n")
    part.replace(path)


def _path(out: Path, entry: str, regime: str) -> Path:
    return out / regime / f"{entry}.json"


def _numbers(objective: Objective, plan: Plan) -> dict[str, Any]:
    return {"objective": objective.model_dump(exclude_unset=True), "plan": asdict(plan)}


def _mean_and_error(point: Measures, name: str) -> list[float | None]:
    values: Tensor = getattr(point, name)
    return [_rounded(float(values.mean())), _rounded(standard_error(values))]


def standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


torch.set_num_threads(1)
