"""Training over many processes (`torchrun`): who they are, and what they tell each other.

What is small is the same on every process: problems, trajectories, rewards, counters. What is large is divided: each
process keeps a slice of every weight (of its gradient, of the optimiser's moments, of the reference), and answers, grades
and trains on its share of the step.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run. Every process makes the same calls in the same order, or all wait until the time limit."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """(replicate, shard); None for a run of one process without a launcher, which is not sharded."""
    timeout: timedelta = timedelta(minutes=30)
    group: dist.ProcessGroup | None = None
    """What objects travel over; None: the default one."""

    def apart(self) -> World:
        """The same processes over a group of their own, so that a second thread may talk to its like in the others. All
        processes call it."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=self.timeout))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of `items`: a run of neighbours, so that equal prompts stay together."""
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def gather(self, part: Item) -> list[Item]:
        """What each process gave, in the order of ranks."""
        parts: list[Any] = [part] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, part, group=self.group)
        return parts

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` gives on the main process; nowhere else is it called. Where it fails, it fails on all."""
        if self.size == 1:
            return function()
        outcome = _Outcome.of(function) if self.is_main else None
        box = [outcome and outcome.portable()]
        dist.broadcast_object_list(box, src=0, group=self.group)
        found: _Outcome[Result] | None = outcome or box[0]
        assert found is not None
        return found.get()

    def everywhere(self, function: Callable[[], Result]) -> list[Result]:
        """What `function` gives on each process, in the order of ranks. Where it fails on one, it fails on all."""
        if self.size == 1:
            return [function()]
        mine = _Outcome.of(function)
        outcomes = self.gather(mine.portable())
        mine.get()
        return [outcome.get() for outcome in outcomes]

    def split(self, function: Callable[..., Sequence[Result]], *lists: Sequence[Any]) -> list[Result]:
        """`function(*lists)`, which gives a result per item, with the items divided over the processes. It is not called where
        there are none."""
        shares = [self.share(items) for items in lists]
        return [result for part in self.everywhere(lambda: function(*shares) if shares[0] else []) for result in part]

    def gather_rows(self, row: Tensor) -> Tensor:
        """[processes, n]: the vector [n] of each process, on its device: nothing waits for it."""
        if self.size == 1:
            return row[None]
        rows = row.new_empty(self.size, *row.shape)
        dist.all_gather(list(rows), row)
        return rows


ALONE = World()


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    """What came of a call: a result or a failure, which another process is to be told."""

    result: Result | None = None
    failure: Exception | None = None

    @classmethod
    def of(cls, function: Callable[[], Result]) -> _Outcome[Result]:
        try:
            return cls(result=function())
        except Exception as error:
            return cls(failure=error)

    def get(self) -> Result:
        if self.failure is not None:
            raise self.failure
        return self.result  # type: ignore[return-value]

    def portable(self) -> _Outcome[Result]:
        """With a failure that can be pickled: one that cannot is told in words."""
        if self.failure is None:
            return self
        told = f"{type(self.failure).__name__}: {self.failure}"
        try:
            if str(pickle.loads(pickle.dumps(self.failure))) == str(self.failure):
                return self
        except Exception:
            return _Outcome(failure=RuntimeError(told))
        return _Outcome(failure=RuntimeError(told))
