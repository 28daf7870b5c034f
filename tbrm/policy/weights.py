"""Weights on disk: safetensors files, whole or in the slices of many processes, read slice by slice into a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from tbrm.storage.names import is_plain_name


@dataclass
class StoredTensor:
    """A tensor on disk: whole in one file, or in the slices of the processes that wrote it."""

    name: str
    pieces: list[tuple[Any, tuple[slice, ...]]]
    """The open file of each, and which part of the tensor it is."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size(
            max(ends) for ends in zip(*([s.stop for s in where] for _, where in self.pieces), strict=True)
        )

    @torch.no_grad()
    def read_into(self, tensor: Tensor) -> None:
        """Fills a tensor of this shape; of a sharded one this process's slice."""
        local, wanted = local_part(tensor)
        for file, found in self.pieces:
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(wanted, found, strict=True)]
            if all(part.start < part.stop for part in both):
                values = file.get_slice(self.name)[_within(both, found)] if both else file.get_tensor(self.name)
                local[_within(both, wanted)].copy_(values)

    def read(self) -> Tensor:
        """All of it, in the type that it is stored in."""
        parts = [(file.get_tensor(self.name), where) for file, where in self.pieces]
        if len(parts) == 1:
            return parts[0][0]
        tensor = parts[0][0].new_empty(self.shape)
        for values, where in parts:
            tensor[where] = values
        return tensor


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What lies on this process of a tensor that may be sharded, and which part of the whole that is. Without gradient."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _within(part: Iterable[slice], whole: Iterable[slice]) -> tuple[slice, ...]:
    """A part as it is counted from the beginning of what holds it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Of a folder's safetensors files, or of one file, by name. Raises ValueError if there are none, or they are damaged."""
    found: dict[str, StoredTensor] = {}
    try:
        for path in _files(folder):
            file = safe_open(path, "pt")
            offsets = json.loads((file.metadata() or {}).get(CUSTOM_METADATA_KEY, "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                shape = file.get_slice(name).get_shape()
                begins = offsets[name][SAVED_OFFSETS_KEY] if name in offsets else [0] * len(shape)
                part = tuple(slice(begin, begin + size) for begin, size in zip(begins, shape, strict=True))
                found.setdefault(name, StoredTensor(name, [])).pieces.append((file, part))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    for tensor in found.values():
        held = sum(prod(s.stop - s.start for s in part) for _, part in tensor.pieces)
        if held != tensor.shape.numel():
            raise ValueError(
                f"the weights in {folder} cannot be read: the parts of {tensor.name} do not make one tensor; is a file missing?"
            )
    return found


def _files(folder: Path) -> list[Path]:
    """The files of a model, as transformers chooses among them: one, those that an index names, or those of many processes."""
    index = folder / "model.safetensors.index.json"
    if folder.is_file():
        return [folder]
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if odd := [name for name in names if not is_plain_name(name)]:
            raise ValueError(f"{index.name} names {odd[0]!r}, which is no file of this folder")
        return [folder / name for name in names]
    if slices := sorted(folder.glob("shard-*.safetensors")):
        return slices
    raise ValueError("there is no model.safetensors, and no model.safetensors.index.json that names other files")


def read_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills `tensors` from the files of `folder`, which hold them by these very names.

    Raises ValueError if a tensor is missing there or has another shape, or a file is damaged.
    """
    found = stored_tensors(folder)
    for name, tensor in tensors.items():
        if name not in found:
            near = ", ".join(list(found)[:3]) or "nothing"
            raise ValueError(f"{folder} holds no weight called {name!r} (it holds {near}, ...)")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(found[name].shape)}, the model's is {list(tensor.shape)}"
            )
        found[name].read_into(tensor)


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


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


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
