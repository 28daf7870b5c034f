from __future__ import annotations

from pathlib import Path

import torch

from tbrm.trajectories.stored import load_trajectories, save_trajectories
from tbrm.trajectories.trajectory import ReferenceScore, Trajectory


def test_trajectories_come_back_bit_for_bit_and_in_any_order(tmp_path: Path) -> None:
    logprobs = torch.tensor([-0.1, -1e-38, -7.25])
    trajectories = [
        Trajectory([1, 2, 3], [4, 5, 2**31 - 1], 0.1, group=-7, weight_version=3),
        Trajectory([9], [], -1e300, truncated=True, weight_version=None),  # nothing was said
        Trajectory(
            [1],
            [2, 3],
            1.0,
            action_mask=[False, True],
            reference=ReferenceScore(2, logprobs[:1], logprobs[1]),
            behaviour_logprobs=logprobs[2:],
        ),
        Trajectory([5, 6], [7, 8, 9], 0.5, reference=ReferenceScore(0, logprobs, torch.tensor(34.5))),
        Trajectory([5], [7], 0.5, reference=ReferenceScore(0, logprobs[:1], logprobs[0], torch.tensor([0.1, 2e-38]))),
        Trajectory([5], [], 0.5, behaviour_logprobs=logprobs[:0]),
        Trajectory([5], [7, 8, 9], 0.5, behaviour_logprobs=logprobs, old_logprobs=logprobs / 2, old_values=-logprobs),
    ]
    path = tmp_path / "some.safetensors"
    save_trajectories(path, trajectories)
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 1], [2], []):
        loaded = load_trajectories(path, order)
        assert [_plain(t) for t in loaded] == [_plain(trajectories[i]) for i in order]
    assert [_plain(t) for t in load_trajectories(path)] == [_plain(t) for t in trajectories]
    save_trajectories(path, [])
    assert load_trajectories(path) == []


def _plain(trajectory: Trajectory) -> dict:
    values = dict(vars(trajectory))
    if score := values.pop("reference"):
        values |= {"version": score.version, "logprobs": score.logprobs.tolist(), "value": score.value.item()}
        values["state"] = None if score.state is None else score.state.tolist()
        assert score.logprobs.dtype == score.value.dtype == torch.float32
    for name in ("behaviour_logprobs", "old_logprobs", "old_values"):
        if values[name] is not None:
            assert values[name].dtype == torch.float32
            values[name] = values[name].tolist()
    return values
