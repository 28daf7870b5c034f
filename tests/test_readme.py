"""Every block of README.md runs as shown, in order, on a copy of the repository elsewhere.

Lines that set up a machine are held to what they name instead: targets of `make` are made with --dry-run, and what
`pip install` asks for is one of pyproject.toml's extras (tests/kernels/test_wheel.py installs a wheel).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that git knows, as they are, and nothing that was built or left beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    return tmp_path


def commands(block: str) -> Iterator[str]:
    return filter(None, (shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()))


def sets_up(command: str) -> bool:
    return command.startswith(("make ", "pip "))


@pytest.mark.slow
def test_blocks_run_in_order(clone: Path) -> None:
    (clone / "build/types").mkdir(parents=True)
    (clone / "build/types/tbrm_kernels").symlink_to(clone / "kernels")  # as an installation of the copy would have it
    for library in (ROOT / "kernels").glob("*.so"):
        (clone / "kernels" / library.name).symlink_to(library)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(clone), str(clone / "build/types")]),
        "OMP_NUM_THREADS": "1",
    }
    scripts = {
        "sh": lambda block: "\n".join(line for line in commands(block) if not sets_up(line)),
        "python": lambda block: f"{shlex.quote(sys.executable)} -c {shlex.quote(block)}",
    }
    script = "\n".join(scripts[language](block) for language, block in BLOCKS)
    done = subprocess.run(
        ["bash", "-euxc", script], cwd=clone, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_sets_up_a_machine_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for language, block in BLOCKS if language == "sh" for line in commands(block) if sets_up(line)]
    assert len(lines) == 4
    for line in map(shlex.split, lines):
        if line[0] == "make":
            subprocess.run([*line, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        else:
            asked = re.fullmatch(r"\.(?:\[(.*)\])?", line[2])
            assert asked and set(filter(None, (asked[1] or "").split(","))) <= set(extras), line


def test_it_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 120
