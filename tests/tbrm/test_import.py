"""What `import tbrm` offers, and costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
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
