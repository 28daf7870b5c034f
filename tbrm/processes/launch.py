"""From what a launcher started to processes that talk to each other."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.config.training import ParallelConfig
from tbrm.parallel import ALONE, World
from tbrm.processes.place import Place, find_place
from tbrm.processes.watch import ProcessLostError, Watch
from tbrm.training.interruption import Interrupted

_MEETING_SECONDS = 600
"""Within which all processes must have come: machines of a cluster do not start at once."""
_QUIET_SECONDS = 10
"""After which one that waits for the others says so."""


@contextmanager
def launched(model: ModelConfig, parallel: ParallelConfig) -> Iterator[World]:
    """The processes that a launcher started, ready to talk to each other; `ALONE` if none did. Where one leaves by an error,
    the others end too, and say which. Raises ConfigError or PlaceError."""
    place = find_place()
    size = place.size if place else 1
    shard = parallel.shard or size
    if size % shard:
        raise ConfigError(f"parallel.shard: got {shard} for {size} processes; wants 0 or a divisor of {size}")
    device = model.resolve_device().type
    for key in ("cpu_offload", "offload_reference"):
        if getattr(parallel, key) and not (place and device == "cuda"):
            raise ConfigError(f"parallel.{key}: true; wants torchrun (for one process too) and a GPU")
    if place is None:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(place.gpu(torch.cuda.device_count()))
    store = _torchruns_store() if place.torchrun else _meet(place, min(_MEETING_SECONDS, parallel.timeout))
    watch = Watch(
        dist.PrefixStore("watch", store),
        place.rank,
        size,
        under_launcher=place.torchrun,
        hosts_store=place.rank == 0 and not place.torchrun,
    )
    try:
        yield _connect(store, place, device, shard, timedelta(seconds=parallel.timeout))
    except Interrupted:  # all leave together
        raise
    except BaseException as error:
        if _is_of_a_collective(error) and (culprit := watch.culprit(parallel.timeout)):
            lost = ProcessLostError(f"rank {place.rank}: {culprit}. Go on from the last checkpoint with --resume")
            watch.report(lost)
            raise lost from error
        watch.report(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.end()


def _connect(store: dist.Store, place: Place, device: str, shard: int, timeout: timedelta) -> World:
    # Python objects travel over gloo even where tensors go over NCCL.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=place.rank, world_size=place.size, timeout=timeout
    )
    mesh = init_device_mesh(device, (place.size // shard, shard), mesh_dim_names=("replicate", "shard"))
    for dimension in ("replicate", "shard"):
        _set_pg_timeout(timeout, mesh.get_group(dimension))
    return World(place.rank, place.size, mesh, timeout)


def _torchruns_store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    # It outlives a restart, and must not offer the addresses of processes that died in it.
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _meet(place: Place, seconds: int) -> dist.Store:
    """A store on the machine of rank 0, once all processes are there. Raises ConfigError."""
    where = f"{place.address}:{place.port}"
    deadline = time.monotonic() + seconds
    said = time.monotonic() + _QUIET_SECONDS

    def wait_for(whom: Callable[[], str]) -> None:
        nonlocal said
        if time.monotonic() > deadline:
            raise ConfigError(f"{_whoami(place)} has waited {seconds} s at {where} for {whom()}. {_alone(place)}")
        if time.monotonic() > said:
            print(f"tbrm: {_whoami(place)} waits at {where} for {whom()}. {_alone(place)}", file=sys.stderr, flush=True)
            said = deadline
        time.sleep(0.2)

    # Not by the store's own patience, which tells of each attempt with a stack trace.
    while place.rank > 0 and not _answers(place):
        wait_for(lambda: "rank 0")
    try:
        store = dist.TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"MASTER_PORT: {_whoami(place)} cannot meet the others at {where}: {error}. Set it to a port that is free there"
        ) from error
    store.set(f"here/{place.rank}", "")
    keys = {f"here/{rank}": f"rank {rank}" for rank in range(place.size)}
    while not store.check(list(keys)):
        wait_for(lambda: ", ".join(rank for key, rank in keys.items() if not store.check([key])))
    return store


def _answers(place: Place) -> bool:
    try:
        socket.create_connection((place.address, place.port), timeout=2).close()
    except OSError:  # also where the name is not known yet, as that of a pod that has not begun
        return False
    return True


def _whoami(place: Place) -> str:
    return f"rank {place.rank} of {place.size} ({place.named_by}={place.size})"


def _alone(place: Place) -> str:
    return f"To run this process alone, unset {place.named_by}"


def _is_of_a_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | dcp.CheckpointException)
        and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
    )
