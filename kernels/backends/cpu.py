"""The CPU backend: the C++ kernels of csrc/head.cpp, for float32, bfloat16 and float16.

Exponentials instead of logits: the kernels keep e^(Q - m) of each tile, with m the tile's own maximum per token. Rounded to
bfloat16 that costs 2^-9 of a probability, where a rounded logit of 20 would cost 6%; and it leaves nothing but a
multiplication for the backward pass.

Operands are multiplied as bfloat16 only if they are and the processor can; else as float32, exactly. All sums are float32.

Memory beyond inputs and outputs: a chunk's exponentials, [V, tokens] in the type of the products, and 1/64 of that; for
`linear_token_stats` CHUNK_TOKENS at a time. Where a 16-bit weight's gradient is summed over several chunks, also the lower
halves of its float32 sum, as much memory as the gradient itself, which holds the upper ones meanwhile.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .head_memory import STRIP, cpu_head_memory
from .interface import HeadGrads, Needs, RowGrads, RowStats, TokenStatsOptions
from .kept_rows import KeptRows
from .library import NOTE, library_name

CHUNK_TOKENS = 512

_FOLDER = Path(__file__).parents[1]
_AGAIN = "where torch and a C++ compiler are (pip install --force-reinstall --no-deps --no-binary tbrm tbrm)"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it runs on the CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels do not take {dtype}"
    return not_loaded()


@cache
def not_loaded() -> str | None:
    """Loads the library for this processor and this torch; what is wrong if it cannot."""
    if sys.platform != "linux":
        return "its kernels are built on Linux alone"
    capability = torch.backends.cpu.get_cpu_capability()
    library = _FOLDER / f"{library_name(capability, torch.__version__)}.abi3.so"
    if not library.exists():
        return f"{_missing(capability)}: install tbrm again, {_AGAIN}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"its kernels do not fit this torch {torch.__version__} ({error}): install tbrm again, {_AGAIN}"
    return None


def _missing(capability: str) -> str:
    others = [path.name.partition("_torch")[2] for path in _FOLDER.glob(f"_cpu_{capability.lower()}_torch*.so")]
    if others:  # not loaded: it might crash, since the layout of torch's objects changes
        built = " and ".join(sorted(name.partition(".")[0].replace("_", ".") for name in others))
        return f"its kernels are built for torch {built}, and this is {torch.__version__}"
    if (_FOLDER / NOTE).exists():
        return f"its kernels could not be built ({(_FOLDER / NOTE).read_text().strip()})"
    return f"its kernels are not built for {capability}"


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, and torch may use them (ATEN_CPU_CAPABILITY); without
    them float32 is several times faster."""
    able = torch.cpu.get_capabilities()
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(allowed and (able.get("avx512_bf16") or able.get("amx_bf16")))


def token_stats_forward(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    options: TokenStatsOptions,
) -> tuple[Tensor, RowStats]:
    head = Head(weight, bias, options)
    slices = _slices(len(targets), CHUNK_TOKENS)
    parts = [Chunk(head, hidden[s], targets[s], options.of(s), keep=False) for s in slices]
    if len(parts) == 1:
        return parts[0].logprobs, parts[0].stats
    whole = [torch.cat(x) for x in zip(*((p.logprobs, p.stats.max, p.stats.log_sum) for p in parts), strict=True)]
    entropies = [p.stats.entropy for p in parts if p.stats.entropy is not None]
    return whole[0], RowStats(whole[1], whole[2], torch.cat(entropies) if entropies else None)


def token_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: TokenStatsOptions,
    stats: RowStats,
    grads: RowGrads,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    head = Head(weight, bias, options)
    into = HeadGrads(hidden, weight, options, needs)
    for tokens in _slices(len(targets), CHUNK_TOKENS):
        chunk = head.chunk(hidden[tokens], targets[tokens], options.of(tokens))
        chunk.backward(grads.of(tokens), into, tokens, last=tokens.stop == len(targets))
    return into.finish(bias)


