"""What the trainer asks of an objective, and holds it to: a loss of each trajectory, of its own tokens and columns alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss
from tbrm.trajectories.batch import ScoredBatch
from tbrm_kernels import TokenStats


class ObjectiveError(ValueError):
    """An objective that breaks a rule; the message names both."""


class Contract:
    """An objective, whose every answer is looked at: for its shapes always, for what it depends on once."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.measures = objective.measures
        self.wants_behaviour = objective.wants_behaviour
        self._checked = False

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        found = self.objective.measure(stats, batch)
        self._check_columns("measure", found, len(batch.bounds) - 1)
        return found

    def columns(self, step: Step) -> dict[str, Tensor]:
        found = self.objective.columns(step)
        self._check_columns("columns", found, len(step.rewards))
        inputs = [step.rewards, *step.measured.values()]
        for name, column in found.items():
            if not self._checked and _finite(*inputs) and not _finite(column):
                raise self._broken(f"columns gave {name!r} that is not finite, of rewards and measures that are")
        return found

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        losses = self.objective(stats, batch)
        if not isinstance(losses, TrajectoryLoss):
            raise self._broken(f"it returned {_kind(losses)}: it must return TrajectoryLoss(loss, residual)")
        n = len(batch.bounds) - 1
        for name, values in losses._asdict().items():
            if not isinstance(values, Tensor) or values.shape != (n,):
                raise self._broken(f"its {name} is {_kind(values)}: it must be [N = {n}], one for each trajectory")
        if torch.is_grad_enabled() and not losses.loss.requires_grad:
            raise self._broken("its loss does not depend on the statistics, so that nothing would be learnt")
        return losses

    @torch.no_grad()
    def figures(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        found = self.objective.figures(stats, batch)
        self._check_columns("figures", found, len(batch.bounds) - 1)
        return found

    @torch.no_grad()
    def check(self, stats: TokenStats, batch: ScoredBatch) -> None:
        """Looks, in a batch of two trajectories or more, at whether a loss depends on which others it is called with: once
        where their columns differ, as columns that are all equal (no answer is right yet) have means that are too."""
        n = len(batch.bounds) - 1
        if self._checked or n < 2:
            return
        inputs = [*stats, batch.ref_logprobs, batch.ref_values, *batch.columns.values()]
        if not _finite(*(values for values in inputs if values is not None)):
            return
        cut = _first_other(batch.columns)
        self._checked = cut > 0 or not batch.columns
        stats = _moved(stats)
        whole = self(stats, batch)
        cut = cut or n // 2
        parts = [self(*_some(stats, batch, first, last)) for first, last in ((0, cut), (cut, n))]
        for name, values, halves in zip(TrajectoryLoss._fields, whole, zip(*parts, strict=True), strict=True):
            if not _finite(values):
                raise self._broken(f"its {name} is not finite, of statistics and columns that are")
            gap = (values - torch.cat(halves)).abs().max()
            if not gap <= 1e-3 * values.abs().max() + 1e-6:  # nor is it nan, as the spread of one
                raise self._broken(
                    f"its {name} of a trajectory changes by {gap.item():.3g} with those it is called with, which depend on "
                    "trainer.batch_tokens; what looks at others belongs into `columns`, which sees the whole step"
                )

    def _check_columns(self, method: str, found: Mapping[str, Tensor], n: int) -> None:
        if not isinstance(found, Mapping):
            raise self._broken(f"{method} returned {_kind(found)}: it must return a dict of tensors [N]")
        for name, column in found.items():
            if not isinstance(column, Tensor) or column.shape != (n,):
                raise self._broken(
                    f"{method} gave {name!r} as {_kind(column)}: it must be [N = {n}], one for each trajectory"
                )

    def _broken(self, rule: str) -> ObjectiveError:
        return ObjectiveError(f"objective.name: {self.objective.name} cannot be used: {rule}")


def _moved(stats: TokenStats) -> TokenStats:
    """Others: at the first step all log-ratios are 0, and so is whatever is made of them."""
    by = torch.arange(len(stats.lse), device=stats.lse.device).mul(0.618).frac()
    return TokenStats(stats.logprobs - by, stats.lse + by, None if stats.entropy is None else stats.entropy + by)


def _some(stats: TokenStats, batch: ScoredBatch, first: int, last: int) -> tuple[TokenStats, ScoredBatch]:
    actions = slice(batch.bounds[first], batch.bounds[last])
    part = TokenStats(*(None if values is None else values[actions] for values in stats))  # type: ignore[arg-type]
    return part, batch.scores_of(first, batch.cu_seqlens[first : last + 1] - batch.cu_seqlens[first])


def _first_other(columns: Mapping[str, Tensor]) -> int:
    """The number of the first trajectory that has another value than number 0 in any column; 0 if all are equal."""
    return min((int(found[0]) for c in columns.values() if len(found := (c != c[0]).nonzero())), default=0)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(values.isfinite().all()) for values in tensors)


def _kind(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
