"""Things found by name: objectives, tasks, verifiers, rollout engines.

A name is looked up among the built-in ones, then among the entry points that installed packages offer (group
``tbrm.objectives`` and so on), and last, if it holds a colon, it is an import path ``package.module:attribute``.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from tbrm.spelling import hint

GIVEN = "given"
"""In a recipe, the name of what no name finds: an object, which Python code gives to `tbrm.train`."""


@dataclass(frozen=True)
class Registry:
    """Maps the names of one kind of thing to ``module:attribute``, imported only when asked for."""

    kind: str
    """What the things are, singular: "objective"; its plural with "tbrm." before it is the entry-point group."""
    builtin: dict[str, str]

    def __call__(self, name: str) -> Any:
        """The thing called `name`. Raises ValueError, naming the nearest known name, if there is none."""
        if name in self.builtin:
            return import_path(self.builtin[name])
        plugins = {point.name: point for point in entry_points(group=f"tbrm.{self.kind}s")}
        if name in plugins:
            return plugins[name].load()
        if ":" in name:
            return import_path(name)
        raise ValueError(
            f"no {self.kind} is called {name!r}: {hint(name, [*self.builtin, *plugins])}. "
            "Your own is named by its import path, 'package.module:attribute'."
        )


def import_path(path: str) -> Any:
    """The attribute that ``package.module:attribute`` names. Modules in the working directory are found too."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error


def path_of(thing: Any) -> str | None:
    """The import path of a function or class, by which another process may find it; None if it has none."""
    module_name, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    found = getattr(sys.modules.get(module_name or ""), name, None)
    return f"{module_name}:{name}" if found is thing and module_name != "__main__" else None
