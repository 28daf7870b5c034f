"""Training over many processes, on PyTorch's own engine (FSDP2, `torchrun`).

What is small is the same on every process: problems, trajectories, rewards, counters. What is large is divided: each
process keeps a slice of every weight (of its gradient, of the optimiser's moments, of the reference), and answers, grades
and trains on its share of the step.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tbrm.config import ConfigError, ModelConfig, ParallelConfig

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run. Every process makes the same calls in the same order, or all wait until the time limit."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """(replicate, shard); None for a run of one process without torchrun, which is not sharded."""
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
        """What `function` gives on the main process; nowhere else is it called."""
        box: list[Any] = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        result: Result = box[0]
        return result

    def split(self, function: Callable[..., Sequence[Result]], *lists: Sequence[Any]) -> list[Result]:
        """`function(*lists)`, which gives a result per item, with the items divided over the processes."""
        mine = function(*map(self.share, lists)) if self.share(lists[0]) else []
        return [result for part in self.gather(mine) for result in part]

    def gather_rows(self, row: Tensor) -> Tensor:
        """[processes, n]: the vector [n] of each process, on its device: nothing waits for it."""
        if self.size == 1:
            return row[None]
        rows = row.new_empty(self.size, *row.shape)
        dist.all_gather(list(rows), row)
        return rows


ALONE = World()


@contextmanager
def launched(model: ModelConfig, parallel: ParallelConfig) -> Iterator[World]:
    """The processes that torchrun started, ready to talk to each other; `ALONE` if it started none. Raises ConfigError."""
    started = "TORCHELASTIC_RUN_ID" in os.environ
    size = int(os.environ["WORLD_SIZE"]) if started else 1
    shard = parallel.shard or size
    if size % shard:
        raise ConfigError(f"parallel.shard: got {shard} for {size} processes; wants 0 or a divisor of {size}")
    device = model.resolve_device().type
    for key in ("cpu_offload", "offload_reference"):
        if getattr(parallel, key) and not (started and device == "cuda"):
            raise ConfigError(f"parallel.{key}: true; wants torchrun (for one process too) and a GPU")
    if not started:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=parallel.timeout)
    store, rank, _ = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart, and must not offer the addresses of processes that died in it.
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # Python objects travel over gloo even where tensors go over NCCL.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout
    )
    roll_call = _RollCall(store, rank, size)
    try:
        mesh = init_device_mesh(device, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
        for dimension in ("replicate", "shard"):
            _set_pg_timeout(timeout, mesh.get_group(dimension))
        yield World(rank, size, mesh, timeout)
    except (RuntimeError, dcp.CheckpointException) as error:
        if missing := _is_of_a_collective(error) and roll_call.missing():
            raise ProcessLostError(
                f"rank {rank}: no answer from {missing}: died, or hung for longer than parallel.timeout ({parallel.timeout} "
                "s). Go on from the last checkpoint with --resume"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


class ProcessLostError(RuntimeError):
    """A process of the run that the others waited for in vain; the message names it."""


class _RollCall:
    """Finds out, once a collective has failed, which processes are not there any more: those that do not report too."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = dist.PrefixStore("roll call", store)
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        self._store.set(f"host/{rank}", socket.gethostname())

    def missing(self) -> str:
        """The ranks, with their machines, that have not failed like this one within some seconds; "" if all have."""
        self._store.set(f"failed/{self._rank}", "")
        deadline = time.monotonic() + 10
        missing = self._others
        while missing and time.monotonic() < deadline:
            time.sleep(0.2)
            missing = [rank for rank in missing if not self._store.check([f"failed/{rank}"])]
        return ", ".join(f"rank {rank} on {self._store.get(f'host/{rank}').decode()}" for rank in missing)


def _is_of_a_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed")
    )


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

    def reshard(self, model: nn.Module) -> None:
        """Gives back what a forward without a backward has left gathered."""
        for module in _sharded(model):
            module.reshard()

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
