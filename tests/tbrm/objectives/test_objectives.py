"""The objectives on a problem whose optimum is known exactly, and by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tbrm.config.recipe import parse_config
from tbrm.config.section import ConfigError
from tbrm.objectives import OBJECTIVES, Objective, Step
from tbrm.training.resume import differences
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats
from tests.tbrm.conftest import tiny_tree

VOCABULARY, HORIZON, BETA = 4, 3, 0.5
STATES = [prefix for h in range(HORIZON) for prefix in itertools.product(range(VOCABULARY), repeat=h)]
INDEX = {prefix: i for i, prefix in enumerate(STATES)}


class Tree:
    """An autoregressive tree: a state is the tokens so far, and a random reward awaits at each leaf."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rewards = {leaf: self._random().item() for leaf in itertools.product(range(VOCABULARY), repeat=HORIZON)}
        self.reference = self._random(len(STATES), VOCABULARY)  # logits
        self.behaviour = (self._random(len(STATES), VOCABULARY) / 2).softmax(
            -1
        )  # neither the reference nor the optimum

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def sample(self, count: int) -> list[Trajectory]:
        """Trajectories of the behaviour policy."""
        leaves = list(self.rewards)
        chances = [
            math.prod(self.behaviour[INDEX[leaf[:h]], leaf[h]].item() for h in range(HORIZON)) for leaf in leaves
        ]
        drawn = torch.multinomial(torch.tensor(chances), count, replacement=True, generator=self.generator)
        return [Trajectory([0], list(leaves[i]), self.rewards[leaves[i]]) for i in drawn]

    def optimum(self) -> tuple[Tensor, float]:
        """The policy that maximises E[R] - BETA KL(pi || pi_ref), by backward induction, [states, vocabulary]; and V(s_1)."""
        log_reference = self.reference.log_softmax(-1)
        policy = torch.zeros_like(log_reference)
        value: dict[tuple[int, ...], Tensor] = {}
        for state in reversed(STATES):
            children = [(*state, a) for a in range(VOCABULARY)]
            after = torch.stack([value[c] if c in value else torch.tensor(self.rewards[c] / BETA) for c in children])
            q = log_reference[INDEX[state]] + after
            value[state] = q.logsumexp(0)
            policy[INDEX[state]] = q.softmax(0)
        return policy, value[()].item()


def tabular_stats(logits: Tensor, trajectories: list[Trajectory]) -> TokenStats:
    states = torch.tensor([INDEX[tuple(t.response_ids[:h])] for t in trajectories for h in range(HORIZON)])
    actions = torch.tensor([a for t in trajectories for a in t.response_ids])
    lse = logits[states].logsumexp(-1)
    return TokenStats(logits[states, actions] - lse, lse, None)


def batch_of(tree: Tree, trajectories: list[Trajectory]) -> ScoredBatch:
    reference = tabular_stats(tree.reference, trajectories)
    rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
    return ScoredBatch(
        **vars(pack(trajectories)),
        ref_logprobs=reference.logprobs,
        ref_values=reference.lse[::HORIZON],
        behaviour_logprobs=tabular_stats(tree.behaviour.log(), trajectories).logprobs,
        columns={"rewards": rewards},
    )


def with_rewards(batch: ScoredBatch, rewards: Tensor) -> ScoredBatch:
    return dataclasses.replace(batch, columns={"rewards": rewards})


