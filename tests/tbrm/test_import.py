"""What `import tbrm` offers, and costs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import tbrm
from tests.tbrm.conftest import RECIPES

CODE = """
import sys
import tbrm
names = dir(tbrm)
before = {"torch", "pydantic", "yaml"} & sys.modules.keys()
tbrm.Task, tbrm.Objective, tbrm.train, tbrm.load_config("recipes/tiny.yaml"), tbrm.__version__
print(before, {"torch", "transformers"} & sys.modules.keys())
"""


def test_importing_costs_nothing_and_a_recipe_and_a_subclass_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=RECIPES.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set() set()", done.stderr


def test_each_name_is_what_it_says_and_another_is_refused() -> None:
    from tbrm import Callback, Objective, Task, Trainer, Trajectory, load_config, make_engine, train

    offered: list[Any] = [Callback, Objective, Task, Trainer, Trajectory, load_config, make_engine, train]
    assert sorted([thing.__name__ for thing in offered] + ["__version__"]) == sorted(tbrm.__all__)
    assert set(tbrm.__all__) <= set(dir(tbrm))
    assert tbrm.__version__ == version("tbrm")
    with pytest.raises(AttributeError, match="module 'tbrm' has no attribute 'trian'"):
        _ = tbrm.trian


ADVICE = r"the trainer needs packages that are not installed \(pydantic, .*tqdm\): pip install 'tbrm\[train\]'"
ALONE = """
import sys
sys.modules.update(dict.fromkeys(["pydantic", "transformers", "safetensors", "yaml", "jinja2", "numpy", "tqdm"]))
"""


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """In a process where the kernels are installed without the trainer's packages."""
    command = [sys.executable, "-c", ALONE + code]
    return subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, timeout=60)


COMMANDS = """
from tbrm.commands.cli import COMMANDS, main
wants = {"train": ["r"], "config": ["r"], "plan": ["r"], "eval": ["m", "--task", "r"], "score": ["m", "f"], "doctor": [],
         "rollout": ["r", "--out", "o"], "report": ["r"], "compare": ["a", "b"], "export": ["r", "o"],
         "import-gguf": ["f", "o"]}
assert wants.keys() == {command.name for command in COMMANDS}
for name, arguments in wants.items():
    assert main([name, *arguments]) == 1
"""


def test_every_command_says_in_one_line_which_extra_it_needs() -> None:
    done = alone(COMMANDS)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 11
    for line in lines:
        assert re.fullmatch("tbrm [a-z-]+: " + ADVICE, line)


def test_help_and_version_need_no_extra() -> None:
    main = "from tbrm.commands.cli import main; main"
    assert alone(f"{main}(['--version'])").stdout == f"tbrm {tbrm.__version__}\n"
    assert "Train a model as a recipe says" in alone(f"{main}(['--help'])").stdout
    keys = alone(f"{main}(['train', '--help'])")
    assert "--resume-anyway" in keys.stdout
    assert re.fullmatch("tbrm train: " + ADVICE, keys.stderr.strip())


ROOMS = sorted({path.parent.name for path in Path(tbrm.__file__).parent.glob("*/__init__.py")})
LIGHT = ["commands", "processes", "storage"]  # imported before a command is known


def test_every_room_of_the_trainer_says_which_extra_it_needs() -> None:
    code = f"""
import importlib
for name in {ROOMS}:
    try:
        importlib.import_module("tbrm." + name)
    except ModuleNotFoundError as error:
        print(name, error)
"""
    said = dict(line.split(" ", 1) for line in alone(code).stdout.splitlines())
    assert sorted([*said, *LIGHT]) == ROOMS
    assert all(re.fullmatch(ADVICE, text) for text in said.values())


@pytest.mark.parametrize(
    "code", ["tbrm.load_config('recipes/tiny.yaml')", "tbrm.train(None)", "tbrm.Task", "tbrm.Trainer"]
)
def test_python_code_is_told_too(code: str) -> None:
    last = alone(f"import tbrm; {code}").stderr.splitlines()[-1]
    assert re.fullmatch("ModuleNotFoundError: " + ADVICE, last)
