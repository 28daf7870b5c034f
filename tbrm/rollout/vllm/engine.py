"""`rollout.engine: vllm`: rollouts by vLLM servers, which we start, or whose addresses we are given.

Every process of a run talks to all servers; weights go to them from the main one. Whatever becomes of a server, an answer
counts once and was made by the weights that were wanted: each says which made it, and one that is lost is asked for again,
with the same seed.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tbrm.chat import Chat
from tbrm.config.rollout import RolloutConfig
from tbrm.config.section import ConfigError
from tbrm.parallel import ALONE, World
from tbrm.policy.model import PolicyModel
from tbrm.reporting.progress import Watch, alive, unwatched
from tbrm.rollout.interface import Request, Response, Sampling
from tbrm.rollout.vllm.broadcast import RECEIVER, Broadcast
from tbrm.rollout.vllm.check import SyncCheck, refuse_experts_on_cpu
from tbrm.rollout.vllm.connection import HungError, ServerError, headers_from_environment
from tbrm.rollout.vllm.devices import gpu_of, places
from tbrm.rollout.vllm.handover import (
    ADAPTERS,
    Handover,
    engine_dtype,
    options_for_adapters,
    read_adapters_from,
    read_from,
)
from tbrm.rollout.vllm.keeper import Keeper, publish
from tbrm.rollout.vllm.process import FolderGuard, ServerProcess, check_installed, engine_options, socket_folder
from tbrm.rollout.vllm.same_model import SameModel
from tbrm.rollout.vllm.server import Server, barrable, cut, room, sampling_params

_LIKE_A_START = 60.0
"""Seconds that a server may hang before another is started in its place, which takes as long."""


@dataclass(frozen=True)
class _Job:
    """One request: up to `count` responses to a prompt."""

    index: int
    prompt: list[int]
    sampling: dict[str, object]


class VllmEngine:
    """Nothing is started before the first weights are sent: training on recorded trajectories needs no server."""

    def __init__(
        self,
        config: RolloutConfig,
        policy: PolicyModel,
        chat: Chat,
        log_dir: Path,
        world: World = ALONE,
    ) -> None:
        self.config = config.vllm
        self.batch_size = config.batch_size
        self.policy = policy
        self.log_dir = log_dir
        self.world = world
        self.ends = chat.ends
        self._barred = barrable(chat.barred)
        self._check = SyncCheck(policy, chat.tokenizer, config.vllm.max_logprob_gap)
        self._dtype = engine_dtype(config.vllm, policy)
        self._options = engine_options(
            config.vllm,
            self._dtype,
            config.batch_size,
            policy.device,
            self._options_for_transfer(),
            decodes=bool(chat.ends.strings),
        )
        self._headers = self.world.on_main(lambda: headers_from_environment(config.vllm))
        self._places: list[dict[str, str]] = []
        if not config.vllm.addresses:
            refuse_experts_on_cpu(policy, check_installed())
            machines, gpus = zip(*world.gather((socket.gethostname(), gpu_of(policy.device))), strict=True)
            if len(set(machines)) > 1:
                raise ConfigError(
                    "rollout.vllm.addresses: missing; a run of several machines does not start servers itself"
                )
            self._places = self.world.on_main(lambda: places(config.vllm, policy.device, gpus))
        # Servers may have weights of other runs, by the same version.
        self._run_id = world.gather(secrets.token_hex(4))[0]
        self._handover: Handover | None = None
        self._guard: FolderGuard | None = None
        self._keepers: list[Keeper] = []
        self._servers: list[Server] = []
        self._max_model_len = 0
        self._version = -1
        self._sync_metrics: dict[str, float] = {}
        self._reissued = 0
        self._count_lock = threading.Lock()
        self._closed = False

    def update_weights(self, version: int) -> dict[str, float]:
        if version != self._version:
            if self._handover is None:
                self._handover = Handover(
                    self.policy,
                    self._dtype,
                    self.ends,
                    self.config.weights_dir,
                    owner=self.world.is_main,
                    adapters_apart=self.config.transfer == "adapters",
                )
                self._servers = self.world.on_main(self._prepare)
            self._handover.write()
            self._max_model_len, probes = self.world.on_main(lambda: self._publish(version))
            self._sync_metrics = self._check(probes, self._dtype, self._max_model_len)
            self._version = version
        restarts, reissued = map(sum, zip(*self.world.gather((self._restarts, self._reissued)), strict=True))
        return {**self._sync_metrics, "engine/restarts": restarts, "engine/reissued": reissued}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        count = min([self.batch_size, *(each.samples for each in requests)])  # vLLM wants no more of one request
        jobs = [
            _Job(
                i,
                each.prompt,
                sampling_params(
                    min(count, each.samples - drawn),
                    room(each.prompt, sampling.max_new_tokens, self._max_model_len),
                    sampling.temperature,
                    each.seed + drawn,  # vLLM seeds the n-th response to a request with its seed plus n
                    self.ends,
                    self._barred,
                ),
            )
            for i, each in enumerate(requests)
            for drawn in range(0, each.samples, count)
        ]
        # As many requests as keep the servers busy, of all processes together; more would only wait there.
        in_flight = max(1, 2 * self.batch_size * len(self._servers) // (count * self.world.size))
        threads = ThreadPoolExecutor(in_flight)
        try:
            answers = [threads.submit(self._answer, job) for job in jobs]
            for answer in as_completed(answers):
                watch(len(answer.result()))  # a failure is raised at once, however long others still take
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        responses: list[list[Response]] = [[] for _ in requests]
        for job, answer in zip(jobs, answers, strict=True):
            responses[job.index] += answer.result()
        return responses

    def close(self) -> None:
        self._closed = True
        for server in self._servers:
            server.pulse.closed = True
        for keeper in self._keepers:
            keeper.close()
        if self._guard is not None:
            self._guard.stop()

    def _answer(self, job: _Job) -> list[Response]:
        """The responses to one request, from whichever server gives them."""
        wanted = self._version
        asked, deadline = time.monotonic(), None
        failures: dict[type[ServerError], ServerError] = {}
        """The last of each kind: what is wrong may not be what was wrong last."""
        for attempt in itertools.count(job.index + self.world.rank):
            number = attempt % len(self._servers)
            server = self._servers[number]
            keeper = self._keepers[number] if self._keepers else None
            generation = keeper.restarts if keeper else 0
            try:
                return [
                    replace(cut(response, self.ends), weight_version=self._oldest(tags, wanted))
                    for response, tags in server.generate(job.prompt, job.sampling)
                ]
            except ServerError as error:
                failures[type(error)] = error
                if deadline is None:
                    deadline = time.monotonic() + self.config.start_timeout
                    with self._count_lock:
                        self._reissued += 1
                if self._closed or time.monotonic() > deadline:
                    raise ServerError(
                        f"no vLLM server has answered for rollout.vllm.start_timeout ({self.config.start_timeout} s) since the "
                        f"first failure. The last of each kind: {'; '.join(map(str, failures.values()))}"
                        f"{''.join(keeper.last_words() for keeper in self._keepers)}"
                    ) from error
                if keeper and isinstance(error, HungError) and time.monotonic() > asked + _LIKE_A_START:
                    keeper.restart(generation)
            time.sleep(0.5)
        raise AssertionError

    def _oldest(self, tags: set[str], wanted: int) -> int:
        """The version of the oldest of the weights that made a response. Raises ServerError if they are too old."""
        versions = []
        for tag in tags:
            run, _, version = tag.rpartition("-")
            if run != self._run_id or int(version) < wanted:
                raise ServerError(f"a server answered with weights {tag!r} instead of {self._tag(wanted)!r}")
            versions.append(int(version))
        return min(versions)

    def _tag(self, version: int) -> str:
        return f"{self._run_id}-{version}"

    @property
    def _awaited(self) -> str:
        where = ", ".join(self.config.addresses) or f"what it says is in {self.log_dir}"
        return f"waiting for vLLM ({where})"

    @property
    def _restarts(self) -> int:
        return sum(keeper.restarts for keeper in self._keepers)

    def _prepare(self) -> list[Server]:
        """The servers, each with a keeper; nothing runs yet."""
        assert self._handover is not None and self._handover.folder is not None
        folder, config = self._handover.folder, self.config
        send: Callable[[Server], None] = partial(read_from, folder)
        adapter = None
        if config.transfer == "broadcast":
            send = Broadcast(folder, self.policy.device, config.request_timeout)
        elif config.transfer == "adapters":
            send, adapter = partial(read_adapters_from, folder), ADAPTERS

        def server(address: str) -> Server:
            return Server(address, config.request_timeout, self._headers, adapter=adapter)

        if config.addresses:
            self._guard = FolderGuard(folder)
            examine = SameModel(self.policy)
            self._keepers = [Keeper(server(address), send, examine=examine) for address in config.addresses]
        else:
            sockets = socket_folder()
            self._guard = FolderGuard(sockets, folder)
            for number, place in enumerate(self._places):
                path = sockets / f"{number}.socket"
                self._keepers.append(Keeper(server(str(path)), send, self._starter(folder, number, path, place)))
        return [keeper.server for keeper in self._keepers]

    def _options_for_transfer(self) -> dict[str, Any]:
        if self.config.transfer == "broadcast":
            return {"worker_extension_cls": RECEIVER}
        if self.config.transfer == "adapters":
            assert self.policy.adapters is not None
            return options_for_adapters(self.policy.adapters.config.r)
        return {}

    def _starter(self, folder: Path, number: int, path: Path, place: dict[str, str]) -> Callable[[], ServerProcess]:
        log = self.log_dir / f"vllm-{number}.log"
        return lambda: ServerProcess(folder, path, self._options, self.config, log, place)

    def _publish(self, version: int) -> tuple[int, list[Response]]:
        """Has the servers load the weights. Returns the longest that they all take, and each one's answer to the check."""
        tag, seconds = self._tag(version), self.config.start_timeout
        deadline = time.monotonic() + seconds
        while True:
            with alive(self._awaited, shown=self._version < 0):
                publish(self._keepers, tag, wait_for_all=self._version < 0, seconds=deadline - time.monotonic())
            length = min(keeper.max_model_len for keeper in self._keepers if keeper.max_model_len)
            prompt, probes = self._check.prompt(length), []
            for keeper in self._keepers:
                try:
                    [(response, tags)] = keeper.server.generate(prompt, self._check.sampling)
                    probes += [response] if tags == {tag} else []
                except ServerError as error:  # it died just now: its keeper sees to it
                    keeper.failure = error
            if probes:
                return length, probes
            time.sleep(0.5)
