"""From a YAML recipe, with dotted overrides, to a checked config; and messages that say what to write instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.config.synonyms import meant_by
from tbrm.objectives import OBJECTIVES, Objective
from tbrm.tasks import TASKS, Task

_PLUGGABLE: dict[str, tuple[Any, Any]] = {"objective": (Objective, OBJECTIVES), "task": (Task, TASKS)}


_RETIRED = {"model.liger": (False, "model.compile fuses norms and MLP")}
"""Keys of earlier versions: the value that changes nothing, which a run's config.yaml may hold, and what does instead."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; everybody else, and this loader, as a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, or takes its sections as they are, applies `key.sub=value` overrides and checks everything. Raises
    ConfigError."""
    tree = copy.deepcopy(dict(recipe)) if isinstance(recipe, Mapping) else _read(recipe)
    return parse_config(_overridden(tree, overrides))


def load_sections(
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    run: Path | None = None,
    seed: int | None = None,
    **sections: dict[str, Any],
) -> Config:
    """A config for the commands that use a model without training it. Raises ConfigError.

    `source` is a recipe, of which the task, chat, rollout and evaluation sections are taken, or a task's name, or None. What it
    lacks is as in the `run` of that folder, whose seed and precision are taken too; that the run was trusted with code of its
    model's says nothing of who uses it. `sections` replace keys of these and others (None values are left out), and overrides
    come last.
    """
    tree: dict[str, Any] = {}
    if run is not None:
        recipe = _read(run / "config.yaml")
        precision = (recipe.get("model") or {}).get("precision")
        tree = _used(recipe) | {"model": {"precision": precision} if precision else {}}
        seed = recipe.get("seed") if seed is None else seed
    if source is not None:
        is_recipe = source.endswith((".yaml", ".yml"))
        tree |= _used(_read(source)) if is_recipe else {"task": {"name": source}}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | {key: value for key, value in values.items() if value is not None}
    required = {
        "run": {"dir": "."},
        "objective": {"name": "tbrm", "beta": 1.0},
        "trainer": {"steps": 1},
        "seed": seed or 0,
    }
    if tree.get("task") is None:
        required["data"] = {"trajectories": "-"}
    return parse_config(_overridden({**required, **tree}, overrides))


def _used(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Its sections that matter to who uses a model without training it."""
    return {key: value for key, value in recipe.items() if key in ("task", "chat", "rollout", "evaluation")}


def _read(recipe: str | Path) -> dict[str, Any]:
    try:
        tree = yaml.load(Path(recipe).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"recipe {str(recipe)!r} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {str(recipe)!r} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"recipe {str(recipe)!r} holds {type(tree).__name__}; wants sections such as `model:` and `trainer:`"
        )
    return tree


def parse_config(tree: dict[str, Any]) -> Config:
    """Checks a config given as nested dicts. Raises ConfigError."""
    tree = _without_retired(tree)
    kinds = {section: _kind(section, tree[section]) for section in _PLUGGABLE if isinstance(tree.get(section), dict)}
    outer = dict(tree)
    if "objective" in kinds:
        outer["objective"] = _build("objective", kinds["objective"], tree["objective"])
    if "task" in kinds:
        outer["task"] = kinds["task"].model_construct(name=tree["task"]["name"])  # stands in for it
    try:
        config = Config.model_validate(outer)
    except ValidationError as error:
        raise ConfigError(_explain(error, Config, outer)) from None
    if "task" not in kinds:
        return config
    # Last, since a task takes its time: it reads its files, or makes a first problem.
    return _evaluated(config.model_copy(update={"task": _build("task", kinds["task"], tree["task"])}))


def _without_retired(tree: dict[str, Any]) -> dict[str, Any]:
    tree = dict(tree)
    for key, (harmless, instead) in _RETIRED.items():
        section, name = key.split(".")
        values = tree.get(section)
        if not isinstance(values, dict) or name not in values:
            continue
        if values[name] != harmless:
            raise ConfigError(f"{key}: got {values[name]!r}, and there is no such key any more: {instead}")
        tree[section] = {other: value for other, value in values.items() if other != name}
    return tree


def with_sections(config: Config, **sections: BaseModel | dict[str, Any]) -> Config:
    """The config with other sections, checked as a whole once more. Raises ConfigError."""
    tree = {**dict(config), **sections}
    try:
        return _evaluated(Config.model_validate(tree))
    except ValidationError as error:
        raise ConfigError(_explain(error, Config, tree)) from None


def _evaluated(config: Config) -> Config:
    """On no more problems than its task has."""
    held_out = config.task.heldout_size() if config.task else None
    return config.model_copy(update={"evaluation": config.evaluation.fitted(held_out)})


def config_to_dict(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _kind(section: str, values: dict[str, Any]) -> type[BaseModel]:
    base, registry = _PLUGGABLE[section]
    name = values.get("name")
    if not isinstance(name, str):
        raise ConfigError(
            f"{section}.name: got {name!r}; wants one of {', '.join(registry.builtin)}, or an import path"
        )
    kind: Any
    try:
        kind = registry(name)
    except ValueError as error:
        raise ConfigError(f"{section}.name: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(f"{section}.name: {name!r} is not a subclass of tbrm.{section}s.{base.__name__}")
    return kind


def _build(section: str, kind: type[BaseModel], values: dict[str, Any]) -> BaseModel:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, values, prefix=section)) from None


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with every `key.sub=value` set in it."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: wants key.sub=value, for instance optim.learning_rate=2e-5")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {parent} is not a section")
        try:
            node[leaf] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    return tree


def _explain(error: ValidationError, model: type[BaseModel], tree: dict[str, Any], prefix: str = "") -> str:
    known = [f"{prefix}.{key}" if prefix else key for key in _known_keys(model, tree)]
    return "\n".join(_explain_one(detail, known, prefix) for detail in error.errors())


def _explain_one(detail: ErrorDetails, known: list[str], prefix: str) -> str:
    key = ".".join(str(part) for part in ((prefix,) if prefix else ()) + detail["loc"])
    if detail["type"] == "extra_forbidden":
        meant = meant_by(key, known)
        hint = f"; did you mean {meant}?" if meant else f"; valid keys: {', '.join(known)}"
        return f"{key}: unknown key (value {detail['input']!r}){hint}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"] or detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return (
        f"{key}: got {detail['input']!r} ({type(detail['input']).__name__}); wants: {message[0].lower()}{message[1:]}"
    )


def _known_keys(model: type[BaseModel], tree: dict[str, Any]) -> list[str]:
    return [key for key, _, _ in describe(model, tree)]


def describe(model: type[BaseModel] = Config, values: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """Every key as (dotted name, default or value, one line of meaning). The objective's and the task's own keys are
    those of the classes that `values` holds, or of the base class."""
    values = values or {}
    rows: list[tuple[str, str, str]] = []
    if "name" not in values and issubclass(model, (Objective, Task)):
        values = {"name": PydanticUndefined, **values}  # only an object does without
    for name, info in model.model_fields.items():
        value = values.get(name, info.get_default(call_default_factory=True))
        section = type(value) if isinstance(value, BaseModel) else section_type(info.annotation)
        if section is not None:
            nested = dict(value) if isinstance(value, BaseModel) else value if isinstance(value, dict) else {}
            rows += [(f"{name}.{key}", default, text) for key, default, text in describe(section, nested)]
        else:
            rows.append(
                (name, "required" if value is PydanticUndefined else _yaml_inline(value), info.description or "")
            )
    return rows


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The class of the section that a field holds, if it holds one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        for inner in get_args(candidate):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                return inner
    return None


def _yaml_inline(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
