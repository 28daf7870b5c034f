"""PPO against the published equations, in float64, with gradients from full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbrm.objectives import OBJECTIVES
from tests.tbrm.objectives.test_grpo import LENGTHS, Case, clipped


def test_advantages_are_generalised_advantage_estimates() -> None:
    """Schulman et al., 2016, equation 16, as the sum that it is."""
    ppo = OBJECTIVES("ppo")(name="ppo", discount=0.9, gae=0.7)
    values, reward = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64), 2.0
    v = [*values.tolist(), 0.0]
    deltas = [(reward if h == 3 else 0.0) + 0.9 * v[h + 1] - v[h] for h in range(4)]
    wanted = [sum((0.9 * 0.7) ** (later - h) * deltas[later] for later in range(h, 4)) for h in range(4)]
    advantages, returns = ppo.estimate(values, reward)
    assert advantages.tolist() == pytest.approx(wanted)
    assert returns.tolist() == pytest.approx([a + b for a, b in zip(wanted, v[:4], strict=True)])
    monte_carlo, to_learn = OBJECTIVES("ppo")(name="ppo").estimate(values, reward)
    assert monte_carlo.tolist() == pytest.approx([reward - value for value in v[:4]])
    assert to_learn.tolist() == pytest.approx([reward] * 4)


def test_each_token_has_an_advantage_of_its_own_and_all_tokens_count_alike() -> None:
    case = Case()
    objective = OBJECTIVES("ppo")(name="ppo", beta=0.02, clip_high=0.3)
    tokens = sum(LENGTHS)
    advantage = torch.linspace(-2, 2, tokens, dtype=torch.float64)[
        torch.arange(tokens) * 5 % tokens
    ]  # in another order
    loss, gradient, figures = case.ours(objective, of_actions={"advantage": advantage})
    terms: list[Tensor] = []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            chosen, mu, ref = case.token(i, t)
            a, r = advantage[case.bounds[i] + t], (chosen - mu).exp()
            surrogate = torch.min(r * a, clipped(r, 0.2, 0.3) * a)
            terms.append(surrogate - 0.02 * ((ref - chosen).exp() - (ref - chosen) - 1))
    wanted = -torch.stack(terms).mean()
    [by_logits] = torch.autograd.grad(wanted, case.logits)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert torch.allclose(gradient, by_logits, atol=1e-12)
    assert 0 < figures["clip_fraction"] < 1


def test_the_critics_loss_is_clipped_about_its_old_values() -> None:
    case = Case()
    ppo = OBJECTIVES("ppo")(name="ppo", value_clip=0.5)
    old = torch.zeros(4, dtype=torch.float64)
    returns = torch.tensor([2.0, 2.0, 0.1, -1.0], dtype=torch.float64)
    values = torch.tensor([0.2, 0.9, 0.9, 0.9], dtype=torch.float64, requires_grad=True)
    batch = case.batch(ppo, of_actions={"old_value": old, "return": returns, "advantage": old})
    loss = ppo.value_loss(values, batch)
    # The larger of two squares: the clipped one, which has no gradient, where the value has gone far enough towards the return.
    assert loss.tolist() == pytest.approx([1.8**2 / 2, 1.5**2 / 2, 0.8**2 / 2, 1.9**2 / 2])
    [gradient] = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([-1.8, 0.0, 0.8, 1.9])