class Head:
    """A head whose weight has the dtype of the products (but for float16, which is cast up block by block)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> None:
        held = weight.dtype
        weight = weight.to(options.operand_dtype)
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.options = options
        self.bfloat16 = weight.dtype == torch.bfloat16 and multiplies_bfloat16()
        self.scratch_dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        vocab, width = weight.shape
        self.memory = cpu_head_memory(vocab, width, held, self.scratch_dtype)
        self._scratch = torch.empty(0, dtype=self.scratch_dtype)

    def chunk(self, hidden: Tensor, targets: Tensor, options: TokenStatsOptions) -> Chunk:
        """Valid until the next call: chunks share their scratch memory, since new pages cost as much as filling them."""
        return Chunk(self, hidden, targets, options, keep=True)

    def scratch(self, lanes: int) -> Tensor:
        """[V, lanes], uninitialised."""
        size = len(self.weight) * lanes
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=self.scratch_dtype)
        return self._scratch[:size].view(len(self.weight), lanes)


class Chunk:
    """Some tokens, with their exponentials if `keep`."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, options: TokenStatsOptions, *, keep: bool) -> None:
        self._head = head
        self._rows = KeptRows(targets, options.ignore_index)
        self._options = options = options.rows(self._rows.gather)
        hidden = self._rows.gather(hidden).to(options.operand_dtype)
        self._hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self._targets = self._rows.gather(targets).contiguous()
        n_rows = len(self._hidden)
        lanes = -(-n_rows // STRIP) * STRIP
        self._exps = head.scratch(lanes) if keep else None
        if n_rows == 0:
            self._raw = [torch.zeros(0)] * 4  # target Q, max, log sum e^(Q - max), entropy
        else:
            *self._raw, self._block_max = _ops().head_forward(
                self._hidden,
                head.weight,
                head.bias,
                self._targets,
                *_scaling(options),
                options.entropy,
                head.bfloat16,
                self._exps,
                *_temperatures(options),
            )
        target_q, maximum, log_sum, entropy = self._raw
        scatter = self._rows.scatter
        self.logprobs = scatter((target_q - maximum) - log_sum)
        kept_entropy = scatter(entropy) if options.entropy else None
        self.stats = RowStats(scatter(maximum), scatter(log_sum), kept_entropy)

    def backward(self, grads: RowGrads, into: HeadGrads, tokens: slice, *, last: bool) -> None:
        options = self._options
        if len(self._hidden) == 0:
            if into.hidden is not None:
                into.hidden[tokens] = 0
            if last and not into.fresh and into.weight is not None and into.weight.element_size() == 2:
                _ops().round_weight(into.weight, into.low_halves)
            return
        assert self._exps is not None
        target_q, maximum, log_sum, entropy = self._raw
        factor = options.factor
        target_factor = factor * self._rows.gather(grads.logprobs)
        p_factor = factor * self._rows.gather(grads.lse) - target_factor
        entropy_factor = None
        if grads.entropy is not None:
            entropy_factor = factor * self._rows.gather(grads.entropy)
            p_factor -= entropy_factor * entropy
        if options.softcap is not None:
            target_factor *= 1 - (target_q * (options.temperature / options.softcap)).square_()
        low_halves = None
        if into.weight is not None and into.weight.element_size() == 2 and not (into.fresh and last):
            low_halves = into.low_halves
        _ops().head_backward(
            self._exps,
            self._block_max,
            self._targets,
            maximum,
            log_sum,
            p_factor,
            entropy_factor,
            target_factor,
            *_scaling(options),
            self._hidden,
            into.weight,
            low_halves,
            into.fresh,
            last,
            into.bias,
            *_temperatures(options),
        )
        into.fresh = False
        if into.hidden is not None:
            into.hidden[tokens] = self._rows.scatter(self._hidden_gradient())

    def _hidden_gradient(self) -> Tensor:
        """[rows, D], from the exponentials, which are the logits' derivatives by now."""
        assert self._exps is not None
        head, n_rows = self._head, len(self._hidden)
        if head.bfloat16:  # torch multiplies these at full speed
            return self._exps[:, :n_rows].T @ head.weight
        return _ops().head_hidden_gradient(self._exps, head.weight, n_rows)


def _scaling(options: TokenStatsOptions) -> tuple[float, float, float]:
    """logit_scale, temperature and softcap (0: none), as the kernels take them."""
    one = 1.0 if isinstance(options.temperature, Tensor) else options.temperature
    return options.logit_scale, one, options.softcap or 0.0


def _temperatures(options: TokenStatsOptions) -> tuple[Tensor, ...]:
    """Of the rows [rows], where they have not all the same one."""
    return (options.temperature,) if isinstance(options.temperature, Tensor) else ()


def _ops() -> Any:
    return torch.ops.tbrm_kernels_cpu


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, max(total, 1), step)]
