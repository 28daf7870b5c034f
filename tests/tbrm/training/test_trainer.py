from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
import yaml

from tbrm.config.section import ConfigError
from tbrm.experience.record import record
from tbrm.policy.reference import ReferenceModel
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout import Sampling
from tbrm.rollout.evaluate import evaluate
from tbrm.training.trainer import Trainer
from tbrm_kernels.backends import head_memory
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import AHEAD, REPLAY, Recorded, assert_same_run, rows


def test_a_run_leaves_metrics_samples_checkpoints_and_a_result(tmp_path: Path) -> None:
    result = Trainer(tiny_config(tmp_path / "run")).train()
    run = tmp_path / "run"
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert list(lines[0])[:2] == ["step", "loss"]
    assert lines[0]["log_ratio_mean"] == 0.0  # exactly: the reference is the policy
    assert lines[0]["tokens_per_second"] > 0
    assert [line["step"] for line in read_jsonl(run / "eval.jsonl")] == [0, 2, 4]
    assert json.loads((run / "result.json").read_text()) == result
    assert result["n_heldout"] == 5
    assert result["accuracy_before"] is not None
    assert yaml.safe_load((run / "config.yaml").read_text())["task"]["family"] == "chain_sum"
    assert len((run / "samples" / "step-000004.jsonl").read_text().splitlines()) == 5
    assert (run / "checkpoints" / "latest").resolve().name == "step-000004"


@pytest.mark.parametrize("name", ["tbrm", "reval"])  # reval shapes rewards in its own way
def test_the_offset_is_added_to_what_the_loss_sees_of_rewards(tmp_path: Path, name: str) -> None:
    first = {}
    for offset in (0.0, 0.5):
        objective = {"name": name, "beta": 0.1, "reward_offset": offset}
        config = tiny_config(tmp_path / str(offset), objective=objective, trainer__steps=1, optim__warmup_steps=0)
        Trainer(config).train()
        first[offset] = rows(tmp_path / str(offset))[0]
    assert first[0.5]["residual_mean"] == pytest.approx(first[0.0]["residual_mean"] - 0.5 / 0.1, abs=1e-4)
    assert first[0.5]["reward_mean"] == first[0.0]["reward_mean"]


@pytest.mark.parametrize("extra", [{}, REPLAY, AHEAD], ids=["tbrm", "reval with replay", "rollouts ahead"])
def test_two_runs_are_identical(tmp_path: Path, extra: dict) -> None:
    for name in ("one", "other"):
        Trainer(tiny_config(tmp_path / name, **extra)).train()
    assert_same_run(tmp_path / "one", tmp_path / "other")
    Trainer(tiny_config(tmp_path / "third", seed=1, **extra)).train()
    assert rows(tmp_path / "third") != rows(tmp_path / "one")


def gradients_of_one_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def keep(_learning_rate: float, *, skipped: bool) -> None:
        assert not skipped
        seen.update({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})

    trainer._update = keep
    trainer.train_step()
    return seen


