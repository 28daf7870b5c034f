"""What the single pass holds beside its inputs and gradients: a backend's head keeps to it, and `tbrm plan` counts with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK_BYTES_PER_VOCABULARY_ENTRY = {"cpu": 1024, "cuda": 16384}
"""The default of `max_chunk_bytes` by device, times V. On a CPU room for 512 tokens in bfloat16 and 256 in float32 (32 MiB
at V = 32768); on a GPU for 8192 and 4096, so that the products outweigh reading and writing the weight's gradient once per
chunk."""

STRIP = 32  # tokens that the C++ kernels take at a time: kStrip in csrc/softmax_tile.h
ALIGNMENT = 16  # bytes of a base address, elements of a stride and of a width, in the Triton kernels


@dataclass(frozen=True)
class HeadMemory:
    """Of a head [V, D]."""

    token_bytes: int
    """Of a token's logits in the scratch memory."""
    sum_bytes: int
    """What the weight's gradient takes beyond its own memory where there are several chunks, and not where there is one."""
    usual_bytes: int
    """What the logits of a chunk may take where nothing is said and there are several."""
    strip: int = 1
    """Chunks of so many tokens and more are multiples of it."""

    def chunk_tokens(self, tokens: int, max_bytes: int | None, *, weight_grad: bool) -> int:
        """How many of `tokens` a chunk may have, at least the fewest that can be handled. With no `max_bytes` all of them, if
        that takes no more memory than several chunks and the sum of their gradients do."""
        if max_bytes is not None:
            return self._within(max_bytes)
        alone = self._within(self.usual_bytes + weight_grad * self.sum_bytes)
        return alone if tokens <= alone else self._within(self.usual_bytes)

    def _within(self, max_bytes: int) -> int:
        tokens = max_bytes // self.token_bytes
        return max(1, tokens if tokens < self.strip else tokens // self.strip * self.strip)


def cpu_head_memory(vocab: int, width: int, weight: torch.dtype, scratch: torch.dtype) -> HeadMemory:
    """Of the C++ kernels. A bfloat16 weight's gradient waits with its upper halves in place; float16's is held in float32."""
    halves = 2 * vocab * width if weight == torch.bfloat16 else 0
    usual = CHUNK_BYTES_PER_VOCABULARY_ENTRY["cpu"] * vocab
    return HeadMemory(scratch.itemsize * vocab, halves, usual, STRIP)  # fewer than a strip take as much as one


def torch_head_memory(vocab: int, compute: torch.dtype, device: str) -> HeadMemory:
    """Of plain PyTorch."""
    per_entry = CHUNK_BYTES_PER_VOCABULARY_ENTRY
    return HeadMemory(compute.itemsize * vocab, 0, per_entry.get(device, per_entry["cpu"]) * vocab)


def triton_head_memory(vocab: int, width: int, weight: torch.dtype, *, exps: bool) -> HeadMemory:
    """Of the Triton kernels, which keep bfloat16 exponentials of the logits, in aligned rows, or float32 logits."""
    row = 2 * -(-vocab // ALIGNMENT) * ALIGNMENT if exps else 4 * vocab
    total = 4 * vocab * width if exps and weight == torch.bfloat16 else 0
    return HeadMemory(row, total, CHUNK_BYTES_PER_VOCABULARY_ENTRY["cuda"] * vocab)
