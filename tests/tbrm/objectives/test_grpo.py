"""GRPO and its family against the published equations, token by token in float64, with gradients from full logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm.objectives import OBJECTIVES, Step
from tbrm.objectives.clipped import ClippedRatio
from tbrm.objectives.contract import Contract
from tbrm.objectives.grpo import Grpo
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats
from tests.tbrm.objectives.test_contract import first_step

LENGTHS = [1, 4, 2, 3, 2, 5]
GROUPS = [7, 3, 7, 3, 7, 3]
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0]
VOCABULARY = 5


class Case:
    """Six responses to two problems, and a policy that what sampled them, and the reference, are not."""

    def __init__(self, rewards: list[float] = REWARDS, groups: list[int] = GROUPS) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rewards, self.groups = rewards, groups
        self.tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=generator)
        self.logits = torch.randn(sum(LENGTHS), VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        at = self.logits.detach().log_softmax(-1).gather(1, self.tokens[:, None])[:, 0]
        self.ref, self.behaviour = (
            at + scale * torch.randn(len(at), generator=generator, dtype=torch.float64) for scale in (0.5, 0.3)
        )
        self.bounds = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]

    def batch(self, objective: ClippedRatio, **extra: Any) -> ScoredBatch:
        split = [self.tokens[a:b].tolist() for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        items = [Trajectory([0], ids, reward) for ids, reward in zip(split, self.rewards, strict=True)]
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        step = Step(rewards, torch.tensor(self.groups), torch.tensor(LENGTHS), {})
        return ScoredBatch(
            **vars(pack(items)),
            ref_logprobs=self.ref,
            ref_values=rewards,
            behaviour_logprobs=self.behaviour,
            columns=objective.columns(step),
            **extra,
        )

    def ours(self, objective: ClippedRatio, **extra: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The mean loss, its gradient by the logits, and the figures."""
        contract, batch = Contract(objective), self.batch(objective, **extra)
        lse = self.logits.logsumexp(-1)
        stats = TokenStats(self.logits.gather(1, self.tokens[:, None])[:, 0] - lse, lse, None)
        contract.check(TokenStats(stats.logprobs.detach(), lse.detach(), None), batch)
        loss = contract(stats, batch).loss.mean()
        [gradient] = torch.autograd.grad(loss, self.logits)
        figures = {name: (f.sum() / sum(LENGTHS)).item() for name, f in contract.figures(stats, batch).items()}
        return loss.detach(), gradient, figures

    def token(self, i: int, t: int) -> tuple[Tensor, float, float]:
        """log pi of token t of response i, log mu, log pi_ref."""
        row = self.bounds[i] + t
        chosen = self.logits[row].softmax(-1)[self.tokens[row]].log()
        return chosen, self.behaviour[row].item(), self.ref[row].item()

    def advantage(self, i: int, *, std: bool) -> float:
        members = [r for r, group in zip(self.rewards, self.groups, strict=True) if group == self.groups[i]]
        mean = sum(members) / len(members)
        spread = math.sqrt(sum((r - mean) ** 2 for r in members) / (len(members) - 1))
        return (self.rewards[i] - mean) / (spread + 1e-6) if std else self.rewards[i] - mean


def clipped(ratio: Tensor, low: float, high: float) -> Tensor:
    return torch.min(
        torch.max(ratio, torch.tensor(1 - low, dtype=ratio.dtype)), torch.tensor(1 + high, dtype=ratio.dtype)
    )


def grpo(case: Case, objective: Grpo) -> Tensor:
    """DeepSeekMath, equations 3 and 4: mean over responses of the mean over their tokens."""
    found = []
    for i, length in enumerate(LENGTHS):
        advantage, terms = case.advantage(i, std=True), []
        for t in range(length):
            chosen, mu, ref = case.token(i, t)
            r = (chosen - mu).exp()
            surrogate = torch.min(r * advantage, clipped(r, objective.clip_low, objective.clip_high) * advantage)
            kl = (ref - chosen).exp() - (ref - chosen) - 1
            terms.append(surrogate - objective.beta * kl)
        found.append(sum(terms) / length)
    return -sum(found) / len(found)


