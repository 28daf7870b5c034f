"""The value that the product learns of each prompt, of many worlds at once.

It is that of tbrm.training.learned_value, whose K x K products of trajectories are made for models with more dimensions than
trajectories; of these few dimensions the same least squares are solved in the states' own products (tests hold it to the
product's). Letters: W worlds, M trajectories of a rollout, U dimensions of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm.training.learned_value import HALF_LIFE, RIDGE, WINDOW


class LearnedValues:
    """v(x) = m + u . x of each world, fitted after each step to what was seen last."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Tensor]] = {}
        """By rollout: the step when it was seen last, and over its trajectories the sums of w z z^T, z = (1, x, y)."""
        self._step = 0
        self._fitted: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, states: Tensor, rewards: Tensor, weights: Tensor) -> Tensor:
        """[W, M], in rewards: what the prompts with states [W, M, U] are worth; at first the rewards' weighted mean."""
        if self._fitted is None:
            weights = weights.clamp_min(1e-12)
            return ((weights * rewards).sum(1, keepdim=True) / weights.sum(1, keepdim=True)).expand_as(rewards)
        mean, centre, slope = self._fitted
        return (mean[:, None] + ((states.double() - centre[:, None]) @ slope[..., None])[..., 0]).to(rewards)

    def learn(self, number: int, states: Tensor, targets: Tensor, weights: Tensor) -> None:
        """From what the trajectories of rollout `number` came to, [W, M] each: of one that comes again the latest counts."""
        self._step += 1
        rows = torch.cat([torch.ones_like(targets)[..., None], states, targets[..., None]], 2).double()
        sums = (weights.double().clamp_min(0)[..., None] * rows).mT @ rows
        self._seen.pop(number, None)
        self._seen[number] = self._step, sums.flatten(1)
        for oldest in list(self._seen)[: -(WINDOW // targets.shape[1])]:
            del self._seen[oldest]
        self._fit(states.shape[2], targets.shape[1])

    def _fit(self, dimensions: int, count: int) -> None:
        steps, sums = zip(*self._seen.values(), strict=True)
        ages = 0.5 ** ((self._step - torch.tensor(steps, dtype=torch.float64)) / HALF_LIFE)
        found = torch.einsum("k,kws->ws", ages, torch.stack(sums)).view(-1, dimensions + 2, dimensions + 2)
        # The newest step's weights are 1 on average: so that RIDGE is a number of trajectories.
        found = found * (count * ages.sum() / found[:, :1, :1].clamp_min(1e-30))
        total, of_states, of_targets = found[:, 0, 0], found[:, 0, 1:-1], found[:, 0, -1]
        mean, centre = of_targets / total, of_states / total[:, None]
        about = found[:, 1:-1, 1:-1] - total[:, None, None] * centre[:, :, None] * centre[:, None]
        ridge = RIDGE * about.diagonal(dim1=1, dim2=2).sum(1) / total
        about.diagonal(dim1=1, dim2=2).add_(ridge.clamp_min(1e-30)[:, None])
        right = found[:, 1:-1, -1] - (total * mean)[:, None] * centre
        self._fitted = mean, centre, torch.linalg.solve(about, right[..., None])[..., 0]
