"""How much memory a recipe will take in each process, term by term, before anything runs.

A step goes through phases, and a term is held in some of them; the largest sum is the peak. The terms follow the trainer:
weights, gradients and moments (`tbrm.training.trainer`), what FSDP2 gathers and reduces (`tbrm.policy.sharding`), the head's
scratch (docs/kernels.md), what autograd keeps of the blocks (`tbrm.plan.footprint`) and generation (`tbrm.rollout.embedded`).

All responses are taken to be as long as they may be, and the process is the one that has most to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tbrm.config.schema import Config
from tbrm.plan.footprint import Footprint
from tbrm.plan.inputs import Sizes, Work, is_sharded, precision_of, slices
from tbrm.rollout.embedded import PROMPT_TOKENS
from tbrm_kernels.backends.cpu import multiplies_bfloat16
from tbrm_kernels.backends.head_memory import HeadMemory, cpu_head_memory, triton_head_memory

PHASES = {
    "rollout": "responses are generated",
    "reference": "a micro-batch is scored by the reference",
    "loss": "the forward pass has come to the head",
    "backward": "the backward pass goes through the blocks",
    "reduce": "the backward pass has come to the embeddings",
    "update": "gradients are clipped and AdamW takes its step",
}
_PASSES = ("reference", "loss", "backward")
_FLOAT32, _MOMENTS = 4, 8  # bytes of an element
_CPU_AT_WORK = 75 * 2**20
"""What the first step brings into a process on a CPU, however small the model: code of libraries, threads, their buffers.
A run of recipes/tiny.yaml held so much more than a process that has imported the trainer."""


class Term(NamedTuple):
    """Bytes that one process holds in some phases of a step."""

    name: str
    size: float
    phases: Collection[str] = tuple(PHASES)
    on_host: bool = False
    """In the CPU's memory, while the model runs on a GPU."""