def dapo(case: Case, objective: Grpo) -> Tensor:
    """DAPO, equation 8: over all tokens alike, clipped higher above, no penalty."""
    terms = []
    for i, length in enumerate(LENGTHS):
        advantage = case.advantage(i, std=True)
        for t in range(length):
            chosen, mu, _ = case.token(i, t)
            r = (chosen - mu).exp()
            terms.append(torch.min(r * advantage, clipped(r, objective.clip_low, objective.clip_high) * advantage))
    return -sum(terms) / sum(LENGTHS)


def dr_grpo(case: Case, objective: Grpo) -> Tensor:
    """Dr. GRPO: no deviation, no length of the response's own."""
    found = []
    for i, length in enumerate(LENGTHS):
        advantage, terms = case.advantage(i, std=False), []
        for t in range(length):
            chosen, mu, _ = case.token(i, t)
            r = (chosen - mu).exp()
            terms.append(torch.min(r * advantage, clipped(r, objective.clip_low, objective.clip_high) * advantage))
        found.append(sum(terms) / objective.constant_length)
    return -sum(found) / len(found)


def gspo(case: Case, objective: Grpo) -> Tensor:
    """GSPO, equations 5 and 7: s = (pi(y|x) / mu(y|x))^(1/|y|), clipped as a whole."""
    found = []
    for i, length in enumerate(LENGTHS):
        chosen, mu, _ = zip(*(case.token(i, t) for t in range(length)), strict=True)
        s = ((sum(chosen) - sum(mu)) / length).exp()
        advantage = case.advantage(i, std=True)
        found.append(torch.min(s * advantage, clipped(s, objective.clip_low, objective.clip_high) * advantage))
    return -sum(found) / len(found)


def cispo(case: Case, objective: Grpo) -> Tensor:
    """MiniMax-M1, equations 4 and 5: the ratio is a weight, cut off above, on log pi."""
    terms = []
    for i, length in enumerate(LENGTHS):
        advantage = case.advantage(i, std=True)
        for t in range(length):
            chosen, mu, _ = case.token(i, t)
            r = (chosen - mu).exp().detach()
            terms.append(clipped(r, objective.clip_low, objective.clip_high) * advantage * chosen)
    return -sum(terms) / sum(LENGTHS)


FAMILY: dict[Any, dict[str, Any]] = {
    grpo: {"beta": 0.04},
    dapo: {"aggregate": "token", "clip_high": 0.28},
    dr_grpo: {"aggregate": "constant", "constant_length": 8, "divide_by_std": False},
    gspo: {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.02},
    cispo: {"ratio": "cispo", "aggregate": "token", "clip_low": 1.0, "clip_high": 0.1},
}


@pytest.mark.parametrize("equation", FAMILY, ids=lambda equation: equation.__name__)
def test_the_family_is_as_published(equation: Any) -> None:
    case = Case()
    objective = OBJECTIVES("grpo")(name="grpo", **FAMILY[equation])
    loss, gradient, figures = case.ours(objective)
    wanted = equation(case, objective)
    [by_logits] = torch.autograd.grad(wanted, case.logits)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert torch.allclose(gradient, by_logits, atol=1e-12)
    assert by_logits.abs().max() > 1e-3
    assert 0 < figures["clip_fraction"] < 1  # on both sides of the clip


