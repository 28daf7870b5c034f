"""Objectives of users: what looks at other trajectories is the same whatever the micro-batches, and broken rules are named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm.config.section import ConfigError
from tbrm.objectives import Objective, Step, TrajectoryLoss
from tbrm.objectives.contract import Contract, ObjectiveError
from tbrm.training.trainer import Trainer
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats, segment_sums
from tests.tbrm.conftest import tiny_config


def residual(objective: Objective, stats: TokenStats, batch: ScoredBatch) -> Tensor:
    return segment_sums(stats.logprobs - batch.ref_logprobs, batch.cu_seqlens) - batch.rewards / objective.beta


class Baseline(Objective):
    """The residual less its mean over the step, weighted by the squared norm of each score."""

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        weight = segment_sums(1 - stats.logprobs.exp(), batch.cu_seqlens)
        return {"residual": residual(self, stats, batch), "weight": weight}

    def columns(self, step: Step) -> dict[str, Tensor]:
        weight, error = step.measured["weight"], step.measured["residual"]
        return {"rewards": step.rewards, "baseline": ((weight * error).sum() / weight.sum()).expand(len(error))}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        error = residual(self, stats, batch) - batch.columns["baseline"]
        return TrajectoryLoss(error.square(), error)


class OfTheBatch(Objective):
    """The same baseline, of whatever it is called with."""

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        error = residual(self, stats, batch)
        error = error - error.detach().mean()
        return TrajectoryLoss(error.square(), error)


class RewardsOfTheBatch(Objective):
    """Rewards less their mean, over their spread, in whatever it is called with."""

    spread: bool

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        advantage = batch.rewards - batch.rewards.mean()
        if self.spread:
            advantage = advantage / (batch.rewards.std() + 1e-6)
        return TrajectoryLoss(-advantage * segment_sums(stats.logprobs, batch.cu_seqlens), advantage)


class Weighted(Objective):
    """The squared residual, over how likely what sampled it was to do so."""

    @property
    def wants_behaviour(self) -> bool:
        return True

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        error = residual(self, stats, batch)
        weight = segment_sums(stats.logprobs.detach() - batch.behaviour_logprobs, batch.cu_seqlens).exp()
        return TrajectoryLoss(weight * error.square(), error)


class Broken(Objective):
    """Right but for what `how` says."""

    how: str

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        return {"surprise": stats.logprobs} if self.how == "a measure of tokens" else {}

    def columns(self, step: Step) -> Any:
        rewards = {
            "a scalar column": step.rewards.mean(),
            "a column that is not finite": step.rewards / 0,
        }.get(self.how, step.rewards)
        return [rewards] if self.how == "a list of columns" else {"rewards": rewards}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> Any:
        error = residual(self, stats, batch)
        loss = {
            "tokens": stats.logprobs,
            "a scalar": error.square().sum(),
            "detached": error.square().detach(),
            "not finite": error.square() + torch.inf,
        }.get(self.how, error.square())
        return loss if self.how == "no residual" else TrajectoryLoss(loss, error)


def record(path: Path, prompts: list[str]) -> str:
    rng = random.Random(0)
    rows = [{"prompt": p, "response": str(rng.randrange(10**6)), "reward": rng.random()} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first_step(folder: Path, objective: dict[str, Any], tokens: int) -> dict[str, float]:
    config = tiny_config(
        folder,
        objective={"beta": 0.1, **objective},
        trainer__batch_tokens=tokens,
        data__trajectories=record(folder / "recorded.jsonl", ["1", "1", "2", "2", "3", "3", "4", "4"]),
        evaluation={"prompts": 0},
    )
    return Trainer(config).train_step()


def test_a_baseline_over_the_step_is_the_same_whatever_the_micro_batches(tmp_path: Path) -> None:
    name = {"name": f"{__name__}:Baseline"}
    whole, *others = (first_step(tmp_path, name, tokens) for tokens in (4096, 40, 20))
    assert whole["loss"] > 0
    for other in others:
        for key in ("loss", "residual_mean", "grad_norm"):
            assert other[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-5), key


def test_where_nobody_said_what_sampled_a_response_the_policys_own_log_probs_stand_for_it(tmp_path: Path) -> None:
    whole, parts = (first_step(tmp_path, {"name": f"{__name__}:Weighted"}, tokens) for tokens in (4096, 40))
    assert whole["behaviour_unsaid"] == parts["behaviour_unsaid"] == 8
    assert whole["behaviour_gap_mean"] < 1e-6
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-4)
    plain = first_step(tmp_path, {"name": "tba"}, 4096)
    assert not plain.keys() & {"behaviour_unsaid", "behaviour_gap_mean"}  # nobody asked


def test_what_a_file_says_of_what_sampled_a_response_is_what_an_objective_reads(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [5, 6], "response_ids": [7, n], "reward": 0.0} for n in range(8, 12)]
    lines = [json.dumps({**row, "response_logprobs": [-9.0, -9.0 - n]}) for n, row in enumerate(rows)]
    (tmp_path / "said.jsonl").write_text("\n".join([*lines[:3], json.dumps(rows[3])]) + "\n")
    metrics = Trainer(
        tiny_config(
            tmp_path,
            objective={"name": f"{__name__}:Weighted", "beta": 0.1},
            data__trajectories=str(tmp_path / "said.jsonl"),
            rollout={"prompts": 4, "samples": 1},
            evaluation={"prompts": 0},
        )
    ).train_step()
    assert metrics["behaviour_unsaid"] == 1
    # A random model is nearly as likely to say any token: log pi is -4.6, not -9 or less, of six actions of eight.
    assert metrics["behaviour_gap_mean"] == pytest.approx((6 * 9 + 0 + 1 + 2 - 6 * 4.65) / 8, abs=0.3)


@pytest.mark.parametrize("tokens", [4096, 40])
def test_a_loss_that_depends_on_the_micro_batch_is_refused_at_the_first_step(tmp_path: Path, tokens: int) -> None:
    rule = r"test_contract:OfTheBatch cannot be used: its loss of a trajectory changes by .* trainer.batch_tokens.*`columns`"
    with pytest.raises(ObjectiveError, match=rule):
        first_step(tmp_path, {"name": f"{__name__}:OfTheBatch"}, tokens)


@pytest.mark.filterwarnings("ignore:std")  # of a single reward
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("rewards", [[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_a_loss_that_depends_on_the_micro_batch_is_refused_at_the_first_rewards_that_differ(
    rewards: list[float], spread: bool
) -> None:
    """No answer of a task may be right in its first steps; later, the halves of a batch may have the same mean."""
    contract = Contract(RewardsOfTheBatch(name="mine", beta=0.1, spread=spread))
    check(contract, [0.0] * 4)
    with pytest.raises(ObjectiveError, match=r"its loss of a trajectory changes by .* trainer.batch_tokens"):
        check(contract, rewards)


class RatiosOfTheBatch(Objective):
    """A baseline of log-ratios, which are all 0 while the policy is the reference."""

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        ratio = segment_sums(stats.logprobs - batch.ref_logprobs, batch.cu_seqlens)
        error = ratio - ratio.detach().mean() - batch.rewards / self.beta
        return TrajectoryLoss(error.square(), error)


def test_a_loss_that_looks_at_others_log_ratios_is_refused_though_they_are_all_zero(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"its loss of a trajectory changes by .* trainer.batch_tokens"):
        first_step(tmp_path, {"name": f"{__name__}:RatiosOfTheBatch"}, 4096)


def test_an_objective_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = Baseline.__call__
    monkeypatch.setattr(Baseline, "__call__", lambda *given: called.append(1) or real(*given))
    contract = Contract(Baseline(name="mine", beta=0.1))
    for rewards, calls in (([0.0] * 4, 3), ([1.0, 0.0, 0.0, 0.0], 6), ([1.0, 0.0, 0.0, 0.0], 6)):
        check(contract, rewards)
        assert len(called) == calls


def check(contract: Contract, rewards: list[float]) -> None:
    """In a micro-batch with these rewards."""
    torch.manual_seed(0)
    batch = pack([Trajectory([1, 2], [3, 4, 5], reward) for reward in rewards])
    columns = {"rewards": torch.tensor(rewards), "baseline": torch.zeros(len(rewards))}
    ref = torch.randn(len(batch.targets))
    scored = ScoredBatch(
        **vars(batch),
        ref_logprobs=ref,
        ref_values=torch.zeros(len(rewards)),
        behaviour_logprobs=ref,
        columns=columns,
    )
    contract.check(TokenStats(-torch.rand(len(ref)), torch.randn(len(ref)), None), scored)


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("tokens", r"its loss is a tensor \[\d+\]: it must be \[N = 8\], one for each trajectory"),
        ("a scalar", r"its loss is a tensor \[\]: it must be \[N = 8\]"),
        ("detached", "its loss does not depend on the statistics"),
        ("not finite", "its loss is not finite, of statistics and columns that are"),
        ("no residual", r"it returned a tensor \[8\]: it must return TrajectoryLoss"),
        ("a scalar column", r"columns gave 'rewards' as a tensor \[\]: it must be \[N = 8\]"),
        ("a list of columns", "columns returned a list: it must return a dict"),
        ("a column that is not finite", "columns gave 'rewards' that is not finite"),
        ("a measure of tokens", r"measure gave 'surprise' as a tensor \[\d+\]: it must be \[N = 8\]"),
    ],
)
def test_a_broken_rule_is_named_with_the_objective(tmp_path: Path, how: str, rule: str) -> None:
    with pytest.raises(ObjectiveError, match=rf"objective.name: {__name__}:Broken cannot be used: {rule}"):
        first_step(tmp_path, {"name": f"{__name__}:Broken", "how": how}, 4096)


def test_rewards_less_their_own_mean_are_refused(tmp_path: Path) -> None:
    centred = {"name": "reval", "beta": 0.1, "centre_rewards": True}
    with pytest.raises(ConfigError, match=r"objective.centre_rewards is true .* rollout.samples is 1"):
        tiny_config(tmp_path, objective=centred, rollout__samples=1)
    file = record(tmp_path / "recorded.jsonl", ["1", "2", "3"])
    recorded = tiny_config(tmp_path, objective=centred, rollout__samples=1, data__trajectories=file)
    with pytest.raises(ConfigError, match=r"objective.centre_rewards is true .* one response to each prompt"):
        Trainer(recorded)
    record(tmp_path / "recorded.jsonl", ["1", "2", "3", "3"])
    Trainer(recorded)
