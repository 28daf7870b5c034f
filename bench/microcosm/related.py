"""Estimators of others, by their own formulas: rows of the tables, and not part of the product.

Where a paper's baseline is that of a prompt's group and every prompt has one response, the step stands for the group, as in the
product's objectives. What is a policy gradient has the penalty for leaving the reference in its reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm.objectives import Objective, Step, TrajectoryLoss
from tbrm.objectives.objective import comparable, group_means
from tbrm.trajectories.batch import ScoredBatch
from tbrm_kernels import TokenStats, segment_sums


class PolicyGradient(Objective):
    """loss = -A sum_h log pi(a_h|s_h), A detached and made of shaped rewards, R - beta sum_h (log pi - log pi_ref)."""

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        return {"log_ratio": segment_sums(stats.logprobs - batch.ref_logprobs, batch.cu_seqlens)}

    def columns(self, step: Step) -> dict[str, Tensor]:
        shaped = step.rewards - self.beta * step.measured["log_ratio"]
        return {"advantage": self.advantages(shaped, comparable(step.groups), step)}

    def advantages(self, shaped: Tensor, groups: Tensor, step: Step) -> Tensor:
        raise NotImplementedError

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        advantage = batch.columns["advantage"]
        return TrajectoryLoss(-advantage * segment_sums(stats.logprobs, batch.cu_seqlens), -advantage)


class Opo(PolicyGradient):
    """OPO (arXiv 2505.23585): the group's mean weighted by length. All responses of these worlds are of one length."""

    def advantages(self, shaped: Tensor, groups: Tensor, step: Step) -> Tensor:
        lengths = step.lengths.to(shaped)
        return shaped - group_means(lengths * shaped, groups) / group_means(lengths, groups)


class JamesStein(PolicyGradient):
    """Shrinkage (arXiv 2511.03710, section 3.3): b = (1 - l) m + l m', m the mean of the other responses to the prompt, m'
    that of the other prompts, l = (n - 1) / n v / (v + s), v the mean variance of a prompt's mean and s the spread of the
    means, both of the other prompts. With one response a prompt b is m'."""

    def advantages(self, shaped: Tensor, groups: Tensor, step: Step) -> Tensor:
        _, member = step.groups.unique(return_inverse=True)
        count = member.bincount().to(shaped)  # [G]
        mean = shaped.new_zeros(len(count)).index_add_(0, member, shaped) / count
        square = shaped.new_zeros(len(count)).index_add_(0, member, (shaped - mean[member]).square())
        others = len(count) - 1
        of_others = (mean.sum() - mean) / others  # [G]: m'
        alone = count == 1
        noise = square / ((count - 1).clamp(min=1) * count)
        v = (noise.sum() - noise) / others
        s = (mean.square().sum() - mean.square()) / others - of_others.square()
        share = ((count - 1) / count * v / (v + s).clamp_min(1e-12)).where(~alone, 1.0)[member]
        left_out = (mean[member] * count[member] - shaped) / (count[member] - 1).clamp(min=1)
        return shaped - (1 - share) * left_out - share * of_others[member]


class MaxRl(PolicyGradient):
    """MaxRL (arXiv 2602.02710): (R - mean) / mean of the group, 0 where nothing was right; the penalty apart, less its mean."""

    def advantages(self, shaped: Tensor, groups: Tensor, step: Step) -> Tensor:
        mean = group_means(step.rewards, groups)
        gain = ((step.rewards - mean) / mean).where(mean > 0, 0.0)
        penalty = self.beta * step.measured["log_ratio"]
        return gain - (penalty - group_means(penalty, groups))


class Otb(Objective):
    """The optimal token baseline (arXiv 2602.07078): at place t the mean of the returns from there on, weighted by the energy
    up to there, the sum over j <= t of 1 - 2 pi(a_j) + sum_v pi(v)^2, exactly: `stats` must have `sum_sq_probs`."""

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        places = batch.bounds[1] - batch.bounds[0]  # alike for all
        energy = 1 - 2 * stats.logprobs.exp() + stats.sum_sq_probs  # type: ignore[attr-defined]
        energy = energy.view(-1, places).cumsum(1)
        penalty = self.beta * (stats.logprobs - batch.ref_logprobs).view(-1, places)
        to_go = penalty.flip(1).cumsum(1).flip(1)
        columns = {"energy": energy, "penalty": to_go}
        return {f"{name}_{t}": values[:, t] for name, values in columns.items() for t in range(places)}

    def columns(self, step: Step) -> dict[str, Tensor]:
        groups = comparable(step.groups)
        found = {}
        for name in (name for name in step.measured if name.startswith("energy_")):
            place = name.removeprefix("energy_")
            energy, returns = step.measured[name], step.rewards - step.measured[f"penalty_{place}"]
            baseline = group_means(energy * returns, groups) / group_means(energy, groups).clamp_min(1e-8)
            found[f"advantage_{place}"] = returns - baseline
        return found

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        advantage = torch.stack(list(batch.columns.values()), 1)  # [N, places], in their order
        loss = segment_sums(-advantage.flatten() * stats.logprobs, batch.cu_seqlens)
        return TrajectoryLoss(loss, -advantage.mean(1))


class PmdMean(Objective):
    """PMD-mean (arXiv 2602.05933): beta/2 (A/beta - sum_h (log pi - log mu))^2 / length, A the reward less its group's mean and
    mu what sampled: nothing holds the policy to where training began."""

    @property
    def wants_behaviour(self) -> bool:
        return True

    def columns(self, step: Step) -> dict[str, Tensor]:
        return {"rewards": step.rewards - group_means(step.rewards, comparable(step.groups))}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        log_ratio = segment_sums(stats.logprobs - batch.behaviour_logprobs, batch.cu_seqlens)
        residual = log_ratio - batch.rewards / self.beta
        return TrajectoryLoss(self.beta / 2 * residual.square() / batch.cu_seqlens.diff(), residual)


class Gvpo(PmdMean):
    """GVPO (arXiv 2504.19599): the square between the implicit reward beta sum_h (log pi - log mu) and the reward, each less
    its group's mean; not divided by length."""

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        return {"log_ratio": segment_sums(stats.logprobs - batch.behaviour_logprobs, batch.cu_seqlens)}

    def columns(self, step: Step) -> dict[str, Tensor]:
        implicit = self.beta * step.measured["log_ratio"]
        return {"rewards": step.rewards - group_means(step.rewards - implicit, comparable(step.groups))}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        log_ratio = segment_sums(stats.logprobs - batch.behaviour_logprobs, batch.cu_seqlens)
        residual = self.beta * log_ratio - batch.rewards
        return TrajectoryLoss(residual.square() / 2, residual)


RELATED: dict[str, type[Objective]] = {
    "opo": Opo,
    "otb": Otb,
    "james_stein": JamesStein,
    "maxrl": MaxRl,
    "pmd_mean": PmdMean,
    "gvpo": Gvpo,
}
