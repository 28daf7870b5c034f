"""The buffer by itself, and in real runs. That it survives a kill bit for bit: test_checkpoint.py, test_faults.py."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from tbrm.config.rollout import ReplayConfig
from tbrm.experience.replay import ReplayBuffer
from tbrm.reporting.metrics import Phases, read_jsonl
from tbrm.training.trainer import Trainer
from tbrm.trajectories.trajectory import ReferenceScore, Trajectory
from tests.tbrm.conftest import tiny_config

PHASES = Phases(torch.device("cpu"))


def group(number: int, size: int = 1, version: int = 0, reference_version: int = 0) -> list[Trajectory]:
    """`size` responses of 3 tokens to a prompt of 2."""
    score = ReferenceScore(reference_version, torch.zeros(3), torch.zeros(()))
    return [Trajectory([1, 2], [i, 4, 5], 0.0, False, number, version, None, score) for i in range(size)]


def numbers(trajectories: list[Trajectory]) -> list[int]:
    return [t.group for t in trajectories]


def buffer_of(folder: Path, **config: object) -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(**config), folder / "replay", seed=0)


def test_the_oldest_groups_leave_first_and_whole(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=5, samples_per_step=100)
    for step in range(1, 5):
        buffer.update(step, group(step, size=2), [0.0, 0.0])
    assert sorted(numbers(buffer.sample(5, PHASES))) == [3, 3, 4, 4]
    assert buffer.metrics()["replay_size"] == 4
    assert sorted(path.name for path in (tmp_path / "replay").iterdir()) == [
        "step-000003.safetensors",
        "step-000004.safetensors",
    ]


def test_the_capacity_may_be_in_tokens(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity_tokens=12, samples_per_step=100)
    buffer.update(1, [t for number in range(4) for t in group(number)], [0.0] * 4)
    assert numbers(buffer.sample(2, PHASES)) == [2, 3]


def test_groups_stay_together(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=100, samples_per_step=4)
    buffer.update(1, [t for number in range(10) for t in group(number, size=3)], [1.0] * 30)
    for step in range(2, 20):
        assert sorted(Counter(numbers(buffer.sample(step, PHASES))).values()) == [3, 3]


@pytest.mark.parametrize("sampling", ["uniform", "residual"])
def test_groups_are_drawn_with_the_stated_chances(tmp_path: Path, sampling: str) -> None:
    """Pearson's chi-square of 4,000 draws of one group; the 99.9% quantile for 4 degrees of freedom is 18.5."""
    residuals = [-1.0, 2.0, 3.0, -6.0, 0.5]
    buffer = buffer_of(tmp_path, capacity=5, samples_per_step=1, sampling=sampling)
    buffer.update(1, [t for number in range(5) for t in group(number)], [9.0] * 5)
    buffer.update(2, [t for number in range(5) for t in group(number)], residuals)  # the last ones count
    draws = 4000
    counts = Counter(buffer._draw(seed)[0].group for seed in range(draws))
    weights = [1.0] * 5 if sampling == "uniform" else [abs(r) for r in residuals]
    expected = [draws * w / sum(weights) for w in weights]
    assert sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected)) < 18.5


def test_a_draw_of_several_takes_none_twice_and_the_hopeless_last(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=9, samples_per_step=3, sampling="residual")
    buffer.update(1, [t for number in range(4) for t in group(number)], [0.0, 5.0, math.nan, 1e-9])
    buffer.add("more", [group(4)])  # never trained on: like the largest
    for step in range(2, 30):
        assert sorted(numbers(buffer.sample(step, PHASES))) == [1, 3, 4]


def test_too_old_trajectories_are_dropped_and_counted(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=100, samples_per_step=100, max_staleness=2)
    for version in range(4):
        buffer.update(version + 1, group(version, size=2, version=version), [1.0, 1.0])
    foreign = Trajectory([1], [2], 1.0, group=-1, weight_version=None)
    buffer.add("foreign", [[foreign]])
    # Update 5 starts from version 4: 2 is as old as may be.
    assert sorted(set(numbers(buffer.sample(5, PHASES)))) == [-1, 2, 3]
    assert buffer.metrics() == {"replay_size": 5, "replay_expired": 4}
    assert buffer.metrics()["replay_expired"] == 0


def test_reference_scores_are_kept_until_the_reference_moves_on(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=10, samples_per_step=10)
    buffer.update(1, [*group(1), *group(2)], [1.0, 1.0])
    buffer.update(2, group(1), [1.0])
    assert len(list((tmp_path / "replay").iterdir())) == 1  # nothing new to write
    buffer.update(3, group(1, reference_version=1), [1.0])
    assert {t.group: t.reference.version for t in buffer.sample(4, PHASES)} == {1: 1, 2: 0}
    buffer.update(4, group(2, reference_version=1), [1.0])
    assert sorted(path.name for path in (tmp_path / "replay").iterdir()) == [
        "step-000003.safetensors",
        "step-000004.safetensors",
    ]


