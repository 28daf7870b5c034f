"""Weights to a server's workers over the network: by NCCL from GPU to GPU, by gloo from a CPU.

    trainer                                   each of the server's workers
    ───────                                   ────────────────────────────
    opens a store, says where ─── RPC ──────► Receiver.receive_weights
    waits until all have come ◄── store ────  says that it is there
    reads a weight of the folder ─ group ───► hands it to vLLM's loader
    ...                                       ...
    the answer of the RPC     ◄──────────────  all are loaded

The group is a new one each time, so it never holds a server that is gone. What trainer and worker share is here; the worker
imports it in its own process, with `--worker-extension-cls`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from tbrm.rollout.vllm.connection import RefusedError, ServerError
from tbrm.rollout.vllm.server import Server

RECEIVER = f"{__name__}.Receiver"


@dataclass(frozen=True)
class Meeting:
    """Where trainer and workers find each other: a store of the trainer's."""

    host: str
    port: int
    size: int
    """Workers and the trainer, which is number 0."""
    backend: Literal["nccl", "gloo"]
    timeout: float
    """Seconds that each waits for the others."""

    @contextmanager
    def group(self, store: dist.Store, number: int, host: str) -> Iterator[Any]:
        """One of our own, beside that which training, or vLLM, has. `host`: our own address."""
        group: Any
        timeout = timedelta(seconds=self.timeout)
        if self.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            with _failures_raised():
                group = dist.ProcessGroupNCCL(store, number, self.size, options)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            group = dist.ProcessGroupGloo(store, number, self.size, options)
        try:
            yield group
        except BaseException:
            group.abort()  # the others may never come
            raise
        group.shutdown()


class Broadcast:
    """Has a server's workers take the weights of `folder`, which this process alone need see."""

    def __init__(self, folder: Path, device: torch.device, timeout: float) -> None:
        self._file = folder / "model.safetensors"
        self._device = device
        self._timeout = timeout

    def __call__(self, server: Server) -> None:
        peer = urlsplit(server.address)
        host = _own_address(peer.hostname, peer.port or 80) if peer.hostname else "127.0.0.1"  # or a Unix socket
        numbers = self._numbers(server)
        store = _store(host, 0, self._timeout, is_master=True)
        backend: Literal["nccl", "gloo"] = "nccl" if self._device.type == "cuda" else "gloo"
        meeting = Meeting(host, store.port, 1 + len(numbers), backend, self._timeout)
        with safe_open(self._file, "pt") as weights, ThreadPoolExecutor(1) as pool:
            names = weights.keys()
            listed = [_described(name, weights.get_tensor(name)) for name in names]
            answer = pool.submit(server.on_workers, "receive_weights", {"meeting": asdict(meeting), "weights": listed})
            try:
                while not store.check([_here(number) for number in numbers]):
                    if answer.done():
                        raise RuntimeError("no worker came")
                    time.sleep(0.01)
                with meeting.group(store, 0, host) as group:
                    for name in names:
                        _broadcast(group, weights.get_tensor(name).to(self._device))
            except RuntimeError as error:
                answer.result()  # the server's own words, if it has any
                raise ServerError(f"{server.address}: the broadcast of weights failed: {error}") from error
            answer.result()

    def _numbers(self, server: Server) -> list[int]:
        try:
            return [int(number) for number in server.on_workers("number_of_receiver")]
        except ServerError as error:
            if "number_of_receiver" not in str(error):
                raise
            raise RefusedError(
                f"{server.address} cannot take weights by broadcast: start it with --worker-extension-cls {RECEIVER}, tbrm "
                "being installed there, or set rollout.vllm.transfer to file"
            ) from error


class Receiver:
    """What a worker of vLLM can do besides, with `--worker-extension-cls`: the methods become its own."""

    rank: int
    device: torch.device

    def number_of_receiver(self) -> int:
        return 1 + self.rank

    def receive_weights(self, meeting: dict[str, Any], weights: list[list[Any]]) -> None:
        """`meeting`: the fields of a Meeting. `weights`: name, dtype and shape of each, in the order in which they come."""
        place = self.device if meeting["backend"] == "nccl" else torch.device("cpu")
        arriving = _arriving(Meeting(**meeting), self.number_of_receiver(), weights, place)
        # Closed at once should loading fail, and with it the group: else the trainer would wait for us.
        with closing(arriving):
            self.reload_weights(weights_iterator=arriving)  # type: ignore[attr-defined]


def _arriving(
    meeting: Meeting, number: int, weights: list[list[Any]], place: torch.device
) -> Generator[tuple[str, Tensor], None, None]:
    store = _store(meeting.host, meeting.port, meeting.timeout, is_master=False)
    store.set(_here(number), "")
    with meeting.group(store, number, _own_address(meeting.host, meeting.port)) as group:
        for name, dtype, shape in weights:
            weight = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
            _broadcast(group, weight)
            yield name, weight


def _described(name: str, weight: Tensor) -> list[Any]:
    return [name, str(weight.dtype).removeprefix("torch."), list(weight.shape)]


def _here(number: int) -> str:
    return f"here/{number}"


def _own_address(peer: str, port: int) -> str:
    """Ours, as that peer can reach it."""
    family, kind, *_, address = socket.getaddrinfo(peer, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a socket of datagrams finds the way by this, and sends nothing
        return str(probe.getsockname()[0])


def _store(host: str, port: int, timeout: float, *, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(host, port, None, is_master, timedelta(seconds=timeout), wait_for_workers=False)


@contextmanager
def _failures_raised() -> Iterator[None]:
    """Else NCCL's watchdog ends the whole process when a peer is gone. Read once, when a group is made."""
    before = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        if before is not None:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before


def _broadcast(group: Any, weight: Tensor) -> None:
    """From the trainer, as bytes, which each backend takes."""
    group.broadcast(weight.view(-1).view(torch.uint8), 0).wait()
