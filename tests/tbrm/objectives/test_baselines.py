"""Baselines made of the whole step: the value of least variance, and the mean of the other responses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbrm.objectives import OBJECTIVES, Objective, Step
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.objectives.test_objectives import (
    BETA,
    HORIZON,
    STATES,
    VOCABULARY,
    Tree,
    batch_of,
    rewards_of,
    tabular_stats,
)

GROUPS = torch.tensor([0, 1, 2] * 4)


class Case:
    """Twelve responses to a tree, and a policy that is near none of tree, reference and behaviour."""

    def __init__(self, seed: int = 5) -> None:
        tree = Tree(seed)
        self.trajectories = tree.sample(12)
        self.batch = batch_of(tree, self.trajectories)
        self.logits = tree._random(len(STATES), VOCABULARY).requires_grad_()

    def run(self, objective: Objective, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The residuals, and the gradient of the summed loss by the logits."""
        stats = tabular_stats(self.logits, self.trajectories)
        measured = {name: column.detach() for name, column in objective.measure(stats, self.batch).items()}
        columns = objective.columns(Step(self.batch.rewards, groups, torch.full_like(groups, HORIZON), measured))
        batch = ScoredBatch(**{**vars(self.batch), "columns": columns})
        result = objective(stats, batch)
        [gradient] = torch.autograd.grad(result.loss.sum(), self.logits)
        return result.residual.detach(), gradient

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """sum log pi of each response, its log-ratio to the reference, and sum (1 - pi)."""
        logprobs = tabular_stats(self.logits, self.trajectories).logprobs.view(-1, HORIZON)
        log_ratio = logprobs.sum(1) - self.batch.ref_logprobs.view(-1, HORIZON).sum(1)
        return logprobs.sum(1), log_ratio, (1 - logprobs.exp()).sum(1)


def test_the_optimal_value_is_the_weighted_mean_over_the_step() -> None:
    case = Case()
    _, log_ratio, weights = case.parts()
    raw = log_ratio - case.batch.rewards / BETA
    b = ((weights * raw).sum() / weights.sum()).detach()
    [wanted] = torch.autograd.grad((raw - b).square().sum(), case.logits)
    for groups in (GROUPS, torch.arange(12)):
        residual, ours = case.run(OBJECTIVES("optimal")(name="optimal", beta=BETA), groups)
        assert torch.allclose(residual, (raw - b).detach(), atol=1e-9)
        assert torch.allclose(ours, wanted, atol=1e-9)
    assert (b - raw.mean()).abs() > 0.05  # it is not the plain mean


@pytest.mark.parametrize("seed", range(5))
def test_the_optimal_value_has_the_least_variance_that_a_value_can_have(seed: int) -> None:
    """With the exact squared norms in place of sum (1 - pi): over all responses of the policy itself the gradient's variance is
    smallest there, and sum (1 - pi) comes nearer to it than the plain mean."""
    tree = Tree(seed)
    leaves = list(tree.rewards)
    trajectories = [Trajectory([0], list(leaf), tree.rewards[leaf]) for leaf in leaves]
    batch = batch_of(tree, trajectories)
    logits = (2 * tree._random(len(STATES), VOCABULARY)).requires_grad_()
    logprobs = tabular_stats(logits, trajectories).logprobs.view(-1, HORIZON)
    chances = logprobs.sum(1).exp().detach()
    scores = torch.stack([torch.autograd.grad(row.sum(), logits, retain_graph=True)[0].flatten() for row in logprobs])
    raw = (logprobs.sum(1) - batch.ref_logprobs.view(-1, HORIZON).sum(1) - batch.rewards / BETA).detach()

    def variance(b: Tensor) -> float:
        gradients = (raw - b)[:, None] * scores
        mean = (chances[:, None] * gradients).sum(0)
        return (chances * (gradients - mean).square().sum(1)).sum().item()

    def mean(weights: Tensor) -> Tensor:
        return (chances * weights * raw).sum() / (chances * weights).sum()

    exact, ours, plain = (
        mean(scores.square().sum(1)),
        mean((1 - logprobs.exp()).sum(1).detach()),
        mean(torch.ones_like(raw)),
    )
    assert variance(exact) < min(variance(exact + 0.1), variance(exact - 0.1))
    assert variance(exact) <= variance(ours) < variance(plain)


def test_a_step_of_sure_responses_or_of_none_has_a_value() -> None:
    optimal = OBJECTIVES("optimal")(name="optimal", beta=1.0)
    rewards, zeros = torch.tensor([1.0, 0.0]), torch.zeros(2)
    assert rewards_of(optimal, rewards, torch.arange(2), log_ratio=zeros, weight=zeros).tolist() == [0.5, -0.5]
    none = torch.zeros(0)
    assert rewards_of(optimal, none, torch.zeros(0, dtype=torch.int64), log_ratio=none, weight=none).tolist() == []


@pytest.mark.parametrize("groups", [GROUPS, torch.arange(12)], ids=["groups of four", "one response each"])
def test_rloo_takes_off_the_mean_of_the_others(groups: Tensor) -> None:
    case = Case()
    rloo = OBJECTIVES("rloo")(name="rloo", beta=BETA)
    sums, log_ratio, _ = case.parts()
    shaped = (case.batch.rewards - BETA * log_ratio).detach()
    same = groups if len(groups.unique()) < len(groups) else torch.zeros(12, dtype=torch.int64)
    advantage = torch.stack(
        [
            shaped[i] - torch.stack([shaped[j] for j in range(12) if j != i and same[j] == same[i]]).mean()
            for i in range(12)
        ]
    )
    residual, ours = case.run(rloo, groups)
    [wanted] = torch.autograd.grad(-(advantage * sums).sum(), case.logits)
    assert torch.allclose(ours, wanted, atol=1e-9)
    assert torch.allclose(residual, -advantage / BETA, atol=1e-9)


def test_rloo_knows_nothing_of_a_response_that_is_alone_among_groups() -> None:
    rloo = OBJECTIVES("rloo")(name="rloo", beta=1.0)
    step = Step(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([1, 1, 2]), torch.ones(3), {"log_ratio": torch.zeros(3)})
    assert rloo.columns(step)["advantage"].tolist() == [1.0, -1.0, 0.0]