def test_a_checkpoint_links_the_files_and_outlives_the_buffer(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=4, samples_per_step=2, sampling="residual")
    for step in range(1, 4):
        buffer.update(step, [*group(2 * step), *group(2 * step + 1)], [step, 2.0 * step])
    saved = tmp_path / "saved"
    hashes = buffer.save(saved)
    assert sorted(hashes) == ["step-000002.safetensors", "step-000003.safetensors"]
    for name in hashes:
        assert (saved / name).samefile(tmp_path / "replay" / name)
    then = [numbers(buffer.sample(step, PHASES)) for step in range(4, 9)]
    buffer.update(9, [*group(20), *group(21), *group(22), *group(23)], [1.0] * 4)
    buffer.close()
    assert not (tmp_path / "replay").exists()

    restored = buffer_of(tmp_path, capacity=4, samples_per_step=2, sampling="residual")
    restored.restore(saved)
    assert [numbers(restored.sample(step, PHASES)) for step in range(4, 9)] == then
    restored.update(9, group(9), [1.0])
    assert json.loads((saved / "index.json").read_text())["kept"][0]["group"] == 4  # the checkpoint is as it was


@pytest.mark.parametrize("name", ["../../victim", "/victim", "sub/victim", "..", ".", "", "a\\b", "a\0b"])
def test_names_in_an_index_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    victim, saved = tmp_path / "victim", tmp_path / "checkpoints" / "replay"
    victim.write_text("the user's")
    saved.mkdir(parents=True)
    (tmp_path / "checkpoints" / "victim").write_text("the checkpoint's")
    (saved / "index.json").write_text(json.dumps({"files": {name: "x"}, "kept": []}))
    buffer = buffer_of(tmp_path / "runs", capacity=4)
    with pytest.raises(ValueError, match=r"index\.json: .* is no plain name of a file: not what tbrm wrote"):
        buffer.restore(saved)
    assert victim.read_text() == "the user's"
    assert not (tmp_path / "runs" / "replay").exists()


def test_a_group_kept_in_a_file_that_the_index_does_not_have_is_an_error(tmp_path: Path) -> None:
    buffer = buffer_of(tmp_path, capacity=4)
    buffer.update(1, group(1), [1.0])
    buffer.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "index.json").read_text())
    index["kept"][0]["file"] = "../other.safetensors"
    (tmp_path / "saved" / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"index\.json: \['\.\./other\.safetensors'\] are kept, and not among its files"
    ):
        buffer_of(tmp_path, capacity=4).restore(tmp_path / "saved")


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A checkpoint from elsewhere may hold links in the place of files."""
    victim, saved = tmp_path / "victim", tmp_path / "saved"
    victim.write_text("the user's")
    saved.mkdir()
    (saved / "step-000002.safetensors").symlink_to(victim)
    (saved / "index.json").write_text(json.dumps({"files": {"step-000002.safetensors": "x"}, "kept": []}))
    buffer = buffer_of(tmp_path, capacity=4)
    buffer.restore(saved)
    buffer.update(2, group(1), [1.0])
    assert victim.read_text() == "the user's"


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"replay buffer cannot write .*file/replay/step-000001.* with --resume"):
        buffer_of(tmp_path / "file", capacity=4).update(1, group(1), [1.0])
    buffer = buffer_of(tmp_path, capacity=4, samples_per_step=1)
    buffer.update(1, group(1), [1.0])
    (tmp_path / "replay" / "step-000001.safetensors").write_bytes(b"what is this")
    with pytest.raises(OSError, match=r"replay buffer cannot read its files in .* with --resume"):
        buffer.sample(2, PHASES)


def test_a_run_reuses_trajectories_for_two_updates_a_rollout(tmp_path: Path) -> None:
    """Every rollout is trained on once as fresh ones, one half in each of two steps, with as many old ones beside it."""
    replay = {"capacity": 100, "samples_per_step": 4, "sampling": "residual"}
    config = tiny_config(tmp_path, trainer__steps=6, rollout__updates=2, replay=replay)  # 4 prompts x 2 samples
    Trainer(config).train()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert ["generated_tokens" in row for row in rows] == [True, False] * 3
    assert [row["trajectories"] for row in rows] == [4, 8, 8, 8, 8, 8]
    assert [row["replay_size"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["fresh_share"] for row in rows] == [1.0] + [0.5] * 5
    assert [row["staleness_max"] for row in rows[:2]] == [0, 1]
    assert max(row["staleness_mean"] for row in rows) > 1
    assert not (tmp_path / "replay").exists()


def test_a_replayed_trajectory_is_not_scored_again_until_the_reference_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = {"name": "reval", "beta": 0.05, "reset_reference_every": 3}
    replay = {"capacity": 100, "samples_per_step": 8}
    trainer = Trainer(tiny_config(tmp_path, objective=objective, replay=replay))
    scored: list[int] = []
    real = trainer.reference.score
    monkeypatch.setattr(trainer.reference, "score", lambda batch, part: scored.append(len(part)) or real(batch, part))
    per_step = []
    for _ in range(4):
        scored.clear()
        trainer.train_step()
        per_step.append(sum(scored))
    assert per_step == [8, 8, 8, 16]
