"""What the passes over a model hold in memory, found by running its own code on tensors that have a shape and no memory.

Any architecture that transformers knows is planned for that way, by the kernels' own account of what they save. Memory is a
straight line in the number of packed tokens, of which two small batches give both ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbrm.policy.generation import generation_mode
from tbrm.policy.model import PolicyModel
from tbrm.rollout.kv_cache import CACHED_ATTENTION, KeyValueCache, Prompts, Reading
from tbrm.trajectories.packing import PackedBatch, pack
from tbrm.trajectories.trajectory import Trajectory

KV_TOKENS = 16


class Line(NamedTuple):
    """Bytes: `fixed + per_token * tokens`."""

    fixed: float
    per_token: float

    def __call__(self, tokens: int) -> int:
        return round(self.fixed + self.per_token * tokens)


@dataclass(frozen=True)
class Footprint:
    """Beyond the weights, and without their gradients."""

    kept: Line
    """What autograd keeps from the forward pass for the backward pass."""
    working: Line
    """What comes and goes on top of that, at most, in either pass."""
    scoring: Line
    """What a pass without gradient holds at most."""
    kv_per_token: float
    """Bytes of keys and values that a generated token leaves in the cache."""


def footprint(policy: PolicyModel, trajectories: Sequence[Trajectory]) -> Footprint:
    """Of a model on the meta device, which is of no use afterwards. `trajectories` are a few of a typical batch."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy.lm.to_empty(device="cpu")
        policy.lm.tie_weights()
        few, more = (_without_memory(pack(list(part)), fake) for part in ([], trajectories))
        tokens = [len(batch.inputs.input_ids) for batch in (few, more)]
        kept, working = zip(*(_train(policy, batch) for batch in (few, more)), strict=True)
        policy.requires_grad_(False)
        scoring = [_score(policy, batch) for batch in (few, more)]
        kv_per_token = _kv_bytes(policy) / KV_TOKENS
    return Footprint(_line(tokens, kept), _line(tokens, working), _line(tokens, scoring), kv_per_token)


def _line(tokens: Sequence[int], sizes: Sequence[int]) -> Line:
    slope = max(0.0, (sizes[1] - sizes[0]) / (tokens[1] - tokens[0]))
    return Line(max(0.0, sizes[0] - slope * tokens[0]), slope)


def _without_memory(batch: PackedBatch, fake: FakeTensorMode) -> PackedBatch:
    def tensors(part: object) -> dict[str, Any]:
        return {k: fake.from_tensor(v) for k, v in vars(part).items() if isinstance(v, Tensor)}

    return replace(batch, inputs=replace(batch.inputs, **tensors(batch.inputs)), **tensors(batch))


def _train(policy: PolicyModel, batch: PackedBatch) -> tuple[int, int]:
    """Bytes kept for the backward pass, and held at most beyond them."""
    # Gradients of weights are counted elsewhere: gone as soon as complete, and that of the embeddings not even made.
    policy.lm.get_input_embeddings().weight.requires_grad_(False)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with _LiveBytes(policy) as memory:
        with policy.autocast():
            hidden = batch.inputs.run(policy.lm)
            kept = memory.held
        hidden.backward(torch.empty_like(hidden))
        return kept, memory.peak - kept


@torch.no_grad()
def _score(policy: PolicyModel, batch: PackedBatch) -> int:
    with _LiveBytes(policy) as memory, policy.autocast():
        batch.inputs.run(policy.lm)
        return memory.peak


@torch.no_grad()
def _kv_bytes(policy: PolicyModel) -> int:
    cache = KeyValueCache(rows=1)
    cache.reserve(KV_TOKENS)
    nobody = torch.zeros(0, dtype=torch.int64)
    reading = Reading(cache, nobody, 0, [Prompts(first=0, count=1, start=0, length=KV_TOKENS)])
    ids = torch.arange(KV_TOKENS)[None]
    with generation_mode(policy, CACHED_ATTENTION) as lm:
        lm.base_model(input_ids=ids, position_ids=ids, reading=reading, use_cache=False)
    return cache.nbytes


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within it for as long as they live, but for those of the model itself."""

    def __init__(self, policy: PolicyModel) -> None:
        super().__init__()
        self.held = self.peak = 0
        known = [*policy.parameters(), *policy.buffers()]
        self._storages = weakref.WeakKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._storages:
                self._storages[storage] = None
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.held -= size
