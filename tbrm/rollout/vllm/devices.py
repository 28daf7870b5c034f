"""Which GPUs, or cores of a CPU, each of the servers that we start is given: by variables of its environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from tbrm.config.section import ConfigError
from tbrm.config.vllm import VllmConfig

Item = TypeVar("Item")

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_CORES = "VLLM_CPU_OMP_THREADS_BIND"


def gpu_of(device: torch.device) -> str:
    """What this process trains on, by its name for CUDA_VISIBLE_DEVICES; "" if on a CPU."""
    if device.type != "cuda":
        return ""
    return _visible_gpus()[torch.cuda.current_device() if device.index is None else device.index]


def places(config: VllmConfig, device: torch.device, taken: Sequence[str]) -> list[dict[str, str]]:
    """The environment of each server. `taken`: GPUs of the trainer's processes, which are given last."""
    if device.type == "cuda":
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus)} for gpus in deal_gpus(config, _visible_gpus(), taken)]
    if _CORES in os.environ or (config.servers == 1 and not config.devices):
        return [{}] * config.servers  # vLLM's own choice, or the user's
    return [{_CORES: bound} for bound in deal_cores(config, _cores())]


def deal_gpus(config: VllmConfig, visible: Sequence[str], taken: Sequence[str]) -> list[list[str]]:
    """As many for each server as its workers, in turn; from the first again where they do not suffice. Raises ConfigError."""
    pool = [*(gpu for gpu in visible if gpu not in taken), *(gpu for gpu in visible if gpu in taken)]
    if config.devices:
        pool = _chosen(config, visible, f"CUDA_VISIBLE_DEVICES has {len(visible)} GPUs")
    size = _workers(config)
    if size > len(pool):
        raise ConfigError(
            f"rollout.vllm.options: {', '.join(key for key in _SIZES if key in config.options)} ask for {size} GPUs a server, "
            f"and there are {len(pool)}: lower it, or list more in rollout.vllm.devices"
        )
    return [[pool[(n * size + i) % len(pool)] for i in range(size)] for n in range(config.servers)]


def deal_cores(config: VllmConfig, cores: Sequence[int]) -> list[str]:
    """A part of the cores for each server, as vLLM wants it said: its workers' parts apart. By its own choice, all servers
    would compute on the same cores."""
    if config.devices:
        cores = _chosen(config, range(max(cores) + 1), f"cores are numbered from 0 to {max(cores)}")
    size = _workers(config)
    parts = [",".join(map(str, part)) for part in _divide(cores, config.servers * size)]
    return ["|".join(parts[n * size : (n + 1) * size]) for n in range(config.servers)]


def _divide(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    if len(items) < count:
        return [[items[n % len(items)]] for n in range(count)]
    return [items[n * len(items) // count : (n + 1) * len(items) // count] for n in range(count)]


def _chosen(config: VllmConfig, known: Sequence[Item], limit: str) -> list[Item]:
    if max(config.devices) >= len(known):
        raise ConfigError(f"rollout.vllm.devices: {max(config.devices)}, but {limit}; numbers start at 0")
    return [known[number] for number in config.devices]


def _workers(config: VllmConfig) -> int:
    return prod(int(config.options.get(size, 1)) for size in _SIZES)


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return list(names)[:count]


def _cores() -> list[int]:
    """Those that we may use, one of the siblings that share a real one."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    first: dict[str, int] = {}
    for core in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text() if siblings.exists() else str(core), core)
    return list(first.values())
