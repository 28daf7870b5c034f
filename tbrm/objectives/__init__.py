"""Objectives: losses over per-token statistics, one to a file, found by name."""

from tbrm.objectives.base import Objective
from tbrm.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "tbrm": "tbrm.objectives.tbrm:Tbrm",
        "reval": "tbrm.objectives.reval:Reval",
        "brm": "tbrm.objectives.brm:Brm",
        "tba": "tbrm.objectives.tba:Tba",
        "reinforce": "tbrm.objectives.reinforce:Reinforce",
    },
)

__all__ = ["OBJECTIVES", "Objective"]
