"""Objects where a recipe has names: a config that holds them, and a name for each by which config.yaml can be read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tbrm.config.recipe import with_sections
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.objectives import OBJECTIVES, Objective
from tbrm.policy.given import check_given
from tbrm.registry import GIVEN, Registry, path_of
from tbrm.tasks import TASKS, Task
from tbrm.training.callbacks import Callback

Plugin = TypeVar("Plugin", bound=BaseModel)


def with_objects(
    config: Config, *, task: Task | None, objective: Objective | None, reward: Callable[..., Any] | None
) -> Config:
    """The config with these, if given, in place of its own task, objective and verifier. Raises ConfigError."""
    if task is not None:
        config = with_sections(config, task=_named("task", task, Task, TASKS))
    if objective is not None:
        config = with_sections(config, objective=_named("objective", objective, Objective, OBJECTIVES))
    if reward is not None:
        if config.task is None:
            raise ConfigError(
                "reward: a function was given, and no task with responses to grade: give one, or leave it out"
            )
        config = with_sections(config, task=config.task.graded_by(reward))
    return config


def check_objects(
    config: Config,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    callbacks: Sequence[Callback],
) -> None:
    """Raises ValueError where the config wants an object that is not there, or one that is there does not fit."""
    if config.task is not None:
        config.task.require_objects()
    config.objective.require_objects()
    check_given(config.model, model, tokenizer)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks: got {callback!r:.100}; wants instances of subclasses of tbrm.Callback")


def _named(section: str, thing: Plugin, base: type[BaseModel], registry: Registry) -> Plugin:
    """With the name that its class is found by, and `given` where it is not found, or cannot be made again of its keys."""
    kind = type(thing)
    if not isinstance(thing, base):
        raise ConfigError(f"{section}: got {thing!r:.100}; wants an instance of a subclass of tbrm.{base.__name__}")
    try:
        keys = thing.model_dump(mode="json")
    except PydanticSerializationError as error:
        raise ConfigError(
            f"{section}: {kind.__name__} has a key that config.yaml cannot hold: {error}; declare it as Field(exclude=True)"
        ) from error
    if _finds(registry, keys["name"], kind):
        return thing
    name = path_of(kind) if _made_again(thing, keys) else None
    return thing.model_copy(update={"name": name or GIVEN})


def _finds(registry: Registry, name: str, kind: type) -> bool:
    try:
        return registry(name) is kind
    except ValueError:
        return False


def _made_again(thing: BaseModel, keys: dict[str, Any]) -> bool:
    try:
        return bool(type(thing).model_validate(keys) == thing)
    except (ValueError, TypeError):  # of arrays, to compare is no yes or no
        return False
