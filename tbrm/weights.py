"""Weights on disk: safetensors files, whole or in the slices of many processes, read slice by slice into a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def read_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills `tensors` from the safetensors files of `folder`; of a sharded tensor each process reads its slice alone.

    Raises ValueError if a tensor is missing there or has another shape, or a file is damaged.
    """
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if name not in found:
            near = ", ".join(list(found)[:3]) or "nothing"
            raise ValueError(
                f"{folder} holds no weight called {name!r} (it holds {near}, ...): save the model anew with transformers' "
                "save_pretrained, or name another folder"
            )
        if found[name].size != tensor.shape:  # type: ignore[union-attr]
            wanted = list(tensor.shape)
            raise ValueError(f"{folder}: {name} has shape {list(found[name].size)}, the model's is {wanted}")  # type: ignore[union-attr]
    reader = HuggingFaceStorageReader(str(folder))
    alone = not dist.is_initialized()
    dcp.load({name: tensor.detach() for name, tensor in tensors.items()}, storage_reader=reader, no_dist=alone)


_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


@torch.no_grad()
def write_whole(
    tensors: Mapping[str, Tensor], gathered: Iterable[Tensor], path: Path | None, dtype: torch.dtype
) -> None:
    """Writes one safetensors file, floating point numbers as `dtype`.

    `tensors` say names and shapes, and `gathered` gives the values of each in turn, whole, so that no process need ever hold
    the model. All processes call this, and those that only help to gather have no path.
    """

    def stored(tensor: Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * stored(tensor).itemsize
        kind = _SAFETENSORS_TYPES[stored(tensor)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if path else nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for values in gathered:
            if file is not None:
                file.write(values.to("cpu", stored(values)).contiguous().flatten().view(torch.uint8).numpy().data)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in slices; all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def materialise(lm: PreTrainedModel, weights_on: torch.device, device: torch.device) -> None:
    """Gives a model of the meta device memory: weights, still to be read, on `weights_on`; buffers, with their values, on
    `device`."""
    lm.to_empty(device=weights_on)
    lm.tie_weights()
    # What is left of transformers' initialisation, with every weight marked as done, is buffers such as rotary angles.
    for tensor in lm.parameters():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in lm.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    lm.initialize_weights()
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
