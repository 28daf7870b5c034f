"""`rollout.engine: vllm_colocated`: vLLM in the trainer's own process. No server to start, no weights through a file; but a
call that hangs cannot be ended, so for long runs take `vllm`."""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbrm.chat import Chat
from tbrm.config.rollout import RolloutConfig
from tbrm.policy.model import PolicyModel
from tbrm.reporting.progress import Watch, alive, unwatched
from tbrm.rollout.interface import Request, Response, Sampling
from tbrm.rollout.vllm.check import SyncCheck, refuse_experts_on_cpu
from tbrm.rollout.vllm.handover import Handover, engine_dtype
from tbrm.rollout.vllm.process import FolderGuard, check_installed, engine_options, environment, socket_folder
from tbrm.rollout.vllm.server import barrable, cut, room, sampling_params


class ColocatedEngine:
    """On a GPU vLLM sleeps between calls: weights go to the CPU's memory, that of keys and values is given back."""

    def __init__(self, config: RolloutConfig, policy: PolicyModel, chat: Chat) -> None:
        self._barred = barrable(chat.barred)
        refuse_experts_on_cpu(policy, check_installed())
        self.config = config
        self.policy = policy
        self.ends = chat.ends
        self._dtype = engine_dtype(config.vllm, policy)
        self._sleeps = policy.device.type == "cuda"
        self._options = engine_options(
            config.vllm, self._dtype, config.batch_size, policy.device, {}, decodes=bool(chat.ends.strings)
        )
        self._check = SyncCheck(policy, chat.tokenizer, config.vllm.max_logprob_gap)
        self._handover: Handover | None = None
        self._guard: FolderGuard | None = None
        self._llm: Any = None
        self._version = -1
        self._sync_metrics: dict[str, float] = {}

    def update_weights(self, version: int) -> dict[str, float]:
        if version == self._version:
            return self._sync_metrics
        if self._handover is None:
            self._handover = Handover(self.policy, self._dtype, self.ends)
            self._llm = self._start(self._handover)
        with self._awake(), _process_left_as_it_was(), _no_false_alarm():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._handover.weights()})
            # Else what it has computed of known prompts would stay that of the old weights.
            self._llm.reset_prefix_cache()
        length = self._llm.model_config.max_model_len
        probes = self._generate([self._check.prompt(length)], [self._check.sampling])[0]
        self._sync_metrics = self._check(probes, self._dtype, length)
        self._version = version
        return self._sync_metrics

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        params = []
        for each in requests:
            length = room(each.prompt, sampling.max_new_tokens, self._llm.model_config.max_model_len)
            params.append(
                sampling_params(each.samples, length, sampling.temperature, each.seed, self.ends, self._barred)
            )
        answers = self._generate([each.prompt for each in requests], params)
        watch(sum(map(len, answers)))  # vLLM says nothing before all are there
        return answers

    def close(self) -> None:
        if self._guard is not None:
            self._guard.stop()
        if self._llm is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self._llm = None
            cleanup_dist_env_and_memory()

    def _generate(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[list[Response]]:
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        with self._awake(), _process_left_as_it_was():
            outputs = self._llm.generate(inputs, [SamplingParams(**each) for each in params], use_tqdm=False)
        return [[self._response(choice) for choice in output.outputs] for output in outputs]

    def _response(self, choice: Any) -> Response:
        token_ids = list(choice.token_ids)
        logprobs = [step[token].logprob for token, step in zip(token_ids, choice.logprobs, strict=True)]
        return cut(Response(token_ids, choice.finish_reason == "length", self._version, logprobs), self.ends)

    def _start(self, handover: Handover) -> Any:
        assert handover.folder is not None
        temporary = socket_folder()
        self._guard = FolderGuard(handover.folder, temporary)
        handover.write()
        os.environ.update(environment(self.config.vllm), VLLM_ENABLE_V1_MULTIPROCESSING="0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        with alive("starting vLLM in this process"), _process_left_as_it_was(), _temporary_files_in(temporary):
            from vllm import LLM

            llm = LLM(str(handover.folder), enable_sleep_mode=self._sleeps, **self._options)
        (handover.folder / "model.safetensors").unlink()  # from now on weights go from memory to memory
        if self._sleeps:
            llm.sleep()
        return llm

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self._sleeps:
            self._llm.wake_up()
        try:
            yield
        finally:
            if self._sleeps:
                self._llm.sleep()


@contextmanager
def _no_false_alarm() -> Iterator[None]:
    """vLLM says at each reload that it failed to load the weights of layers that have none in any file, such as rotary
    embeddings. Whether it has the weights it should, the check that follows says."""
    said_by = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith("Failed to load weights")

    said_by.addFilter(other)
    try:
        yield
    finally:
        said_by.removeFilter(other)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _process_left_as_it_was() -> Iterator[None]:
    """vLLM takes the process for its own: it seeds the global generators, binds threads to cores, and turns
    torch.set_num_threads off. Training's numbers must not depend on the engine. (Its process group stays until close.)"""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    states = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_default_dtype(states[2])