def test_importance_weighs_what_is_learnt_and_not_the_penalty() -> None:
    """Truncated importance sampling: the surrogate of each token, clipped to the policy of the rollout, times its weight."""
    case = Case()
    objective = OBJECTIVES("grpo")(name="grpo", beta=0.04)
    old = case.behaviour + torch.linspace(-1, 1, len(case.behaviour), dtype=torch.float64)
    weights = (old - case.behaviour).exp().clamp(max=1.5)
    loss, gradient, _ = case.ours(objective, own_old_logprobs=old, importance=weights)
    wanted = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        advantage = case.advantage(i, std=True)
        for t in range(length):
            chosen, mu, ref = case.token(i, t)
            pi_old = old[case.bounds[i] + t].item()
            r = (chosen - pi_old).exp()
            surrogate = torch.min(r * advantage, clipped(r, 0.2, 0.2) * advantage)
            kl = (ref - chosen).exp() - (ref - chosen) - 1
            wanted = wanted - (min(math.exp(pi_old - mu), 1.5) * surrogate - 0.04 * kl) / length / len(LENGTHS)
    [by_logits] = torch.autograd.grad(wanted, case.logits)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert torch.allclose(gradient, by_logits, atol=1e-12)


def test_figures_are_means_over_tokens() -> None:
    case = Case()
    _, _, figures = case.ours(OBJECTIVES("grpo")(name="grpo"))
    clips, ratios, kls = [], [], []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            chosen, mu, _ = case.token(i, t)
            ratio = math.exp(chosen.item() - mu)
            ratios.append(ratio)
            kls.append(ratio - 1 - math.log(ratio))
            up = case.advantage(i, std=True) > 0
            clips.append(ratio > 1.2 if up else ratio < 0.8)
    tokens = sum(LENGTHS)
    wanted = {"clip_fraction": sum(clips), "ratio_mean": sum(ratios), "behaviour_kl": sum(kls)}
    assert figures == pytest.approx({name: total / tokens for name, total in wanted.items()})


def test_a_group_without_a_difference_gives_no_gradient() -> None:
    """0.1 is no float: rounding, over a deviation that is rounding too, must not be taken for a signal."""
    rewards = torch.tensor([0.1] * 7)
    step = Step(rewards, torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.int64), {})
    assert OBJECTIVES("grpo")(name="grpo").columns(step)["advantage"].abs().max() < 1e-6


def test_one_response_to_each_problem_is_compared_with_the_step_and_one_alone_with_nothing() -> None:
    objective = OBJECTIVES("grpo")(name="grpo", divide_by_std=False)
    rewards, lengths = torch.tensor([1.0, 0.0, 0.0]), torch.ones(3, dtype=torch.int64)
    of_step = objective.columns(Step(rewards, torch.tensor([5, 6, 7]), lengths, {}))["advantage"]
    assert of_step.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    scaled = OBJECTIVES("grpo")(name="grpo").columns(Step(rewards, torch.tensor([5, 5, 7]), lengths, {}))
    assert scaled["advantage"].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0], rel=1e-5)


def test_a_token_that_what_sampled_it_had_thought_impossible_leaves_a_finite_gradient() -> None:
    case = Case()
    case.behaviour[3] = -1000.0
    for ratio in ("token", "sequence", "cispo"):
        loss, gradient, _ = case.ours(OBJECTIVES("grpo")(name="grpo", ratio=ratio))
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_a_mean_over_the_steps_tokens_is_the_same_whatever_the_micro_batches(tmp_path: Path) -> None:
    settings = {"name": "grpo", "aggregate": "token"}
    whole, parts = (first_step(tmp_path, settings, tokens) for tokens in (4096, 20))
    assert whole["grad_norm"] > 0
    for key in ("loss", "grad_norm", "ratio_mean", "behaviour_kl", "clip_fraction"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
    assert whole["ratio_mean"] == pytest.approx(1.0)  # of a file that does not say what sampled it


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("lengths", [[0, 3], [0, 0]])
def test_a_response_whose_actions_are_all_masked_weighs_something_finite(aggregate: str, lengths: list[int]) -> None:
    """0 x inf would be in the gradient of all."""
    step = Step(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor(lengths), {})
    weight = Grpo(name="grpo", aggregate=aggregate).columns(step)["weight"]
    assert weight.isfinite().all() and (weight > 0).all()
