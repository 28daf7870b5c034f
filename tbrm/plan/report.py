"""A plan for people and for programs: the table, the largest token budget that fits, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tbrm.config.schema import Config
from tbrm.plan.make import make_plan
from tbrm.plan.terms import PHASES, Plan, peaks
from tbrm.policy.vocab_parallel import is_divisible

GIB = 2**30


@dataclass(frozen=True)
class Change:
    """A key, or the number of processes, and the peak that a plan has with it."""

    what: str
    peak: float


def largest_budget(plan: Plan, memory: float) -> int | None:
    """The largest `trainer.batch_tokens` that makes a difference and fits into `memory` bytes, to within 1 in 256; None if
    none does."""
    step = -(-plan.work.tokens // 256)
    budgets = [*range(plan.work.tokens, plan.work.longest, -step), plan.work.longest]
    return next((budget for budget in budgets if plan.peak(budget) <= memory), None)


def changes(plan: Plan, memory: float) -> list[Change]:
    """What lowers the peak, the best first."""
    found = []
    if (budget := largest_budget(plan, memory) or plan.work.longest) < plan.config.trainer.batch_tokens:
        found.append(Change(f"trainer.batch_tokens={budget}", plan.peak(budget)))
    for section, key, value in _keys(plan):
        config = _with(plan.config, section, key, value)
        # Only some keys change what a pass holds; for the others the trace that is there will do.
        retraced = key in ("activation_checkpointing", "precision") or not plan.sharded
        other = make_plan(config, plan.processes) if retraced else replace(plan, config=config)
        found.append(Change(f"{section}.{key}={str(value).lower()}", other.peak()))
    if plan.config.parallel.shard == 0:
        found.append(Change(f"--gpus {2 * plan.processes}", make_plan(plan.config, 2 * plan.processes).peak()))
    return sorted((change for change in found if change.peak < plan.peak()), key=lambda change: change.peak)


def _keys(plan: Plan) -> Iterator[tuple[str, str, Any]]:
    yield "parallel", "activation_checkpointing", True
    if plan.sharded:
        yield "parallel", "accumulate_sharded", True
        yield "parallel", "reshard_after_forward", True
        yield "parallel", "shard", 0
        if is_divisible(plan.sizes.vocab, plan.shard):
            yield "parallel", "vocab_parallel", True
    if not plan.on_cpu:
        yield "parallel", "cpu_offload", True
    if plan.on_cpu:
        yield "checkpoint", "asynchronous", False
    yield "model", "precision", "bfloat16"
    if (rows := min(plan.config.rollout.batch_size, plan.work.responses)) > 1:
        yield "rollout", "batch_size", rows // 2


def _with(config: Config, section: str, key: str, value: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """The table: a term and the phases in which it is held, in GiB; then the sums."""
    terms, table = plan.terms(), []
    for term in terms:
        size = f"{term.size / GIB:.2f}"
        held = (size if phase in term.phases else "" for phase in PHASES)
        table.append((f"{term.name}, in the CPU's memory" if term.on_host else term.name, *held))
    return [*table, ("together", *(f"{size / GIB:.2f}" for size in peaks(terms).values()))]


def as_dict(plan: Plan, memory: float | None) -> dict[str, Any]:
    """Bytes, for `--json`."""
    terms = plan.terms()
    found: dict[str, Any] = {
        "processes": plan.processes,
        "device": "cpu" if plan.on_cpu else "cuda",
        "parameters": plan.sizes.total,
        "tokens": plan.work.micro_batches(plan.config.trainer.batch_tokens)[0],
        "terms": [{**term._asdict(), "size": round(term.size), "phases": list(term.phases)} for term in terms],
        "phases": {phase: round(size) for phase, size in peaks(terms).items()},
        "peak": round(plan.peak()),
    }
    if memory is not None:
        fits = plan.peak() <= memory
        found |= {"fits": fits, "largest_batch_tokens": largest_budget(plan, memory)}
        found["changes"] = [] if fits else [vars(change) for change in changes(plan, memory)]
    return found


def sentences(plan: Plan, memory: float | None) -> list[str]:
    """What the table means."""
    work, held = plan.work, peaks(plan.terms())
    tokens, _ = work.micro_batches(plan.config.trainer.batch_tokens)
    phase = max(held, key=held.__getitem__)
    peak = held[phase]
    found = [
        f"{plan.sizes.total / 1e6:,.0f}M parameters on {plan.processes} process{'es' * (plan.processes > 1)}; of a step's "
        f"tokens the largest share is {work.tokens:,}, in micro-batches of at most {tokens:,}.",
        f"Peak: {peak / GIB:.2f} GiB, when {PHASES[phase]}.",
    ]
    if memory is not None:
        fits = peak <= memory
        largest = largest_budget(plan, memory)
        found.append(f"That {'fits' if fits else 'does not fit'} into {memory / GIB:g} GiB.")
        if largest is None:
            found.append(f"No trainer.batch_tokens fits: the longest trajectory alone has {work.longest:,} tokens.")
        elif largest == work.tokens:
            found.append(f"trainer.batch_tokens={largest} or more fits: the whole share in one micro-batch.")
        else:
            found.append(f"The largest that fits: trainer.batch_tokens={largest}.")
        if not fits:
            found += [
                f"  {change.what} saves {(peak - change.peak) / GIB:.2f} GiB: {change.peak / GIB:.2f} GiB"
                + (", which fits" if change.peak <= memory else "")
                for change in changes(plan, memory)
            ]
    if plan.config.rollout.engine != "embedded":
        found.append("Without vLLM's memory, of which rollout.vllm.* decides.")
    found.append(
        "Counted beyond what an idle process holds that has imported the trainer. glibc may hold up to a third more than is "
        "alive, unless MALLOC_MMAP_THRESHOLD_ is low (docs/scaling.md)."
        if plan.on_cpu
        else "As torch's allocator counts (peak_memory_mib): leave room for the CUDA context, NCCL's buffers and "
        "fragmentation. Activations are those that the CPU's kernels keep."
    )
    return found