def rewards_of(objective: Objective, rewards: Tensor, groups: Tensor, **measured: Tensor) -> Tensor:
    lengths = torch.full_like(groups, HORIZON)
    return objective.columns(Step(rewards, groups, lengths, measured))["rewards"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "options"), [("tbrm", {}), ("tbrm", {"reward_offset": 2.0}), ("reval", {}), ("brm", {})]
)
def test_zero_loss_is_the_optimal_policy(name: str, options: dict[str, float], seed: int) -> None:
    tree = Tree(seed)
    trajectories = tree.sample(4096)
    assert len({tuple(t.response_ids) for t in trajectories}) == VOCABULARY**HORIZON
    batch = batch_of(tree, trajectories)
    objective = OBJECTIVES(name)(name=name, beta=BETA, **options)
    batch = with_rewards(batch, batch.rewards + objective.reward_offset)  # as the trainer adds it

    logits = torch.zeros(len(STATES), VOCABULARY, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe")  # fmt: skip  # noqa: E501

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(tabular_stats(logits, trajectories), batch).loss.mean()
        loss.backward()
        return loss

    start = closure().item()
    optimizer.step(closure)
    assert start > 0.1
    assert closure().item() < 1e-8
    optimum, value = tree.optimum()
    policy = logits.detach().softmax(-1)
    total_variation = 0.5 * (policy - optimum).abs().sum(-1)
    assert total_variation.max() < 1e-3
    if name == "tbrm":  # V(s_1) at the optimum: the value of the problem, and what an offset adds to it
        raised = value + objective.reward_offset / BETA
        assert logits.detach()[INDEX[()]].logsumexp(-1).item() == pytest.approx(raised, abs=1e-3)
    # The test means something only if the optimum is neither of the policies that we began with.
    for other in (tree.behaviour, tree.reference.softmax(-1), torch.full_like(optimum, 1 / VOCABULARY)):
        assert (0.5 * (other - optimum).abs().sum(-1)).max() > 0.1


def residuals_by_hand(tree: Tree, logits: Tensor, trajectory: Trajectory) -> tuple[float, float, list[float]]:
    """The residuals of tbrm and reval, and brm's per token, straight from DESIGN's equations."""
    states = [INDEX[tuple(trajectory.response_ids[:h])] for h in range(HORIZON)]
    logp = [logits[s].log_softmax(-1)[a].item() for s, a in zip(states, trajectory.response_ids, strict=True)]
    ref = [tree.reference[s].log_softmax(-1)[a].item() for s, a in zip(states, trajectory.response_ids, strict=True)]
    values = [logits[s].logsumexp(-1).item() for s in states] + [0.0]
    tbrm = values[0] + sum(logp) - sum(ref) - trajectory.reward / BETA
    q = [logits[s][a].item() for s, a in zip(states, trajectory.response_ids, strict=True)]
    steps = [
        q[h] - ref[h] - (trajectory.reward / BETA if h == HORIZON - 1 else 0.0) - values[h + 1] for h in range(HORIZON)
    ]
    return tbrm, tbrm - tree.reference[INDEX[()]].logsumexp(-1).item(), steps


def test_residuals_are_those_of_the_equations() -> None:
    tree = Tree(7)
    trajectories = tree.sample(5)
    batch = batch_of(tree, trajectories)
    logits = tree._random(len(STATES), VOCABULARY)
    stats = tabular_stats(logits, trajectories)
    results = {name: OBJECTIVES(name)(name=name, beta=BETA)(stats, batch) for name in ("tbrm", "reval", "brm")}
    for i, trajectory in enumerate(trajectories):
        tbrm, reval, steps = residuals_by_hand(tree, logits, trajectory)
        assert results["tbrm"].residual[i].item() == pytest.approx(tbrm)
        assert results["tbrm"].loss[i].item() == pytest.approx(tbrm**2)
        assert results["reval"].residual[i].item() == pytest.approx(reval)
        assert results["brm"].loss[i].item() == pytest.approx(sum(r**2 for r in steps))
        assert results["brm"].residual[i].item() == pytest.approx(tbrm)  # the token residuals telescope


def test_brm_with_uneven_and_empty_trajectories() -> None:
    """The last action of one trajectory must not see the value of the first state of the next."""
    items = [Trajectory([1], [2, 3], 1.0), Trajectory([1], [], 5.0), Trajectory([1], [2], 0.5)]
    logprobs, lse = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([4.0, 5.0, 6.0])
    columns = {"rewards": torch.tensor([item.reward for item in items])}
    zeros = torch.zeros(3)
    batch = ScoredBatch(
        **vars(pack(items)), ref_logprobs=zeros, ref_values=zeros, behaviour_logprobs=zeros, columns=columns
    )
    result = OBJECTIVES("brm")(name="brm", beta=0.5)(TokenStats(logprobs, lse, None), batch)
    first = [(4 - 1) - 5, (5 - 2) - 1.0 / 0.5]
    assert result.loss.tolist() == [first[0] ** 2 + first[1] ** 2, 0.0, (6 - 3 - 0.5 / 0.5) ** 2]


def test_reval_centres_rewards_on_their_group() -> None:
    reval = OBJECTIVES("reval")(name="reval", beta=1.0, centre_rewards=True)
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([70, 3, 70, 3, 5])
    assert rewards_of(reval, rewards, groups).tolist() == [0.5, -0.5, -0.5, 0.5, 0.0]
    plain = OBJECTIVES("reval")(name="reval", beta=1.0)
    assert torch.equal(rewards_of(plain, rewards, groups), rewards)


def test_tba_has_the_gradient_of_the_variance_over_each_group() -> None:
    """log Z may be detached: VarGrad's gradient is that of the sum of squares about the group's mean."""
    tree = Tree(5)
    trajectories = tree.sample(12)
    batch = batch_of(tree, trajectories)
    groups = torch.tensor([0, 1, 2] * 4)
    tba = OBJECTIVES("tba")(name="tba", beta=BETA)
    logits = tree._random(len(STATES), VOCABULARY).requires_grad_()

    def errors() -> Tensor:
        ratios = tabular_stats(logits, trajectories).logprobs - batch.ref_logprobs
        return ratios.view(-1, HORIZON).sum(1) - batch.rewards / BETA

    stats = tabular_stats(logits, trajectories)
    measured = {name: column.detach() for name, column in tba.measure(stats, batch).items()}
    result = tba(stats, with_rewards(batch, rewards_of(tba, batch.rewards, groups, **measured)))
    assert all(abs(result.residual[groups == g].sum().item()) < 1e-9 for g in range(3))
    [ours] = torch.autograd.grad(result.loss.sum(), logits)

    about_mean = torch.cat([errors()[groups == g] - errors()[groups == g].mean() for g in range(3)])
    [wanted] = torch.autograd.grad(about_mean.square().sum(), logits)
    assert torch.allclose(ours, wanted, atol=1e-9)
    assert wanted.abs().max() > 0.1


def test_reinforce_is_the_gradient_of_reward_less_kl() -> None:
    """The expectation over all trajectories of the policy itself, against autograd through E[R] - beta KL."""
    tree = Tree(3)
    leaves = list(tree.rewards)
    trajectories = [Trajectory([0], list(leaf), tree.rewards[leaf], group=i) for i, leaf in enumerate(leaves)]
    batch = batch_of(tree, trajectories)
    reinforce = OBJECTIVES("reinforce")(name="reinforce", beta=BETA)
    logits = tree._random(len(STATES), VOCABULARY).requires_grad_()

    def chances() -> Tensor:
        return tabular_stats(logits, trajectories).logprobs.view(-1, HORIZON).sum(1).exp()

    shaped = rewards_of(reinforce, batch.rewards, torch.arange(len(leaves)))
    assert shaped.mean().abs() < 1e-12
    loss = reinforce(tabular_stats(logits, trajectories), with_rewards(batch, shaped)).loss
    [ours] = torch.autograd.grad((chances().detach() * loss).sum(), logits)

    p = chances()
    log_ref = batch.ref_logprobs.view(-1, HORIZON).sum(1)
    target = (p * (batch.rewards - BETA * (p.log() - log_ref))).sum()
    [wanted] = torch.autograd.grad(-target, logits)
    assert torch.allclose(ours, wanted, atol=1e-12)
    assert wanted.abs().max() > 0.01


def test_reinforce_compares_with_the_group_or_with_the_step() -> None:
    reinforce = OBJECTIVES("reinforce")(name="reinforce", beta=1.0)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert rewards_of(reinforce, rewards, torch.tensor([7, 7, 3, 3])).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert rewards_of(reinforce, rewards, torch.tensor([1, 2, 3, 4])).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert rewards_of(reinforce, torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("preset", "value"), [("reval", "reference"), ("tba", "mean"), ("optimal", "optimal"), ("tbrm", "network")]
)
def test_a_preset_is_tbrm_with_another_value_and_its_own_recipes_go_on(tmp_path: Path, preset: str, value: str) -> None:
    """As a config.yaml from before there was `objective.value` has it: nothing was changed."""
    old = {"name": preset, "beta": 0.1, "reward_offset": 0.0, "reset_reference_every": 0}
    config = parse_config(tiny_tree(tmp_path, objective=old))
    assert config.objective.value == value
    assert not [key for key in differences(tiny_tree(tmp_path, objective=old), config) if key.startswith("objective.")]

    tree = Tree(5)
    trajectories = tree.sample(12)
    batch, stats = batch_of(tree, trajectories), tabular_stats(tree.behaviour.log(), trajectories)
    groups, found = torch.tensor([0, 1, 2] * 4), []
    for objective in (config.objective, OBJECTIVES("tbrm")(name="tbrm", beta=0.1, value=value)):
        measured = objective.measure(stats, batch) if objective.measures else {}
        found.append(objective(stats, with_rewards(batch, rewards_of(objective, batch.rewards, groups, **measured))))
    assert torch.equal(found[0].residual, found[1].residual) and torch.equal(found[0].loss, found[1].loss)


def test_a_preset_takes_no_other_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective.value: got 'optimal' .* wants: input should be 'mean'"):
        parse_config(tiny_tree(tmp_path, objective={"name": "tba", "beta": 0.1, "value": "optimal"}))


class Halved(OBJECTIVES("tbrm")):  # type: ignore[misc]
    """A user's objective: the squared residual, times a factor of its own."""

    factor: float = 0.5

    def __call__(self, stats: TokenStats, batch: ScoredBatch):
        result = super().__call__(stats, batch)
        return result._replace(loss=self.factor * result.loss)


def test_a_users_objective_is_found_by_import_path(tmp_path) -> None:
    tree = tiny_tree(tmp_path)
    tree["objective"] = {"name": f"{__name__}:Halved", "beta": 0.1, "factor": 0.25}
    objective = parse_config(tree).objective
    assert isinstance(objective, Objective)
    assert objective.factor == 0.25
    tree["objective"]["factr"] = 1.0
    with pytest.raises(ConfigError, match=r"objective.factr: unknown key .* did you mean objective.factor"):
        parse_config(tree)
