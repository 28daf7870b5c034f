"""Weights by broadcast to a server's workers, with threads in the place of its processes. (test_vllm.py has a real one.)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tbrm.rollout.vllm.broadcast import RECEIVER, Broadcast, Receiver
from tbrm.rollout.vllm.connection import RefusedError, ServerError
from tbrm.rollout.vllm.server import Server

WEIGHTS = {"head": torch.randn(7, 3).bfloat16(), "norm": torch.randn(5), "scale": torch.tensor(2.0)}


class Worker(Receiver):
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.device = torch.device("cpu")
        self.weights: dict[str, Tensor] = {}

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        self.weights = dict(weights_iterator)


class Full(Worker):
    """Runs out of memory at the second weight."""

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        next(iter(weights_iterator))
        raise MemoryError("no room")


@dataclass(frozen=True)
class Workers(Server):
    """Calls them as a server would."""

    address: str = "http://localhost:8000"
    timeout: float = 20
    workers: list[Worker] = field(default_factory=list)

    def on_workers(self, method: str, arguments: dict[str, Any] | None = None) -> list[Any]:
        with ThreadPoolExecutor(len(self.workers)) as pool:
            calls = [pool.submit(getattr(worker, method), **(arguments or {})) for worker in self.workers]
        try:
            return [call.result() for call in calls]
        except Exception as error:
            raise ServerError(f"answered 500: {error}") from error


@pytest.fixture
def send(tmp_path: Path) -> Iterator[Broadcast]:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return Broadcast(tmp_path, torch.device("cpu"), timeout=20)


@pytest.mark.parametrize("address", ["http://localhost:8000", "/tmp/a.socket"])
def test_every_worker_gets_every_weight(send: Broadcast, address: str) -> None:
    server = Workers(address, workers=[Worker(0), Worker(1)])
    for _ in range(2):
        send(server)
        for worker in server.workers:
            assert worker.weights.keys() == WEIGHTS.keys()
            for name, weight in worker.weights.items():
                assert weight.dtype == WEIGHTS[name].dtype
                assert torch.equal(weight, WEIGHTS[name])
            worker.weights = {}


def test_a_worker_that_fails_is_heard(send: Broadcast) -> None:
    with pytest.raises(ServerError, match="answered 500: no room"):
        send(Workers(workers=[Full(0)]))


def test_a_worker_that_cannot_come_is_heard(send: Broadcast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "receive_weights", lambda worker, **_: 1 / 0)
    with pytest.raises(ServerError, match="answered 500: division by zero"):
        send(Workers(workers=[Worker(0)]))


def test_a_server_that_lacks_the_receiver_is_refused(send: Broadcast, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any) -> list[Any]:
        raise ServerError("answered 500: 'Worker' object has no attribute 'number_of_receiver'")

    monkeypatch.setattr(Workers, "on_workers", answer)
    with pytest.raises(RefusedError, match=f"start it with --worker-extension-cls {RECEIVER}"):
        send(Workers())
