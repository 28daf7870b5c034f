"""`tbrm doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import tbrm
from tbrm.commands.command import Command
from tbrm.commands.table import table

if TYPE_CHECKING:
    import torch

    from tbrm.policy.attention_choice import Kind

_OPTIONAL = {
    "peft": ("peft", "lora", "LoRA adapters (lora.rank)"),
    "wandb": ("wandb", "wandb", "logging.wandb"),
    "math_verify": ("math-verify", "math", "the verifier math_verify"),
    "pyarrow": ("pyarrow", "parquet", "tasks from Parquet files"),
    "gguf": ("gguf", "gguf", "tbrm import-gguf"),
}


def arguments(_: argparse.ArgumentParser) -> None:
    """Takes none."""


def run(_: argparse.Namespace) -> None:
    print(table(_examine(), ("what", "usable", "detail")))


def _examine() -> list[tuple[str, str, str]]:
    """Rows of (what, "yes" or "no", detail)."""
    import torch

    from tbrm.config.model import ModelConfig
    from tbrm.policy.attention_choice import NAMES
    from tbrm_kernels import backends

    model = ModelConfig(name="any")
    device = model.resolve_device()
    rows = [
        ("tbrm", "yes", tbrm.__version__),
        ("python", "yes", platform.python_version()),
        (
            "torch",
            "yes",
            f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        ),
        *_gpus(),
        ("device", "yes", f"model.device auto takes {device}; model.precision auto takes {model.resolve_precision()}"),
    ]
    for name, status in backends(device).items():
        rows.append((f"kernels: {name}", "yes" if status.usable else "no", status.reason))
    rows += [_attention(kind, device, model.resolve_precision()) for kind in NAMES]
    for module, (package, extra, purpose) in _OPTIONAL.items():
        rows.append(_package(module, package, extra, purpose))
    rows += [_vllm(), _sandbox()]
    for compiler in ("c++", "nvcc"):
        path = shutil.which(compiler)
        rows.append((compiler, "yes" if path else "no", path or "not on PATH"))
    return rows


def _gpus() -> list[tuple[str, str, str]]:
    import torch

    if not torch.cuda.is_available():
        built = "torch sees no NVIDIA GPU" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        return [("cuda", "no", built)]
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        (f"cuda:{i}", "yes", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
        for i, p in enumerate(properties)
    ]


_ATTENTION: dict[Kind, str] = {
    "flash": "flash-attn: one kernel for a batch, model.attention auto's first choice",
    "varlen": "torch.nn.attention.varlen: one kernel for a batch, auto's choice without flash-attn",
    "flex": "FlexAttention, compiled: auto's choice without flash-attn for models that soft-cap scores (Gemma 2)",
    "sdpa": "torch's SDPA, segment by segment: auto's choice where none of the others is usable, or for heads wider than 256",
}


def _attention(kind: Kind, device: torch.device, precision: torch.dtype) -> tuple[str, str, str]:
    from tbrm.policy.attention_choice import unusable

    reason = unusable(kind, device, precision)
    return f"attention: {kind}", "no" if reason else "yes", reason or _ATTENTION[kind]


def _vllm() -> tuple[str, str, str]:
    from tbrm.rollout.vllm.process import check_installed

    try:
        return "vllm", "yes", f"{check_installed()}, for rollout.engine=vllm"
    except (ModuleNotFoundError, ValueError) as error:
        return "vllm", "no", str(error)


def _sandbox() -> tuple[str, str, str]:
    from tbrm.tasks.workers import Workers

    workers = Workers("tbrm.tasks.sandbox", count=1, memory_bytes=2**30)
    try:
        missing = workers.call("confine", seconds=60).value
    finally:
        workers.close()
    holds = "graders of responses see no files of yours, change none, start nothing and reach no network"
    return "sandbox", "no" if missing else "yes", "; ".join(missing) or holds


def _package(module: str, package: str, extra: str, purpose: str) -> tuple[str, str, str]:
    if importlib.util.find_spec(module) is None:
        return package, "no", f"not installed; for {purpose}: pip install 'tbrm[{extra}]'"
    try:
        return package, "yes", f"{version(package)}, for {purpose}"
    except PackageNotFoundError:
        return package, "yes", f"for {purpose}"


DOCTOR = Command(
    "doctor", "Show what is usable on this machine, what will be chosen, and why not the rest.", arguments, run
)
