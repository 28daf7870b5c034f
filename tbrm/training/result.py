"""What a run came to, for result.json."""

from __future__ import annotations

from typing import Any

from tbrm.config.schema import Config
from tbrm.training.checkpoint import TrainerState


def result_of(config: Config, state: TrainerState, n_heldout: int) -> dict[str, Any]:
    return {
        "accuracy_before": state.accuracy_before,
        "accuracy_after": state.accuracy_after,
        "reward_before": state.reward_before,
        "reward_after": state.reward_after,
        "n_heldout": n_heldout,
        "seconds_training": round(state.seconds_training, 1),
        "steps": state.step,
        "seed": config.seed,
        "objective": config.objective.name,
        "model": config.model.name,
        "task": config.task.name if config.task else None,
    }
