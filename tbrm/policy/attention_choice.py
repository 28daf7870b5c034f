"""Which attention a packed batch gets, and why not another: what the machine has, and what the model asks of it.

On a GPU all of a batch is one kernel, in this order: flash-attn's, where it is installed; torch's copy of it
(`torch.nn.attention.varlen`); FlexAttention, which is compiled for what that copy cannot do. On a CPU, and where none of them
fits, each segment is a call of torch's SDPA.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Literal

import torch
from transformers import PreTrainedModel

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.policy.flash_attention import FLASH_ATTENTION, VARLEN_ATTENTION
from tbrm.policy.flex_attention import FLEX_ATTENTION
from tbrm.policy.packed_attention import PACKED_ATTENTION

Kind = Literal["flash", "varlen", "flex", "sdpa"]
NAMES: dict[Kind, str] = {
    "flash": FLASH_ATTENTION,
    "varlen": VARLEN_ATTENTION,
    "flex": FLEX_ATTENTION,
    "sdpa": PACKED_ATTENTION,
}
"""What transformers knows each of them by; the first that fits is taken."""
_WIDEST_HEAD = 256
_NARROWEST_IN_TRITON = 16


def choose_attention(config: ModelConfig, lm: PreTrainedModel) -> Kind:
    """Raises ConfigError where the one that the config names cannot be."""
    device, precision = config.device_and_precision()
    if config.attention == "auto":
        return next(kind for kind in NAMES if not (unusable(kind, device, precision) or unfit(kind, lm)))
    reason = unusable(config.attention, device, precision) or unfit(config.attention, lm)
    if reason:
        raise ConfigError(f"model.attention: {config.attention}; {reason}: set it to auto")
    return config.attention


def unusable(kind: Kind, device: torch.device, precision: torch.dtype) -> str | None:
    """Why this machine has no such attention, if so."""
    if kind == "sdpa":
        return None
    if reason := impossible(device, precision):
        return reason
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"wants a GPU of compute capability 8.0 or more, and {torch.cuda.get_device_name(device)} has less"
    if kind == "flash":
        installed = importlib.util.find_spec("flash_attn") is not None
        return None if installed else "wants flash-attn, which is not installed (pip install 'tbrm[gpu]')"
    if kind == "varlen":
        built = torch.backends.cuda.is_flash_attention_available()
        return None if built else f"torch {torch.__version__} is built without flash-attention's kernels"
    if importlib.util.find_spec("triton") is None:
        return "wants Triton, which is not installed"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), "")
    return None if shutil.which(compiler) else "wants a C compiler, for what Triton builds (gcc, or name yours by CC)"


def impossible(device: torch.device, precision: torch.dtype) -> str | None:
    """Why no attention of one kernel can be, on any such device."""
    if device.type == "cuda" and precision is torch.bfloat16:
        return None
    return f"wants a GPU and bfloat16, and this is {device} and {str(precision).removeprefix('torch.')}"


def unfit(kind: Kind, lm: PreTrainedModel) -> str | None:
    """Why the model cannot have such attention, if so."""
    if kind == "sdpa":
        return None
    widths = _head_widths(lm)
    if max(widths) > _WIDEST_HEAD:
        return f"heads are {max(widths)} wide in {type(lm).__name__}, and may be {_WIDEST_HEAD}"
    if kind == "varlen" and getattr(lm.config.get_text_config(), "attn_logit_softcapping", None):
        return f"{type(lm).__name__} soft-caps its scores, which torch's varlen_attn does not"
    if kind == "flex" and min(widths) < _NARROWEST_IN_TRITON:
        return f"heads are {min(widths)} wide in {type(lm).__name__}, and must be {_NARROWEST_IN_TRITON} at least"
    return None


def _head_widths(lm: PreTrainedModel) -> set[int]:
    """Of all layers, which need not have the same: by the attributes that attention modules keep them under."""
    names = ("head_dim", "qk_head_dim", "v_head_dim", "head_size")
    widths = {getattr(module, name, None) for module in lm.modules() for name in names}
    found = {width for width in widths if isinstance(width, int)}
    text = lm.config.get_text_config()
    return found or {text.hidden_size // text.num_attention_heads}