@dataclass(frozen=True)
class Plan:
    """Of a recipe, for one of `processes` processes with a GPU each, or without any where `model.device` is cpu."""

    config: Config
    processes: int
    sizes: Sizes
    work: Work
    footprint: Footprint
    critic: Sizes | None = None
    """Of its backbone, if the objective has one."""

    @property
    def on_cpu(self) -> bool:
        return self.config.model.device == "cpu"

    @property
    def sharded(self) -> bool:
        return is_sharded(self.config, self.processes)

    @property
    def precision(self) -> int:
        """Bytes of an element in the products."""
        return precision_of(self.config).itemsize

    @property
    def shard(self) -> int:
        """Processes that hold the weights between them."""
        return self.config.parallel.shard or self.processes

    @property
    def divided(self) -> bool:
        """Whether each of them computes with its own rows of embedding and head."""
        return self.config.parallel.vocab_parallel and self.sharded

    @property
    def vocab(self) -> int:
        """Rows of the head that this process computes with."""
        return -(-self.sizes.vocab // self.shard) if self.divided else self.sizes.vocab

    def terms(self, budget: int | None = None) -> list[Term]:
        """With micro-batches of at most `budget` tokens; None for `trainer.batch_tokens`. Of the first micro-batch or of a
        later one, whichever takes more: until the last one, gradients are added up."""
        first, later = self.work.micro_batches(budget or self.config.trainer.batch_tokens)
        choices = [self._terms(first, gradients_wait=False)]
        if later:
            choices.append(self._terms(later, gradients_wait=True))
        return max(choices, key=lambda terms: max(peaks(terms).values()))

    def peak(self, budget: int | None = None) -> float:
        return max(peaks(self.terms(budget)).values())

    def _terms(self, tokens: int, *, gradients_wait: bool) -> list[Term]:
        terms = [*self._state(gradients_wait), *self._activations(tokens), *self._head(tokens), *self._rollout()]
        terms.append(Term("libraries at work", _CPU_AT_WORK * self.on_cpu))
        if self.sharded:
            terms += [*self._gathered(), *self._reduced(gradients_wait)]
        if self.divided or not self.sharded:
            terms += self._embeddings()
        return [term for term in terms if term.size > 0]

    def _state(self, gradients_wait: bool) -> list[Term]:
        parallel, sizes = self.config.parallel, self.sizes
        weights, trained = slices(sizes.shapes, self.shard), slices(sizes.trained, self.shard)
        reference = 0 if sizes.adapters_only else weights  # the policy with its adapters off
        away = parallel.cpu_offload
        early = _PASSES if gradients_wait and (parallel.accumulate_sharded or not self.sharded) else ()
        terms = [
            Term("weights, float32", _FLOAT32 * weights, on_host=away),
            Term("reference, float32", _FLOAT32 * reference, on_host=away or parallel.offload_reference),
            Term("AdamW's moments, float32", _MOMENTS * trained, on_host=away),
            Term("gradients, float32", _FLOAT32 * trained, (*early, "reduce", "update"), on_host=away),
        ]
        terms += self._critic(early)
        if self.config.checkpoint.asynchronous:
            copied = _MOMENTS * trained + _FLOAT32 * (0 if sizes.adapters_only else weights)
            if self.config.objective.reset_reference_every:
                copied += _FLOAT32 * reference
            if self.critic:
                copied += (_FLOAT32 + _MOMENTS) * slices(self.critic.shapes, self.shard)
            terms.append(Term("checkpoint being written", copied, on_host=not self.on_cpu))
        return terms

    def _critic(self, early: Collection[str]) -> list[Term]:
        """It runs after the policy's backward pass, over the same micro-batch, and holds no more of it than the policy did."""
        if self.critic is None:
            return []
        elements, away = slices(self.critic.shapes, self.shard), self.config.parallel.cpu_offload
        # A head of logits that is not the embedding is neither used nor trained.
        trained = elements - (0 if self.critic.tied else -(-self.critic.vocab // self.shard) * self.critic.width)
        return [
            Term("critic, float32", _FLOAT32 * elements, on_host=away),
            Term("critic's AdamW's moments, float32", _MOMENTS * trained, on_host=away),
            Term("critic's gradients, float32", _FLOAT32 * trained, (*early, "reduce", "update"), on_host=away),
        ]

    def _activations(self, tokens: int) -> list[Term]:
        kept, scoring = self.footprint.kept, self.footprint.scoring
        return [
            Term("weights as cast for the products", kept.fixed, ("loss", "backward")),
            Term("activations", kept.per_token * tokens, ("loss", "backward")),
            Term("one block at work", self.footprint.working(tokens), ("backward",)),
            Term("one block at work, without gradient", scoring(tokens), ("reference",)),
        ]

    def _head(self, tokens: int) -> list[Term]:
        width, elements = self.sizes.width, self.vocab * self.sizes.width
        # A divided vocabulary's rows meet the actions of all.
        actions = round(self.work.actions_per_token * tokens) * (self.shard if self.divided else 1)
        weight = self._head_dtype.itemsize
        cast = self.precision if self.precision < weight else 0
        adapted = self.sizes.head_adapted
        trained = adapted or not self.sizes.adapters_only
        memory = self._head_memory()
        chunk = memory.chunk_tokens(actions, None, weight_grad=trained)
        summed = memory.sum_bytes * (trained and actions > chunk)
        return [
            Term("head's scratch", memory.token_bytes * min(actions, chunk), ("loss",)),
            Term("float32 sum of the head's gradient", summed, ("loss",)),
            Term("head's weight, cast", cast * elements, ("reference", "loss")),
            Term("head's weight, adapted", weight * elements * adapted, ("loss",)),
            Term("hidden states of the actions, and their gradient", 2 * _FLOAT32 * width * actions, ("loss",)),
            Term("head's gradient", weight * elements * trained, ("loss",) if adapted else ("loss", "backward")),
        ]

    @property
    def _head_dtype(self) -> torch.dtype:
        """Of the weight that the kernel is given: FSDP2 casts what it gathers."""
        return precision_of(self.config) if self.sharded and not self.divided else torch.float32

    def _head_memory(self) -> HeadMemory:
        precision, shape = precision_of(self.config), (self.vocab, self.sizes.width)
        if not self.on_cpu:
            return triton_head_memory(*shape, self._head_dtype, exps=precision == torch.bfloat16)
        able = precision == torch.bfloat16 and multiplies_bfloat16()
        return cpu_head_memory(*shape, self._head_dtype, torch.bfloat16 if able else torch.float32)

    def _embeddings(self) -> list[Term]:
        """The end of one process's backward pass, or of its own rows'; where embeddings and head are tied, their gradients are
        added up."""
        made = 0 if self.sizes.adapters_only else self.vocab * self.sizes.width * (1 + self.sizes.tied)
        return [Term("embeddings' gradient", _FLOAT32 * made, ("reduce",))]

    def _rollout(self) -> list[Term]:
        """The embedded engine's; vLLM has memory of its own."""
        sizes, work, rollout, here = self.sizes, self.work, self.config.rollout, ("rollout",)
        if rollout.engine != "embedded":
            return []
        rows = min(rollout.batch_size, work.responses)
        whole = self.precision * sizes.total if self.sharded else 0
        # On a CPU all linear layers are laid out anew, an untied embedding is not; on a GPU autocast makes copies.
        linear = sizes.total - (0 if sizes.tied else sizes.embeddings // 2)
        copied = self.precision * linear if self.on_cpu or (self.precision < _FLOAT32 and not self.sharded) else 0
        cache = self.footprint.kv_per_token * work.sequence * rows
        prompts = self.footprint.scoring.per_token * min(work.prompt * rows, max(work.prompt, PROMPT_TOKENS))
        logits = (self.precision + _FLOAT32) * sizes.vocab * rows  # as the head gives them, and as probabilities
        return [
            Term(
                "policy's copy, which rollouts ahead are made by", _FLOAT32 * sizes.total * bool(rollout.max_staleness)
            ),
            Term("weights, whole, for generation", whole, here),
            Term("weights, laid out or cast for generation", copied, here),
            Term("keys and values", cache, here),
            Term("one block at work on the prompts", prompts, here),
            Term("logits and sampling", logits, here),
        ]

    @property
    def _rest(self) -> int:
        """Elements outside of the blocks that are gathered."""
        return self.sizes.rest - (self.sizes.embeddings if self.divided else 0)

    def _gathered(self) -> list[Term]:
        sizes, parallel, size = self.sizes, self.config.parallel, self.precision
        terms = [Term("embeddings and head, gathered", size * self._rest, _PASSES)]
        # What arrives is copied to where it is used; in the backward pass the next block arrives meanwhile.
        terms.append(Term("a block, gathered", 2 * size * sizes.block, ("reference",)))
        if parallel.reshard_after_forward:
            terms.append(Term("two blocks, gathered", 3 * size * sizes.block, ("backward",)))
        else:
            terms.append(Term("all blocks, gathered", size * (sizes.total - sizes.rest), ("loss", "backward")))
        return terms

    def _reduced(self, gradients_wait: bool) -> list[Term]:
        """Gradients on their way: made in the precision of the products, summed over the processes in float32."""
        sizes, size = self.sizes, self.precision
        # Copied to one float32 buffer; then the gradients are gone, and gloo makes a copy of the buffer.
        copied = _FLOAT32 * (1 + self.on_cpu)
        rest = 0 if sizes.adapters_only else self._rest
        of_rest = size * (rest + (sizes.embeddings if sizes.tied and rest and not self.divided else 0))
        arriving = _FLOAT32 * rest + max(of_rest, _FLOAT32 * rest * self.on_cpu)
        terms = [
            Term("a block's gradient, reduced", (size + copied) * sizes.block_trained, ("backward",)),
            Term("embeddings' and head's gradient, reduced", arriving, ("reduce",)),
        ]
        if gradients_wait and not self.config.parallel.accumulate_sharded:
            whole = sum(shape.numel() for shape in sizes.trained)
            if self.divided and not sizes.adapters_only:  # but for those of the vocabulary's rows
                whole -= sizes.embeddings - sizes.embeddings // sizes.vocab * self.vocab
            terms.append(Term("gradients of earlier micro-batches, whole", _FLOAT32 * whole, _PASSES))
        return terms


def peaks(terms: Iterable[Term]) -> dict[str, float]:
    """Bytes held in each phase, on the device where the model runs."""
    held = [term for term in terms if not term.on_host]
    return {phase: sum(term.size for term in held if phase in term.phases) for phase in PHASES}
