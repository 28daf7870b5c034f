"""Trajectory Bellman Residual Minimization: a trainer for language models. What Python code wants of it; `docs/python.md`.

Each name is imported when it is first asked for: `import tbrm` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbrm.commands.train import train
    from tbrm.config.recipe import load_config
    from tbrm.objectives import Objective
    from tbrm.rollout import make_engine
    from tbrm.tasks import Task
    from tbrm.training.callbacks import Callback
    from tbrm.training.trainer import Trainer
    from tbrm.trajectories.trajectory import Trajectory

__version__ = "0.1.0"

__all__ = [
    "Callback", "Objective", "Task", "Trainer", "Trajectory", "__version__", "load_config", "make_engine", "train",
]  # fmt: skip

_HOMES = {
    "Callback": "tbrm.training.callbacks",
    "Objective": "tbrm.objectives",
    "Task": "tbrm.tasks",
    "Trainer": "tbrm.training.trainer",
    "Trajectory": "tbrm.trajectories.trajectory",
    "load_config": "tbrm.config.recipe",
    "make_engine": "tbrm.rollout",
    "train": "tbrm.commands.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tbrm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
