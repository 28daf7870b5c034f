"""Packed batches of every shape, and attention to them as it is defined: one mask over all pairs, in whatever type is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tbrm.trajectories.packing import PackedBatch, Segment, pack
from tbrm.trajectories.trajectory import Trajectory


def packed(system: int, prompts: Sequence[int], responses: Sequence[Sequence[int]], longest: int = 0) -> PackedBatch:
    """Prompts of so many tokens, responses to each of so many, all after a system prompt; and one alone of `longest` tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    prefix, items = tokens(system), []
    for length, of_prompt in zip(prompts, responses, strict=True):
        prompt = prefix + tokens(length)
        items += [Trajectory(prompt, tokens(response), 0.0) for response in of_prompt]
    if longest:
        items.append(Trajectory(tokens(3), tokens(longest), 0.0))
    return pack(items)


def visible(segments: Sequence[Segment], window: int | None) -> Tensor:
    """[T, T] bool, by the paths that a token's predecessors make: prefix, prompt, its own response."""
    total = segments[-1].stop
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for segment in segments:
        branches = segment.branches or (segment.stop,)
        for start, stop in zip(branches, [*branches[1:], segment.stop], strict=True):
            path = torch.tensor([*range(segment.prefix), *range(segment.start, branches[0]), *range(start, stop)])
            behind = torch.arange(len(path))[:, None] - torch.arange(len(path))
            seen = (behind >= 0) & (behind < (window or len(path)))
            allowed[path[:, None], path] |= seen
    return allowed


def dense_attention(
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, value_dim]
    allowed: Tensor,
    scaling: float | None = None,
    bend: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # [1, T, heads, value_dim]
    """bend: of the scores; a soft cap is one."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if bend is None else bend(scores)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def outputs_and_gradients(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Of queries, keys and values, under a loss that weighs each entry of the output by itself."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attend(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]
