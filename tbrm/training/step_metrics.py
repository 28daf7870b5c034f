"""The figures of one training step, summed over its micro-batches and processes without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from torch import Tensor

from tbrm.objectives.objective import TrajectoryLoss, log_ratio
from tbrm.parallel import World
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats, segment_sums


class OfEach(NamedTuple):
    """Of each of N trajectories, [N]."""

    residual: Tensor
    surprise: Tensor
    """sum_h (1 - mu(a_h)), mu what sampled it: what it weighs in a mean of least variance."""
    log_ratio: Tensor
    """sum_h log pi(a_h) - log pi_ref(a_h)."""


class StepMetrics:
    """Adds up the micro-batches of this process; `means` is the step's one synchronisation with the device."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = 0
        """Packed tokens: of this process, and of all once `means` has been called."""
        self._trajectories = 0
        self._actions = 0
        self._sums = torch.zeros(8, dtype=torch.float64, device=device)
        self._of_each = [torch.zeros(0, len(OfEach._fields), device=device)]
        self._figures: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, stats: TokenStats, losses: TrajectoryLoss, batch: ScoredBatch) -> None:
        assert stats.entropy is not None
        self.tokens += len(batch.inputs.input_ids)
        self._trajectories += len(batch.bounds) - 1
        self._actions += len(batch.targets)
        ratios = log_ratio(stats, batch)
        gaps = (stats.logprobs - batch.behaviour_logprobs).abs()
        known = gaps.isfinite()
        sampled = batch.behaviour_logprobs.where(known, stats.logprobs)  # where nobody said, the policy's own
        surprise = segment_sums(1 - sampled.exp(), batch.cu_seqlens)
        self._of_each.append(torch.stack(OfEach(losses.residual, surprise, ratios), dim=1))
        self._sums += torch.stack(
            [
                losses.loss.double().sum(),
                losses.residual.double().sum(),
                losses.residual.double().square().sum(),
                batch.values(stats.lse).double().sum(),
                ratios.double().sum(),
                stats.entropy.double().sum(),
                gaps.where(known, 0.0).double().sum(),
                known.double().sum(),
            ]
        )

    def add_figures(self, found: Mapping[str, Tensor]) -> None:
        """What the objective says of a micro-batch, of none too: all processes must know what there is."""
        for name, sums in found.items():
            self._figures[name] = self._figures.get(name, 0) + sums.double().sum()

    def of_each(self, order: Sequence[int], world: World) -> OfEach:
        """What all of the step's trajectories came to. `order` has the indices of those of this process as they were added."""
        found = dict(zip(order, torch.cat(self._of_each).tolist(), strict=True))
        everywhere = {i: row for part in world.gather(found) for i, row in part.items()}
        rows = torch.tensor([everywhere[i] for i in range(len(everywhere))], dtype=torch.float64)
        return OfEach(*rows.reshape(-1, len(OfEach._fields)).unbind(1))

    def means(self, grad_norm: Tensor, world: World) -> dict[str, float]:
        """Means over the trajectories of all processes; entropy, gap and figures over actions. `grad_norm` [] rides along."""
        counts = self._sums.new_tensor([self.tokens, self._trajectories, self._actions])
        figures = [found[None] for found in self._figures.values()]
        rows = world.gather_rows(torch.cat([self._sums, *figures, counts, grad_norm.double()[None]])).tolist()
        *sums, tokens, trajectories, actions, _ = map(sum, zip(*rows, strict=True))
        loss, residual, residual_square, value, log_ratio, entropy, gap, known, *own = sums
        self.tokens = int(tokens)
        n = max(1, trajectories)
        mean = residual / n
        return {
            "loss": loss / n,
            "residual_mean": mean,
            "residual_std": max(0.0, residual_square / n - mean * mean) ** 0.5,
            "value_mean": value / n,
            "log_ratio_mean": log_ratio / n,
            "entropy_mean": entropy / max(1, actions),
            **({"behaviour_gap_mean": gap / known} if known else {}),
            **{name: found / max(1, actions) for name, found in zip(self._figures, own, strict=True)},
            "grad_norm": rows[0][-1],
        }


def trajectory_metrics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """What the trajectories of update `step` say by themselves. Staleness is in updates since they were made."""
    if not trajectories:
        return {"trajectories": 0}
    rewards = [t.reward for t in trajectories]
    staleness = [step - 1 - t.weight_version for t in trajectories if t.weight_version is not None]
    return {
        "trajectories": len(trajectories),
        "reward_mean": fmean(rewards),
        "reward_std": pstdev(rewards) if all(map(math.isfinite, rewards)) else math.nan,  # which has no way with these
        "response_length_mean": fmean(len(t.response_ids) for t in trajectories),
        "truncated_share": fmean(t.truncated for t in trajectories),
        **({"staleness_mean": fmean(staleness), "staleness_max": max(staleness)} if staleness else {}),
    }
