"""What stands for an objective that is an object, where a run's config.yaml is read again without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from pydantic import ConfigDict

from tbrm.objectives.objective import Objective, TrajectoryLoss

if TYPE_CHECKING:
    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class GivenObjective(Objective):
    """It has the keys of the object, and can do nothing."""

    model_config = ConfigDict(extra="allow")

    beta: float = 1.0  # the object's own says

    def require_objects(self) -> NoReturn:
        raise ValueError(
            "objective.name: given, which stands for an object of Python's: give it, "
            "tbrm.train(config, objective=MyObjective(...)), or name an objective"
        )

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        self.require_objects()
