"""REINFORCE leave-one-out ("Back to Basics", Ahmadian et al., 2024, arXiv 2402.14740), the penalty for leaving the reference
within the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss, comparable, group_means, group_sizes, log_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Rloo(Objective):
    """loss = -A sum_h log pi(a_h|s_h), A detached: the shaped reward R - beta sum_h (log pi - log pi_ref), less the mean of
    those of the other responses to the same problem, or, where every problem has one response, of the step's."""

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        return {"log_ratio": log_ratio(stats, batch)}

    def columns(self, step: Step) -> dict[str, Tensor]:
        shaped = step.rewards - self.beta * step.measured["log_ratio"]
        groups = comparable(step.groups)
        count = group_sizes(groups).to(shaped.dtype)
        # x less the mean of the others is n / (n - 1) times x less the mean of all. Of one alone it is 0: nothing is known.
        return {
            "rewards": step.rewards,
            "advantage": (shaped - group_means(shaped, groups)) * count / (count - 1).clamp(min=1),
        }

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums

        advantage = batch.columns["advantage"]
        return TrajectoryLoss(-advantage * segment_sums(stats.logprobs, batch.cu_seqlens), -advantage / self.beta)
