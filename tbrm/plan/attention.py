"""Attention as a plan has it: on a GPU one kernel, of which shapes alone are known here, and so what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from tbrm.config.model import ModelConfig
from tbrm.policy.attention_choice import impossible, unfit
from tbrm.policy.flash_attention import VARLEN_ATTENTION, Paths, varlen_attention
from tbrm.policy.packed_attention import PACKED_ATTENTION
from tbrm.trajectories.packing import FORMS, Segment

_PLANNED_FLEX = "tbrm_planned_flex"


def planned_attention(config: ModelConfig, precision: torch.dtype, lm: PreTrainedModel) -> str:
    """The name of one that keeps what the run's will, on the device that is planned for rather than on this machine's."""
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    if config.attention == "sdpa" or impossible(device, precision) or unfit("flash", lm):
        return PACKED_ATTENTION
    if config.attention == "flex" or unfit("varlen", lm):
        return _PLANNED_FLEX
    return VARLEN_ATTENTION  # flash-attn keeps the same


def _flex(*inputs: Any, softcap: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """FlexAttention is compiled, which tensors without memory cannot be; it keeps what the other kernel does of one sequence:
    queries, keys, values, the output and a float32 of each of its rows."""
    return varlen_attention(*inputs, **options)


def _one_sequence(segments: Sequence[Segment], device: torch.device) -> Paths:
    return Paths.of([Segment(0, segments[-1].stop, 0, ())], device)


AttentionInterface.register(_PLANNED_FLEX, _flex)
FORMS[_PLANNED_FLEX] = _one_sequence
