"""What the entry points ask of their arguments.

Shapes, dtypes and devices are looked at wherever tensors are only described (fake and meta tensors, `torch.compile`); values
(`check_values`) where there are some.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.interface import TokenStatsOptions
from .trajectory import check_tensors

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def only_described(hidden: Tensor) -> bool:
    """Whether tensors are described and hold nothing: under torch.compile, fake ones, and those on the meta device."""
    return torch.compiler.is_compiling() or hidden.is_meta or type(hidden).__name__ == "FakeTensor"


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply the two."""
    device_type = hidden.device.type
    # Autocast leaves float64 alone.
    autocast = not hidden.is_meta and torch.is_autocast_enabled(device_type)  # there is none on meta
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one to the dtype of the other")
    return hidden.dtype


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor
) -> None:
    tensors = {"hidden": hidden, "weight": weight, "targets": targets} | ({} if bias is None else {"bias": bias})
    check_tensors(**tensors)
    if isinstance(temperature, Tensor):
        tensors["temperature"] = temperature
    for name, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor":  # by name, since importing the class takes a second
            raise TypeError(f"{name} is a DTensor: pass a plain tensor, such as {name}.full_tensor()")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move them to one device")
        if name != "targets" and tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} is {tensor.dtype}: it must be one of {', '.join(map(str, _FLOATS))}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}: it must be torch.int64")

    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden has shape {list(hidden.shape)}: it must be [T, D > 0] (flatten batch and sequence)")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {list(weight.shape)}: it must be [V > 0, D = {hidden.shape[1]}]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {list(targets.shape)}: it must be [T = {hidden.shape[0]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}: it must be [V = {weight.shape[0]}]")
    if isinstance(temperature, Tensor):
        if temperature.shape != hidden.shape[:1]:
            raise ValueError(
                f"temperature has shape {list(temperature.shape)}: it must be a number or [T = {hidden.shape[0]}]"
            )
        if temperature.requires_grad:
            raise ValueError("temperature requires grad, but gets no gradient here: pass temperature.detach()")


def check_per_token(per_token: Sequence[Tensor], hidden: Tensor) -> None:
    for i, values in enumerate(per_token):
        check_tensors(**{f"per_token[{i}]": values})
        if values.shape[:1] != hidden.shape[:1] or values.device != hidden.device or not values.is_floating_point():
            raise ValueError(
                f"per_token[{i}] is {list(values.shape)} {values.dtype} on {values.device}: it must be floating-point, "
                f"[T = {hidden.shape[0]}, ...] on {hidden.device}"
            )


def needs_gradient(values: Tensor | None) -> bool:
    return values is not None and torch.is_grad_enabled() and values.requires_grad


def temperatures(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """As `TokenStatsOptions` wants them, for operands of the dtype."""
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.to(TokenStatsOptions(dtype).compute_dtype).contiguous()


def check_values(targets: Tensor, vocab: int, options: TokenStatsOptions) -> None:
    ignored = options.ignore_index
    _check_each(
        "targets",
        targets,
        ((targets >= 0) & (targets < vocab)) | (targets == ignored),
        f"targets must lie in [0, {vocab}) or be ignore_index ({ignored})",
    )
    if isinstance(options.temperature, Tensor):
        temperature = options.temperature
        right = (temperature > 0) & (temperature < torch.inf)
        _check_each("temperature", temperature, right, "temperature must be finite and above 0")


def _check_each(name: str, values: Tensor, right: Tensor, wanted: str) -> None:
    if values.device.type == "cuda":
        torch._assert_async(right.all(), wanted)  # reading the answer here would be a sync point
    elif not right.all():
        position = int((~right).nonzero()[0])
        raise ValueError(f"{name}[{position}] is {values[position].item()}: {wanted}")
