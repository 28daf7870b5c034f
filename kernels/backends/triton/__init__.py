"""The Triton backend, for NVIDIA GPUs of compute capability 8.0 and later, in bfloat16 and float32.

With TRITON_INTERPRET=1 it runs on the CPU too, slowly: that is how its kernels are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED:
    from .head import Head as Head
    from .head import token_stats_backward as token_stats_backward
    from .head import token_stats_forward as token_stats_forward
    from .launch import INTERPRETED
    from .multiply import multiply_ as multiply_
    from .segments import Residual as Residual
    from .segments import residual_gradients as residual_gradients


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if not INSTALLED:
        return "triton is not installed: pip install triton"
    if dtype not in (torch.float32, torch.bfloat16):  # derivatives of a large vocabulary underflow in float16
        return f"its kernels do not take {dtype}"
    if device.type == "cpu":
        return None if INTERPRETED else "it runs on NVIDIA GPUs (on the CPU with TRITON_INTERPRET=1, to test it)"
    return _why_not_gpu(device)


@cache
def _why_not_gpu(device: torch.device) -> str | None:
    """Asked once: it stands at the beginning of every call."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return "it runs on NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs compute capability 8.0 or later, and this GPU has {'.'.join(map(str, capability))}"
    return None
