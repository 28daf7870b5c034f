"""What tests do to a vLLM server that the trainer has started: find its processes, kill them, look for what is left."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tbrm.rollout.split import SplitEngine
from tbrm.rollout.vllm.engine import VllmEngine
from tbrm.training.trainer import Trainer


class Left:
    """What a server could leave behind: its group of processes, and their files."""

    def __init__(self, group: int, *folders: Path) -> None:
        self.group = group
        self.folders = set(folders)
        self.paths = {*folders}
        for process in self.processes():
            maps = Path(f"/proc/{process}/maps").read_text()
            self.paths |= {Path(name) for name in re.findall(r"/dev/shm/\S+", maps)}
        assert self.processes()
        assert len(self.paths) > 2

    @classmethod
    def of(cls, engine: VllmEngine) -> Left:
        return cls(engine._keepers[0]._process._guard.pid, *engine._guard._folders)

    def processes(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(") ")[2].split()[:3]
            except OSError:
                continue
            found += [int(stat.parent.name)] if int(group) == self.group and state != "Z" else []
        return found

    def nothing(self) -> bool:
        return not self.processes() and not any(path.exists() for path in self.paths)


def wait_until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def signal_process(engine: VllmEngine, name: str, number: signal.Signals) -> None:
    group = engine._keepers[0]._process._guard.pid
    for process in Left.of(engine).processes():
        if name in Path(f"/proc/{process}/cmdline").read_text():
            assert os.getpgid(process) == group
            os.kill(process, number)


def kill_worker(engine: VllmEngine) -> None:
    """SIGKILL to the process that computes."""
    signal_process(engine, "VLLM::Worker", signal.SIGKILL)


def kill_core_of_a_call(engine: VllmEngine) -> None:
    """While it waits for the worker. Then the server, which lives, answers the call never."""
    signal_process(engine, "VLLM::Worker", signal.SIGSTOP)
    threading.Timer(1.0, signal_process, [engine, "VLLM::EngineCore", signal.SIGKILL]).start()


def guards_of(trainer: int, kind: str) -> list[tuple[int, list[str]]]:
    """Process ids and commands of what guards a trainer's servers, or its folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(") ")[2].split()[1]
            command = (folder / "cmdline").read_text().split("\0")[:-1]
        except OSError:
            continue
        if parent == str(trainer) and kind in command:
            found.append((int(folder.name), command))
    return found


def engine_of(trainer: Trainer) -> VllmEngine:
    assert isinstance(trainer.engine, SplitEngine)
    assert isinstance(trainer.engine.engine, VllmEngine)
    return trainer.engine.engine


@torch.no_grad()
def change_weights(trainer: Trainer) -> None:
    for parameter in trainer.policy.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
