"""Every key of a recipe, as the site shows them: read off the config's own classes."""

from __future__ import annotations

import html
import re
import types
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import BaseMetadata
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tbrm.config.recipe import describe, section_type
from tbrm.config.schema import Config
from tbrm.objectives import OBJECTIVES, Objective
from tbrm.tasks import TASKS, Task
from tbrm.tasks.verifiers import VERIFIERS, Verifier

PLACE = "<!-- every key -->"
"""In a page, where the tables go."""
_PLUGGABLE = {
    "objective": (OBJECTIVES, Objective),
    "task": (TASKS, Task),
    "task.verifier_options": (VERIFIERS, Verifier),
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_KINDS = {"str": "text", "int": "integer", "float": "number", "bool": "true, false"}


def tables() -> str:
    """A table to each section, and one to what each objective, task and verifier has beside."""
    parts = [
        _table(section, ((key, _field(Config, key), *said) for key, *said in rows))
        for section, rows in groupby(describe(), lambda row: row[0].partition(".")[0])
    ]
    for section, (registry, base) in _PLUGGABLE.items():
        for name in registry.builtin:
            kind = registry(name)
            own = [row for row in describe(kind) if row[0] not in base.model_fields]
            if own:
                rows = ((f"{section}.{key}", kind.model_fields[key], *said) for key, *said in own)
                parts.append(_table(f"{section}: {name}", rows))
    return "\n".join(parts)


def _table(title: str, rows: Iterable[tuple[str, FieldInfo, str, str]]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field, default, meaning in rows:
        shown = "**required**" if default == "required" else f"`{default}`"
        lines.append(f"| `{key}` | {_values(field)} | {shown} | {_text(meaning)} |")
    return "\n".join([f"### {title}", "", '<div class="keys" markdown>', "", *lines, "", "</div>", ""])


def _field(section: type[BaseModel], key: str) -> FieldInfo:
    first, _, rest = key.partition(".")
    field = section.model_fields[first]
    inner = section_type(field.annotation)
    return _field(inner, rest) if inner else field


def _text(meaning: str) -> str:
    """As Markdown that shows it letter by letter, but for `code`."""
    parts = meaning.split("`")
    parts[::2] = [re.sub(r"([\\*_\[\]|])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)


def _values(field: FieldInfo) -> str:
    """What it may be: a type and its bounds, or the names to choose from."""
    bounds = [
        f"{sign} {bound:g}"
        for constraint in field.metadata
        if isinstance(constraint, BaseMetadata)
        for name, sign in _BOUNDS.items()
        if (bound := getattr(constraint, name, None)) is not None
    ]
    return ", ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if kind is type(None) else _name(kind) for kind in inner)
    if origin in (list, tuple):
        return f"list of {_name(inner[0])}"
    if origin is dict:
        return "mapping"
    return _KINDS[annotation.__name__] if not hasattr(annotation, "__metadata__") else _name(annotation.__origin__)
