"""The house: which way imports run, where tests stand, and how long a file and a function (its docstring aside) may be."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.rooms import BEGIN, END, MAP, ORDER, PACKAGES, drawn, imports, parsed

ROOT = Path(__file__).parents[1]


def module_of(dotted: str) -> Path | None:
    """Where a module of ours is, or the one that has the attribute; None if neither is there."""
    first, *names = dotted.split(".")
    path = PACKAGES[first]
    for name in names:
        if path.is_dir() and ((path / name).is_dir() or (path / f"{name}.py").exists()):
            path = path / name if (path / name).is_dir() else path / f"{name}.py"
        else:
            holder = path / "__init__.py" if path.is_dir() else path
            return path if re.search(rf"\b{name}\b", holder.read_text(encoding="utf-8")) else None
    return path


def room_of(dotted: str) -> str | None:
    """The room of tbrm/ that it leads to, or the module beside the rooms; None for the package itself."""
    path = module_of(dotted)
    assert path is not None, dotted
    parts = path.relative_to(PACKAGES["tbrm"]).parts
    return Path(parts[0]).stem if parts else None


def test_the_list_has_every_room() -> None:
    beside = {path.stem for path in (ROOT / "tbrm").glob("*.py")} - {"__init__"}
    rooms = {path.parent.name for path in (ROOT / "tbrm").glob("*/__init__.py")}
    assert beside | rooms == set(ORDER)
    assert beside == {"__main__", "parallel", "registry", "chat", "spelling", "needs_train"}


def test_imports_run_down_the_list_and_never_up() -> None:
    up = []
    for path, tree in parsed(ROOT / "tbrm"):
        mine = path.relative_to(ROOT / "tbrm").with_suffix("").parts[0]
        for line, name in imports(tree):
            if name.startswith("tbrm.") and mine != "__init__" and (other := room_of(name)) is not None:
                up += [f"{path}:{line}: {name}"] * (ORDER.index(other) < ORDER.index(mine))
    assert not up


def test_the_kernels_know_nothing_of_the_trainer() -> None:
    assert not [
        f"{path}:{line}: {name}"
        for path, tree in parsed(ROOT / "kernels")
        for line, name in imports(tree)
        if not name.startswith("tbrm_kernels")
    ]


def test_what_is_imported_of_ours_is_there() -> None:
    """Nothing imports a script of bench/ or runs a soak: a name that has moved would not be missed."""
    assert not [
        f"{path}:{line}: {name}"
        for folder in PACKAGES.values()
        for path, tree in parsed(folder)
        for line, name in imports(tree)
        if module_of(name) is None
    ]


@pytest.mark.parametrize("product", ["tbrm", "kernels"])
def test_every_room_has_its_tests(product: str) -> None:
    for room in (ROOT / product).glob("*/__init__.py"):
        tests = ROOT / "tests" / product / room.parent.name
        assert list(tests.rglob("test_*.py")), f"{tests} holds no tests"


def test_files_and_functions_are_read_in_one_sitting() -> None:
    long = []
    for folder in PACKAGES.values():
        for path, tree in parsed(folder):
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 350:
                long.append(f"{path}: {lines} lines")
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
                    lines = (node.end_lineno or 0) - node.lineno + 1 - docstring
                    long += [f"{path}:{node.lineno}: {node.name} has {lines} lines"] * (lines > 60)
    assert not long


def test_help_takes_no_torch() -> None:
    code = (
        "import sys; from tbrm.commands import cli; cli._parser().format_help(); "
        "print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_map_shows_the_rooms_as_they_are() -> None:
    assert BEGIN + drawn() + END in MAP.read_text(encoding="utf-8"), "run `python -m docs.rooms`"


def test_what_the_map_names_is_there() -> None:
    text = MAP.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_.]+)`", text):
        if name.partition(".")[0] in ORDER and not name.endswith(".py"):
            found = importlib.import_module(f"tbrm.{name.partition('.')[0]}")
            for part in name.split(".")[1:]:
                if not hasattr(found, part) and hasattr(found, "__path__"):
                    importlib.import_module(f"{found.__name__}.{part}")
                found = getattr(found, part)
    for path in re.findall(r"`((?:[a-z_]+/)+[a-z_.]*)`", text):
        assert any((root / path).exists() for root in (ROOT, ROOT / "tbrm")), path
