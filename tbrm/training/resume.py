"""What `--resume` may go on with: the recipe is compared with the run's own, and what was changed is kept.

A run is what its folder says it is: a recipe with another model, task or beta is another run, and is refused by the keys that
differ. A run that has had all of its steps is left as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tbrm.config.recipe import config_to_dict
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.reporting.metrics import read_jsonl
from tbrm.storage.run_files import HISTORY
from tbrm.training.checkpoint import latest_step

MAY_CHANGE = {
    "run.dir": "a run's folder may be moved",
    "trainer.steps": "a run may be made longer",
    "optim.learning_rate": "a run that grows unstable goes on more slowly",
    "optim.warmup_steps": "as the learning rate",
    "optim.schedule": "as the learning rate",
    "critic.learning_rate": "as the policy's",
    "trainer.batch_tokens": "how a step is divided, and not what it is",
    "trainer.max_skipped": "when to give up",
    "model.device": "where it is computed",
    "model.precision": "by word alone: what it comes to is compared where the model is loaded",
    "model.attention": "how it is computed",
    "model.layout": "how it is computed",
    "model.liger": "a key of earlier versions: how it was computed",
    "model.compile": "how it is computed",
    "parallel.*": "where it is computed, and by how many",
    "rollout.engine": "who samples, from the same distribution",
    "rollout.batch_size": "as the engine",
    "rollout.vllm.*": "as the engine, whose servers move from job to job",
    "*timeout*": "how long is waited, and not for what",
    "evaluation.every": "how often, and not of which problems: evaluation.prompts decides what is never trained on",
    "evaluation.samples": "how the model is looked at",
    "evaluation.temperature": "how the model is looked at",
    "checkpoint.*": "what is kept",
    "logging.*": "what is shown",
}
"""Patterns of the keys that a resumed run may have otherwise, and why. All others make another run."""

_ABSENT = "(no such key)"

Changes = dict[str, tuple[Any, Any]]
"""By key, what it was and what it is."""


def nothing_left(config: Config, *, anyway: bool) -> str | None:
    """Of a run that has had all of its steps a line that says so; None if there is something to go on with, or to begin.

    Raises ConfigError if the folder holds a run of another recipe, unless it is to go on `anyway`.
    """
    run_dir = Path(config.run.dir)
    done = latest_step(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if done is None and not (metrics.exists() and read_jsonl(metrics)):
        return None
    if not anyway:
        _refuse_another(run_dir, config)
    if done is None or done < config.trainer.steps or not (run_dir / "result.json").exists():
        return None
    return (
        f"{run_dir} is finished: {done} of {config.trainer.steps} steps are done, and result.json holds what came of them. "
        "Nothing was changed; a larger trainer.steps goes on from there"
    )


def _refuse_another(run_dir: Path, config: Config) -> None:
    recipe = read_recipe(run_dir)
    if recipe is None:
        raise ConfigError(
            f"run.dir: {str(run_dir)!r} holds a run, but no config.yaml that can be read, to compare this recipe with; "
            "--resume-anyway goes on without"
        )
    different = {key: change for key, change in differences(recipe, config).items() if not may_change(key)}
    if different:
        listed = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in different.items())
        raise ConfigError(
            f"run.dir: {str(run_dir)!r} holds a run of another recipe: {listed}. Go on with its own values "
            f"({run_dir / 'config.yaml'} is its recipe), choose another run.dir, or give --resume-anyway"
        )


def may_change(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def read_recipe(run_dir: Path) -> dict[str, Any] | None:
    """The resolved recipe that the run in `run_dir` was last started with; None if there is none that can be read."""
    try:
        tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) else None


def write_recipe(run_dir: Path, config: Config, *, resumed_at: int | None) -> None:
    """Makes the config the recipe of the run in `run_dir`. If it goes on from a step, what changes there joins the history."""
    changes = {} if resumed_at is None else differences(read_recipe(run_dir) or {}, config)
    if resumed_at is None:
        (run_dir / HISTORY).unlink(missing_ok=True)
    if changes:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with (run_dir / HISTORY).open("a") as file:
            file.write(json.dumps({"step": resumed_at, "time": now, "changed": changes}) + "\n")
    written = run_dir / "config.yaml.part"  # a kill leaves the one or the other
    written.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
    os.replace(written, run_dir / "config.yaml")


def differences(recipe: Mapping[str, Any], config: Config) -> Changes:
    """By key, what `recipe`, perhaps one of an earlier version, says otherwise. A key that it lacks had its default."""
    old, new = dict(leaves(recipe)), dict(leaves(config_to_dict(config)))
    found: Changes = {}
    for key in [*new, *(key for key in old if key not in new)]:
        was = old[key] if key in old else _default(config, key)
        if was != new.get(key, _ABSENT):
            found[key] = (was, new.get(key, _ABSENT))
    for section in ("task", "objective"):  # another one has keys of its own
        if f"{section}.name" in found:
            found = {k: v for k, v in found.items() if k == f"{section}.name" or not k.startswith(f"{section}.")}
    return found


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _default(config: Config, key: str) -> Any:
    """Of a key of this config, in the form that JSON gives it; `_ABSENT` if it has none."""
    *sections, leaf = key.split(".")
    section: Any = config
    for name in sections:
        section = getattr(section, name, None) if isinstance(section, BaseModel) else None
    fields = type(section).model_fields if isinstance(section, BaseModel) else {}
    default = fields[leaf].get_default(call_default_factory=True) if leaf in fields else PydanticUndefined
    return _ABSENT if default is PydanticUndefined else json.loads(json.dumps(default))
