"""The picture of the rooms in architecture.md, drawn from the imports: `python -m docs.rooms` writes it anew."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"tbrm": ROOT / "tbrm", "tbrm_kernels": ROOT / "kernels", "tests": ROOT / "tests", "bench": ROOT / "bench"}
MAP = ROOT / "docs" / "architecture.md"
BEGIN, END = "```mermaid\n", "```\n"
ORDER = [
    "__main__", "commands", "processes", "training", "plan", "experience", "rollout", "chat", "policy", "config", "objectives",
    "tasks", "trajectories", "reporting", "parallel", "storage", "registry", "spelling", "needs_train",
]  # fmt: skip
"""The rooms of tbrm/, and the modules beside them: each imports what stands after it. (`__init__` is of none.)"""


def parsed(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported of ours, in functions and for type checkers too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in PACKAGES)


def links() -> dict[str, set[str]]:
    """What each room imports from."""
    found: dict[str, set[str]] = {room: set() for room in ORDER}
    for path, tree in parsed(PACKAGES["tbrm"]):
        mine = path.relative_to(PACKAGES["tbrm"]).with_suffix("").parts[0]
        for _, name in imports(tree):
            package, *rest = name.split(".")
            other = "tbrm_kernels" if package == "tbrm_kernels" else rest[0] if rest else mine
            if mine in found and other in {*ORDER, "tbrm_kernels"} - {mine}:
                found[mine].add(other)
    return found


def drawn() -> str:
    """One line to each room that is imported and is not reached by way of another one."""
    found = links()

    def reached(room: str) -> set[str]:
        return {further for other in found.get(room, ()) for further in {other, *reached(other)}}

    lines = ["flowchart TD"]
    for room in ORDER[1:]:
        beyond = {further for other in found[room] for further in reached(other)}
        lines += [f"    {room} --> {other}" for other in [*ORDER, "tbrm_kernels"] if other in found[room] - beyond]
    return "\n".join(lines) + "\n"


def write() -> None:
    text = MAP.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    MAP.write_text(before + BEGIN + drawn() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write()
