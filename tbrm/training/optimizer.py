"""The optimiser: AdamW, which decays matrices alone, for each part of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tbrm.config.training import OptimConfig
from tbrm.policy.weights import read_weights, stored_tensors
from tbrm.storage.kept import Kept


class Part(NamedTuple):
    """What is trained by an optimiser of its own."""

    module: nn.Module
    weights: dict[str, nn.Parameter]
    """Those that learn, by the names that they have on disk, which no other part has."""
    rate: float = 1.0
    """Its learning rate, over that of the policy."""


class Optimisers(Kept):
    """Clip, step and keep the state of a model's parts, each for itself."""

    def __init__(self, parts: Mapping[str, Part], config: OptimConfig) -> None:
        self.parts = parts
        self._max_grad_norm = config.max_grad_norm
        self._optimisers = {name: make_optimizer(part, config) for name, part in parts.items()}

    def __getitem__(self, part: str) -> torch.optim.Optimizer:
        return self._optimisers[part]

    def clip(self) -> dict[str, Tensor]:
        """Scales each part's gradients down to the largest norm allowed; returns the norms that they had, [] each."""
        return {
            name: torch.nn.utils.clip_grad_norm_(list(part.weights.values()), self._max_grad_norm)
            for name, part in self.parts.items()
        }

    def step(self, learning_rate: float) -> None:
        for name, optimiser in self._optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * self.parts[name].rate
            optimiser.step()

    def zero_grad(self) -> None:
        for optimiser in self._optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the state; safetensors reads no slice of a tensor without dimensions, so AdamW's `step` gets one."""
        return {
            f"{name}/{key}": value[None] if value.dim() == 0 else value
            for part, optimiser in self._optimisers.items()
            for name, weight in self.parts[part].weights.items()
            for key, value in optimiser.state.get(weight, {}).items()
        }

    def restore(self, folder: Path) -> None:
        if not folder.exists():  # no step was ever taken
            return
        stored = stored_tensors(folder)
        for part, optimiser in self._optimisers.items():
            for name, weight in self.parts[part].weights.items():
                if f"{name}/step" not in stored:  # it never had a gradient
                    continue
                moments = {key: torch.zeros_like(weight.detach()) for key in ("exp_avg", "exp_avg_sq")}
                optimiser.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
        read_weights(self.tensors(), folder)


def make_optimizer(part: Part, config: OptimConfig) -> torch.optim.AdamW:
    """A norm's gain belongs near 1 and a bias where it is: neither is drawn to 0."""
    left_alone = set(_gains_and_biases(part.module))
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for weight in part.weights.values():
        groups[weight in left_alone or weight.dim() <= 1].append(weight)
    decays = (config.weight_decay, 0.0)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True) if group],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _gains_and_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """By their names, since their dimensions do not tell: a gain may be [heads, D], the biases of experts are [experts, D]."""
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, weight in module.named_parameters(recurse=False):
            if is_norm or name.endswith("bias"):
                yield weight
