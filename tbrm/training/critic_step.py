"""What a critic takes part in, step by step: values of a rollout as it comes in, advantages, and learning beside the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tbrm.config.schema import Config
from tbrm.objectives.ppo import Ppo
from tbrm.parallel import World
from tbrm.policy.critic import Critic
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.policy.sharding import accumulate
from tbrm.training.each_action import of_rollout
from tbrm.training.optimizer import Part
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.trajectory import Trajectory


class CriticStep:
    """All processes call it together."""

    def __init__(self, critic: Critic, objective: Ppo, max_tokens: int, world: World) -> None:
        self.critic = critic
        self._objective = objective
        self._max_tokens = max_tokens
        self._world = world
        self._actions = 0
        """Of the step, on all processes."""
        self._sums = torch.zeros(4, dtype=torch.float64, device=critic.backbone.device)

    def score(self, trajectories: Sequence[Trajectory]) -> None:
        """Keeps with those of a rollout that has just come in what the critic says of each action's state."""
        new = [t for t in trajectories if t.old_values is None]
        found = of_rollout(self.critic, self.critic.backbone, new, self._max_tokens, self._world)
        for trajectory, values in zip(new, found, strict=True):
            trajectory.old_values = values

    def of_actions(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Tensor]]:
        """Of each of the step's trajectories, [H] each: the scaled `advantage`, the `return` and the `old_value`."""
        old = [t.old_values for t in trajectories if t.old_values is not None]
        self._actions = sum(map(len, old))
        offset = self._objective.reward_offset
        made = [
            self._objective.estimate(values, t.reward + offset) for t, values in zip(trajectories, old, strict=True)
        ]
        if not made:
            return []
        every = torch.cat([advantages for advantages, _ in made]).double()
        mean, deviation = every.mean(), every.std(correction=0)
        return [
            {"advantage": ((advantages - mean) / (deviation + 1e-6)).float(), "return": returns, "old_value": values}
            for (advantages, returns), values in zip(made, old, strict=True)
        ]

    def add_gradients(self, batch: ScoredBatch, *, reduce: bool) -> None:
        """Adds the batch's part of the gradient of the mean loss over all of the step's actions."""
        accumulate(self.critic.backbone, reduce=reduce)
        values = self.critic(batch)
        loss = self._objective.value_loss(values, batch).sum() / self._actions
        loss.backward()
        with torch.no_grad():
            returns = batch.of_actions["return"].double()
            errors = (values - returns).square()
            self._sums += torch.stack([loss.double(), errors.sum(), returns.sum(), returns.square().sum()])

    def metrics(self, norms: Mapping[str, Tensor]) -> dict[str, float]:
        """Of the step; `explains` is the share of the returns' variance that is not left about the values."""
        grad_norm = (norms["critic"].double().square() + norms["critic_head"].double().square()).sqrt()
        rows = self._world.gather_rows(torch.cat([self._sums, grad_norm[None]])).tolist()
        loss, error, total, square, _ = map(sum, zip(*rows, strict=True))
        self._sums.zero_()
        spread = square - total * total / max(1, self._actions)
        return {
            "critic/loss": loss,
            "critic/explains": 1 - error / spread if spread > 0 else 0.0,
            "critic/grad_norm": rows[0][-1],
        }


def make_critic(config: Config, policy: PolicyModel, world: World) -> CriticStep | None:
    """Where the objective has one."""
    if not config.objective.has_critic:
        return None
    assert isinstance(config.objective, Ppo)
    return CriticStep(Critic(config, policy, world), config.objective, config.trainer.batch_tokens, world)


def trained_parts(config: Config, policy: PolicyModel, step: CriticStep | None) -> dict[str, Part]:
    """What has an optimiser of its own."""
    parts = {"policy": Part(policy, trained_weights(policy))}
    if step is not None:
        rate = config.critic.learning_rate / config.optim.learning_rate
        critic = step.critic  # in two: the backbone may be cut over processes, and the head is whole
        parts["critic"] = Part(critic.backbone, critic.backbone_weights, rate)
        parts["critic_head"] = Part(critic.head, critic.head_weights, rate)
    return parts
