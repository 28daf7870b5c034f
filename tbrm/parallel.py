"""Training over many processes, on PyTorch's own engine (FSDP2, `torchrun`).

What is small is the same on every process: problems, trajectories, rewards, counters. What is large is divided: each
process keeps a slice of every weight (of its gradient, of the optimiser's moments, of the reference), and answers, grades
and trains on its share of the step.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tbrm.config.training import ParallelConfig

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


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model are cut over a mesh: a slice of each on every process.

    Each block is gathered when it runs; the rest (embeddings, last norm, head) for the whole of the model's forward, so a
    loss that uses the head's weight must be computed within that. Weights and gradients are float32; weights are gathered in
    `precision`, gradients summed (not averaged) over the processes in float32.
    """

    mesh: DeviceMesh
    config: ParallelConfig
    precision: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.mesh.device_type)

    @property
    def weights_device(self) -> torch.device:
        """Where the slices are kept between passes."""
        return torch.device("cpu") if self.config.cpu_offload else self.device

    def of_reference(self) -> Sharding:
        """How the reference is cut: as the policy is, but perhaps kept on the CPU."""
        offload = self.config.cpu_offload or self.config.offload_reference
        return replace(self, config=self.config.model_copy(update={"cpu_offload": offload}))

    @property
    def weights_mesh(self) -> DeviceMesh:
        """Over which each weight lies: without the dimension that holds copies, where there is but one."""
        return self.mesh if self.mesh["replicate"].size() > 1 else self.mesh["shard"]

    def apply(
        self, model: nn.Module, blocks: Sequence[nn.Module], *, trained: bool, divided: set[nn.Parameter]
    ) -> None:
        """Cuts the weights of `model`, which may be on the meta device, but for those that are `divided` already. Unless
        `trained`, no backward pass will follow its forward, and nothing stays gathered after it."""
        options: dict[str, Any] = {
            "mesh": self.weights_mesh,
            # Inputs are left alone: rounded rotary angles would misplace tokens.
            "mp_policy": MixedPrecisionPolicy(self.precision, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self.config.cpu_offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.config.reshard_after_forward or not trained, **options)
        fully_shard(model, reshard_after_forward=not trained, ignored_params=divided, **options)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it sums
        # What the backward pass gathers ahead is the block before: not, as FSDP2 has it unless told, what ran before in any
        # forward since the last backward. Generation runs blocks too, and not equally often on all processes.
        order = [model, *blocks]
        for after, ahead in zip(order, order[-1:] + order[:-1], strict=True):
            assert isinstance(after, FSDPModule) and isinstance(ahead, FSDPModule)
            after.set_modules_to_backward_prefetch([ahead])

    def reshard(self, model: nn.Module) -> None:
        """Gives back what a forward without a backward has left gathered, and the records of it that FSDP2 keeps."""
        for module in _sharded(model):
            module.reshard()
        if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):  # from torch 2.13 on
            model.reset_iter_state()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Within it every process holds all weights of the (trained) model, and may run it, or parts of it, at will."""
        for module in _sharded(model):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            self.reshard(model)
            for module in _sharded(model):
                keeps = module is model or not self.config.reshard_after_forward
                module.set_reshard_after_forward(not keeps, recurse=False)


def accumulate(model: nn.Module, *, reduce: bool) -> None:
    """Whether the next backward pass sums the gradients over the processes, or leaves that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
