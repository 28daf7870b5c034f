"""The names of the API reference, and those among them that say nothing of themselves."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "reference"


def names() -> list[str]:
    """Those that a page of docs/reference/ shows."""
    pages = [page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md"))]
    return [name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)]


def undocumented() -> list[str]:
    """Of these, and of the public methods of classes among them, those without a docstring."""
    return [name for shown in names() for name, thing in _members(shown) if not inspect.getdoc(thing)]


def _members(name: str) -> Iterator[tuple[str, Any]]:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    if callable(thing) and not hasattr(thing, "__origin__"):  # the docstring of a type's other name is not kept
        yield name, thing
    for key, member in vars(thing).items() if inspect.isclass(thing) else ():
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield f"{name}.{key}", member