@pytest.mark.parametrize("objective", ["tbrm", "tba"])
def test_gradients_do_not_depend_on_the_micro_batches(tmp_path: Path, objective: str) -> None:
    large, small = (
        gradients_of_one_step(Trainer(tiny_config(tmp_path, objective__name=objective, trainer__batch_tokens=tokens)))
        for tokens in (4096, 40)
    )
    for name, gradient in large.items():
        assert (small[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("objective", ["tbrm", "reval", "brm", "tba", "optimal", "rloo", "reinforce"])
def test_gradients_do_not_depend_on_the_chunks_of_the_head(
    tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, objective__name=objective)
    whole = gradients_of_one_step(Trainer(config))
    twelve_tokens = {"cpu": 4 * 12}  # a trajectory or two
    monkeypatch.setattr(head_memory, "CHUNK_BYTES_PER_VOCABULARY_ENTRY", twelve_tokens)
    for name, gradient in gradients_of_one_step(Trainer(config)).items():
        assert (whole[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_training_on_a_recorded_file_improves_the_model(tmp_path: Path) -> None:
    """Offline: rollouts of the untrained model, graded once, are all that the training sees.

    The answer is always 7, which a model that types at random gets right now and then."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": c, "answer": "7"}) + "\n" for c in string.ascii_letters))
    settings = {
        "task": {"name": "file", "path": str(problems), "heldout_rows": 12, "verifier": "last_number"},
        "rollout": {"prompts": 32, "samples": 16, "max_new_tokens": 4},
        "evaluation": {"prompts": 12},
        "objective": {"name": "tbrm", "beta": 0.005},
    }
    recorded = tmp_path / "recorded.jsonl"
    assert record(tiny_config(tmp_path / "rollouts", **settings), recorded, steps=4) == 32 * 16 * 4
    config = tiny_config(tmp_path / "run", data__trajectories=str(recorded), trainer__steps=40, **settings)
    trainer = Trainer(config)

    def sampled_accuracy() -> float:
        return evaluate(
            trainer.engine, trainer.chat, config.task, trainer.heldout, k=50, sampling=Sampling(4), seed=1
        ).accuracy

    before = sampled_accuracy()
    trainer.train()
    after = sampled_accuracy()
    assert before > 0
    assert after > 3 * before, (before, after)


def test_held_out_prompts_in_a_file_are_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task = tiny_config(tmp_path).task
    held_out = task.heldout(5)[0]
    path = tmp_path / "mixed.jsonl"
    lines = [
        {"prompt": held_out.prompt, "response": "1", "reward": 1},
        {"prompt": "2 + 2", "response": "4", "reward": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = Trainer(tiny_config(tmp_path / "run", data__trajectories=str(path)))
    assert len(trainer.supply.source.trajectories) == 1
    assert "1 of 2 left out" in capsys.readouterr().err
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ConfigError, match=r"every problem .* is held out"):
        Trainer(tiny_config(tmp_path / "run", data__trajectories=str(path)))


def test_a_step_whose_responses_are_all_dropped_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, rollout__max_new_tokens=1, rollout__truncated="drop", rollout__prompts=1, rollout__samples=1
    )
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    metrics = trainer.train_step()
    assert metrics["trajectories"] == 0
    assert metrics["loss"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.policy.state_dict().items())


def test_a_step_that_is_not_finite_is_skipped_and_the_third_in_a_row_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, trainer__max_skipped=3))
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    trainer.supply = Recorded(trainer.supply.collect(1, trainer.phases))
    with torch.no_grad():  # a weight that makes every logit, and so every loss, NaN
        norm = trainer.policy.lm.base_model.norm.weight
        kept = norm.clone()
        norm.fill_(float("nan"))
    poisoned = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    assert [trainer.train_step()["skipped"] for _ in range(2)] == [1, 1]
    same = [torch.equal(poisoned[n].nan_to_num(), t.nan_to_num()) for n, t in trainer.policy.state_dict().items()]
    assert all(same)
    with torch.no_grad():
        norm.copy_(kept)
    assert trainer.train_step()["skipped"] == 0  # a good one between: the count starts anew
    assert not torch.equal(before["lm.model.norm.weight"], norm)
    with torch.no_grad():
        norm.fill_(float("nan"))
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(FloatingPointError, match=r"step 6: the loss is nan .* step number 3 in a row .*max_skipped"):
        trainer.train_step()
    [offending] = tmp_path.glob("skipped-step-000006.jsonl")
    assert len(read_jsonl(offending)) == 8


def test_reference_scores_are_shared_where_trajectories_come_again_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text('{"prompt": "1", "response": "2", "reward": 1}\n')
    shared = []
    monkeypatch.setattr(ReferenceModel, "share_scores", lambda *arguments: shared.append(arguments))
    for settings, times in (
        ({}, 0),
        ({"data__trajectories": str(recorded)}, 1),
        ({"replay": {"capacity": 10, "samples_per_step": 2}}, 1),
    ):
        shared.clear()
        Trainer(tiny_config(tmp_path / "run", evaluation={"prompts": 0}, **settings)).train_step()
        assert len(shared) == times
