"""How the weights of a model are cut over processes: PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tbrm.config.training import ParallelConfig


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model are cut over a mesh: a slice of each on every process.

    Each block is gathered when it runs; the rest (embeddings, last norm, head) for the whole of the model's forward, so a
    loss that uses the head's weight must be computed within that. Weights and gradients are float32; weights are gathered in
    `precision`, gradients summed (not averaged) over the processes in float32.
    """

    mesh: DeviceMesh
    config: ParallelConfig
    precision: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.mesh.device_type)

    @property
    def weights_device(self) -> torch.device:
        """Where the slices are kept between passes."""
        return torch.device("cpu") if self.config.cpu_offload else self.device

    def of_reference(self) -> Sharding:
        """How the reference is cut: as the policy is, but perhaps kept on the CPU."""
        offload = self.config.cpu_offload or self.config.offload_reference
        return replace(self, config=self.config.model_copy(update={"cpu_offload": offload}))

    @property
    def weights_mesh(self) -> DeviceMesh:
        """Over which each weight lies: without the dimension that holds copies, where there is but one."""
        return self.mesh if self.mesh["replicate"].size() > 1 else self.mesh["shard"]

    def apply(
        self, model: nn.Module, blocks: Sequence[nn.Module], *, trained: bool, divided: set[nn.Parameter]
    ) -> None:
        """Cuts the weights of `model`, which may be on the meta device, but for those that are `divided` already. Unless
        `trained`, no backward pass will follow its forward, and nothing stays gathered after it."""
        options: dict[str, Any] = {
            "mesh": self.weights_mesh,
            # Inputs are left alone: rounded rotary angles would misplace tokens.
            "mp_policy": MixedPrecisionPolicy(self.precision, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self.config.cpu_offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.config.reshard_after_forward or not trained, **options)
        fully_shard(model, reshard_after_forward=not trained, ignored_params=divided, **options)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it sums
        # What the backward pass gathers ahead is the block before: not, as FSDP2 has it unless told, what ran before in any
        # forward since the last backward. Generation runs blocks too, and not equally often on all processes.
        order = [model, *blocks]
        for after, ahead in zip(order, order[-1:] + order[:-1], strict=True):
            assert isinstance(after, FSDPModule) and isinstance(ahead, FSDPModule)
            after.set_modules_to_backward_prefetch([ahead])

    def reshard(self, model: nn.Module) -> None:
        """Gives back what a forward without a backward has left gathered, and the records of it that FSDP2 keeps."""
        for module in _sharded(model):
            module.reshard()
        if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):  # from torch 2.13 on
            model.reset_iter_state()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Within it every process holds all weights of the (trained) model, and may run it, or parts of it, at will."""
        for module in _sharded(model):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            self.reshard(model)
            for module in _sharded(model):
                keeps = module is model or not self.config.reshard_after_forward
                module.set_reshard_after_forward(not keeps, recurse=False)


def accumulate(model: nn.Module, *, reduce: bool) -> None:
    """Whether the next backward pass sums the gradients over the processes, or leaves that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
