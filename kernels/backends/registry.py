"""The backends there are, and the choice between them. A new backend is a module and one entry in `_BACKENDS`."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import torch

from . import cpu
from . import torch as torch_backend
from . import triton as triton_backend
from .interface import Backend

# In the order in which "auto" tries them. "torch" is last: it runs everywhere.
_BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton_backend, "torch": torch_backend}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on a device and, where it cannot, the reason ("" where it can)."""

    usable: bool
    reason: str


def backends(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> dict[str, BackendStatus]:
    """Each backend, whether it can run, and why not.

    Args:
        device: where the tensors are; by default the GPU if there is one, else the CPU.
        dtype: of hidden and weight.

    Returns:
        A `BackendStatus(usable, reason)` to each name, in the order of preference: `backend="auto"` takes the first usable
        one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reasons = {name: backend.why_not(device, dtype) for name, backend in _BACKENDS.items()}
    return {name: BackendStatus(usable=reason is None, reason=reason or "") for name, reason in reasons.items()}


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name`, or for "auto" the preferred one of those that can multiply the dtype on the device.

    Raises ValueError for an unknown name, and RuntimeError with the reason for a backend that cannot run here.
    """
    if name == "auto":
        chosen = next(backend for backend in _BACKENDS.values() if backend.why_not(device, dtype) is None)
        if chosen is torch_backend and device.type == "cpu":
            _warn_if_not_built()
        return chosen
    if name not in _BACKENDS:
        raise ValueError(f"backend is {name!r}: it must be one of {', '.join(['auto', *_BACKENDS])}")
    if (reason := _BACKENDS[name].why_not(device, dtype)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run on {device} in {dtype}: {reason}")
    return _BACKENDS[name]


def _warn_if_not_built() -> None:
    if sys.platform == "linux" and (reason := cpu.not_loaded()) is not None:
        warnings.warn(f"tbrm_kernels: plain torch is used, which takes longer: {reason}", stacklevel=3)
