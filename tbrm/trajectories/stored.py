"""Trajectories on disk: many in one safetensors file, memory-mapped, so that some are read without the others.

Columns of one value per trajectory stand beside those that hold the tokens (or log-probs) of all, end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, count
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tbrm.storage.files import save_tensors
from tbrm.trajectories.trajectory import ReferenceScore, Trajectory

_NONE = -1  # a weight version or a reference version that there is not


def save_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """Writes all there is to them, reference scores included; read again, they are the same bit for bit."""

    def column(values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    versions = [_NONE if t.weight_version is None else t.weight_version for t in trajectories]
    chosen = [t.action_mask or [True] * len(t.response_ids) for t in trajectories]
    tensors = {
        "tokens": column([token for t in trajectories for token in (*t.prompt_ids, *t.response_ids)], torch.int32),
        "chosen": column([is_action for mask in chosen for is_action in mask], torch.bool),
        "prompt_lengths": column([len(t.prompt_ids) for t in trajectories], torch.int64),
        "response_lengths": column([len(t.response_ids) for t in trajectories], torch.int64),
        "rewards": column([t.reward for t in trajectories], torch.float64),
        "truncated": column([t.truncated for t in trajectories], torch.bool),
        "groups": column([t.group for t in trajectories], torch.int64),
        "weight_versions": column(versions, torch.int64),
        **_action_columns("behaviour_logprobs", [t.behaviour_logprobs for t in trajectories]),
        **_action_columns("old_logprobs", [t.old_logprobs for t in trajectories]),
        **_action_columns("old_values", [t.old_values for t in trajectories]),
    }
    save_tensors(tensors | score_columns(trajectories), path)


def score_columns(trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """What the reference said of them, as tensors to save."""
    scores = [t.reference for t in trajectories]
    return {
        "reference_versions": torch.tensor([score.version if score else _NONE for score in scores], dtype=torch.int64),
        "reference_lengths": torch.tensor([len(score.logprobs) if score else 0 for score in scores], dtype=torch.int64),
        "reference_logprobs": torch.cat([torch.zeros(0), *(score.logprobs for score in scores if score)]),
        "reference_values": torch.stack([torch.zeros(()), *(s.value if s else torch.zeros(()) for s in scores)])[1:],
        **_states(scores),
    }


def _states(scores: Sequence[ReferenceScore | None]) -> dict[str, Tensor]:
    """The states that scores have, where any has one, and for each score the row of its own."""
    found = [score.state for score in scores if score is not None and score.state is not None]
    if not found:
        return {}
    rows, numbers = [], count()
    for score in scores:
        rows.append(_NONE if score is None or score.state is None else next(numbers))
    return {"reference_states": torch.stack(found), "reference_state_rows": torch.tensor(rows)}


def scores_at(columns: Mapping[str, Tensor]) -> Callable[[int], ReferenceScore | None]:
    """What `score_columns` has of the trajectory at a row."""
    versions, values = columns["reference_versions"].tolist(), columns["reference_values"]
    bounds = [0, *accumulate(columns["reference_lengths"].tolist())]
    states = columns.get("reference_states")
    state_rows = [_NONE] * len(versions) if states is None else columns["reference_state_rows"].tolist()

    def score(row: int) -> ReferenceScore | None:
        if versions[row] == _NONE:
            return None
        logprobs = columns["reference_logprobs"][bounds[row] : bounds[row + 1]]
        state = None if states is None or state_rows[row] == _NONE else states[state_rows[row]].clone()
        return ReferenceScore(versions[row], logprobs.clone(), values[row].clone(), state)

    return score


def _action_columns(name: str, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What was found of each action of those trajectories that have it, as tensors to save."""
    lengths = [_NONE if each is None else len(each) for each in found]
    return {
        f"{name}_lengths": torch.tensor(lengths, dtype=torch.int64),
        f"{name}": torch.cat([torch.zeros(0), *(each for each in found if each is not None)]),
    }


def _actions_at(columns: Mapping[str, Tensor], name: str) -> Callable[[int], Tensor | None]:
    """What `_action_columns` has at a row; a file of an earlier version has none."""
    if f"{name}_lengths" not in columns:
        return lambda row: None
    lengths = columns[f"{name}_lengths"].tolist()
    bounds = [0, *accumulate(max(0, length) for length in lengths)]

    def logprobs(row: int) -> Tensor | None:
        found = columns[f"{name}"][bounds[row] : bounds[row + 1]]
        return None if lengths[row] == _NONE else found.clone()

    return logprobs


def load_trajectories(path: Path, rows: Sequence[int] | None = None) -> list[Trajectory]:
    """The trajectories at `rows`, in that order; without it all."""
    with safe_open(path, framework="pt") as file:
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = ("prompt_lengths", "response_lengths", "weight_versions", "rewards", "truncated", "groups")
    prompts, responses, weight_versions, rewards, truncated, groups = (columns[name].tolist() for name in names)
    token_at = [0, *accumulate(p + r for p, r in zip(prompts, responses, strict=True))]
    chosen_at, score = [0, *accumulate(responses)], scores_at(columns)
    behaviour, old, values = (
        _actions_at(columns, name) for name in ("behaviour_logprobs", "old_logprobs", "old_values")
    )

    def load(row: int) -> Trajectory:
        middle, stop = token_at[row] + prompts[row], token_at[row + 1]
        chosen = columns["chosen"][chosen_at[row] : chosen_at[row + 1]].tolist()
        return Trajectory(
            prompt_ids=columns["tokens"][token_at[row] : middle].tolist(),
            response_ids=columns["tokens"][middle:stop].tolist(),
            reward=rewards[row],
            truncated=truncated[row],
            group=groups[row],
            weight_version=None if weight_versions[row] == _NONE else weight_versions[row],
            action_mask=None if all(chosen) else chosen,
            reference=score(row),
            behaviour_logprobs=behaviour(row),
            old_logprobs=old(row),
            old_values=values(row),
        )

    return [load(row) for row in (range(len(prompts)) if rows is None else rows)]
