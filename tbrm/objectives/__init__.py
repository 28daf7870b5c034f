"""Objectives: losses over per-token statistics, one to a file, found by name.

Their fields are keys of a recipe, which is checked before torch is loaded: what needs torch is imported where it is used.
"""

from tbrm import needs_train  # noqa: F401
from tbrm.objectives.objective import Objective, Step, TrajectoryLoss
from tbrm.registry import GIVEN, Registry

OBJECTIVES = Registry(
    "objective",
    {
        "tbrm": "tbrm.objectives.tbrm:Tbrm",
        "reval": "tbrm.objectives.presets:Reval",
        "brm": "tbrm.objectives.brm:Brm",
        "tba": "tbrm.objectives.presets:Tba",
        "optimal": "tbrm.objectives.presets:Optimal",
        "rloo": "tbrm.objectives.rloo:Rloo",
        "reinforce": "tbrm.objectives.reinforce:Reinforce",
        "grpo": "tbrm.objectives.grpo:Grpo",
        "ppo": "tbrm.objectives.ppo:Ppo",
        GIVEN: "tbrm.objectives.given:GivenObjective",
    },
)

__all__ = ["OBJECTIVES", "Objective", "Step", "TrajectoryLoss"]
