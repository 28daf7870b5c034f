"""Run in several processes, or alone: one training step of many models and settings, as every number of processes must take it.

    torchrun --nproc-per-node N -m tests.tbrm.parallel_steps FOLDER

reads models and trajectories from FOLDER, and writes what it found to FOLDER/N.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbrm.config.schema import Config
from tbrm.config.training import ParallelConfig
from tbrm.experience.collect import Collected
from tbrm.parallel import World
from tbrm.policy import layout_choice
from tbrm.policy.named_weights import trained_weights, weights_of
from tbrm.processes.launch import launched
from tbrm.rollout import EmbeddedEngine, Sampling, make_requests
from tbrm.rollout.split import SplitEngine
from tbrm.training.step_metrics import StepMetrics
from tbrm.training.trainer import Trainer
from tbrm.trajectories.deal import deal
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import segment_sums
from tbrm_kernels.backends import head_memory
from tests.tbrm.conftest import tiny_config

MODELS = ["llama-untied", "qwen3-tied", "qwen3-untied", "gemma3-tied"]
MODELS_OF = {1: MODELS, 2: MODELS, 4: ["qwen3-tied", "qwen3-untied"]}
"""By number of processes: two show what sharding does to each kind of model, four what more processes do to any."""
COMPILED_ON = (1, 2)
"""Processes: to compile takes longer than all the rest."""
MICRO_BATCHES = (1, 2, 4)
"""Forward and backward passes in a step, of each process."""

PROMPTS = [[1, 5], [1, 5, 6, 7], [1, 8, 9, 10, 11, 12], [1, 5, 6]]


def config_of(folder: Path, world: World, model: str = "qwen3-tied", **settings: Any) -> Config:
    return tiny_config(
        folder / f"run-{world.size}",
        model__name=str(folder / model),
        data__trajectories=str(folder / "trajectories.jsonl"),
        rollout__prompts=8,
        rollout__samples=4,
        **settings,
    )


class OneStep:
    """Gradients, metrics and log-ratios of the first step, as often as wanted: no weight ever changes."""

    def __init__(self, config: Config, world: World) -> None:
        self.trainer = Trainer(config, world=world)

    def __call__(self, trajectories: list[Trajectory] | None = None, **settings: Any) -> dict[str, Any]:
        trainer = self.trainer
        self.passes = 0
        section = trainer.config.trainer.model_copy(update=settings)
        trainer.config = trainer.config.model_copy(update={"trainer": section})
        trainer.state.step = 0
        if trajectories is None:
            trainer.supply.source.position = 0
            for trajectory in trainer.supply.source.trajectories:
                trajectory.reference = None
            supply = trainer.supply
        else:
            supply = Fixed(trajectories)
        gradients: dict[str, torch.Tensor] = {}
        log_ratios: list[float] = [0.0]

        def keep(_learning_rate: float, *, skipped: bool) -> None:
            for name, weight in trained_weights(trainer.policy).items():
                if weight.grad is not None:
                    grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
                    gradients[name] = grad.clone()
            trainer.optimisers.zero_grad()

        def spy(metrics: StepMetrics, stats: Any, losses: Any, batch: Any) -> None:
            ratio = segment_sums(stats.logprobs, batch.cu_seqlens) - segment_sums(batch.ref_logprobs, batch.cu_seqlens)
            log_ratios.append(ratio.abs().max().item())
            real(metrics, stats, losses, batch)

        def counted(*arguments: Any) -> None:
            self.passes += 1
            add_gradients(*arguments)

        add_gradients = type(trainer)._add_gradients.__get__(trainer)
        trainer._add_gradients = counted
        real, StepMetrics.add, trainer._update = StepMetrics.add, spy, keep
        ours, trainer.supply = trainer.supply, supply
        try:
            metrics = trainer.train_step()
        finally:
            StepMetrics.add, trainer.supply = real, ours
        largest = max(trainer.world.gather(max(log_ratios)))
        return {"gradients": gradients, "metrics": metrics, "largest_log_ratio": largest, "passes": self.passes}


class Fixed:
    def __init__(self, trajectories: list[Trajectory]) -> None:
        self.trajectories = trajectories

    def collect(self, step: int, phases: object) -> Collected:
        return Collected(self.trajectories)

    def rest_of_rollout(self) -> list[Trajectory]:
        return []


def budget_for(trajectories: list[Trajectory], processes: int, count: int) -> int:
    """The largest trainer.batch_tokens with which each process has so many micro-batches."""
    return next(tokens for tokens in range(1000, 0, -1) if len(deal(trajectories, tokens, processes)[0]) == count)


def run(folder: Path, world: World) -> dict[str, Any]:
    return of_models(folder, world) | of_settings(folder, world)


def of_models(folder: Path, world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    budgets: dict[int, int] = {}
    for model in MODELS_OF[world.size]:
        for divided in (False, True) if world.mesh else (False,):
            config = config_of(folder, world, model, parallel={"vocab_parallel": divided})
            step = OneStep(config, world)
            what = f"{model}, vocabulary divided" if divided else model
            if not budgets:
                collected = step.trainer.supply.source.collect(1, step.trainer.phases).trajectories
                budgets = {count: budget_for(collected, world.size, count) for count in MICRO_BATCHES}
            for count, tokens in budgets.items():
                found[f"{what}, {count} micro-batches"] = step(batch_tokens=tokens)
            if world.mesh:
                found[f"{what}, whole heads"] = whole_heads(config, world)
            answers = EmbeddedEngine(step.trainer.policy, step.trainer.chat, batch_size=3).generate(
                make_requests(PROMPTS, 2), Sampling(max_new_tokens=12, temperature=0)
            )
            found[f"{what}, greedy"] = [[r.token_ids for r in responses] for responses in answers]
            found[f"{what}, sampled"] = {size: sampled(step, size) for size in (5, 64)}
            if model == "qwen3-tied":
                found |= {
                    f"{name}, vocabulary divided" if divided else name: x for name, x in odd_batches(step).items()
                }
                if world.mesh and not divided:
                    found["gathers"] = gathers(step)
    return found


def of_settings(folder: Path, world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, keys in {
        "shard in pairs": {"shard": min(2, world.size)},
        "reduce every micro-batch": {"accumulate_sharded": True},
        "keep gathered": {"reshard_after_forward": False},
        "checkpointed activations": {"activation_checkpointing": True},
        "vocabulary divided in pairs": {"vocab_parallel": True, "shard": min(2, world.size)},
        "vocabulary divided, all else too": {
            "vocab_parallel": True,
            "accumulate_sharded": True,
            "reshard_after_forward": False,
            "activation_checkpointing": True,
        },
    }.items():
        parallel = ParallelConfig(**keys)
        with launched_again(world, parallel) as meshed:
            step = OneStep(config_of(folder, world, parallel=keys), meshed)
            found[name] = step(batch_tokens=130)
            found[f"{name}, once more"] = step(batch_tokens=130)
    compiled = {"model__compile": True} if world.size in COMPILED_ON else {}
    if compiled:
        checkpointed = {"activation_checkpointing": True}
        step = OneStep(config_of(folder, world, **compiled, parallel=checkpointed), world)
        found["compiled"] = step(batch_tokens=130)
        found["compiled, once more"] = step(batch_tokens=130)
    lora = {"rank": 4, "targets": ["q_proj", "down_proj", "lm_head"]}
    for what, settings in {
        "adapters": {},
        "adapters, vocabulary divided": {"parallel": {"vocab_parallel": True}},
        **({"adapters, compiled": compiled} if compiled else {}),
    }.items():
        step = OneStep(config_of(folder, world, "qwen3-untied", lora=lora, **settings), world)
        found[what] = step(batch_tokens=130)
        learn_something(step)
        found[f"{what}, later"] = step(batch_tokens=130)
    for name, divided in {"bfloat16": False, "bfloat16, vocabulary divided": True}.items():
        settings = {"model__precision": "bfloat16", "parallel": {"vocab_parallel": divided}}
        found[name] = OneStep(config_of(folder, world, **settings), world)(batch_tokens=130)
    return found


def sampled(step: OneStep, batch_size: int) -> list[list[list[int]]]:
    """Responses of all processes together, each of which writes so many at once."""
    engine = SplitEngine(EmbeddedEngine(step.trainer.policy, step.trainer.chat, batch_size), step.trainer.world)
    answers = engine.generate(make_requests(PROMPTS * 2, 3, 1), Sampling(max_new_tokens=12))
    return [[r.token_ids for r in responses] for responses in answers]


@torch.no_grad()
def learn_something(step: OneStep) -> None:
    """Adapters whose B is not zero any more."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in trained_weights(step.trainer.policy).items():
        value = torch.randn(weight.shape, generator=generator) * 0.1
        if "lora_B" in name:
            mesh = [weight.device_mesh, weight.placements] if isinstance(weight, DTensor) else None
            weight.copy_(distribute_tensor(value, *mesh, src_data_rank=None) if mesh else value)


def odd_batches(step: OneStep) -> dict[str, Any]:
    lone = Trajectory([3, 4, 5], [6, 7, 8], 1.0)
    masked = [Trajectory([3, 4, i], [6, 7], 1.0, action_mask=[False, False]) for i in range(8)]
    return {
        "one trajectory": step([lone]),
        "all but one masked": step([Trajectory([3, 4, 5], [6, 7, 8], 1.0), *masked]),
        "all masked": step([*masked]),
        "one not finite": step([lone, *(Trajectory([3, 4, i], [6, 7], float("nan")) for i in range(2))]),
    }


def gathers(step: OneStep) -> dict[str, int]:
    """How often the weights of the head's group, and those of all blocks, are gathered in a step of one micro-batch whose
    head runs in many chunks."""
    counts = {"head": 0, "blocks": 0}
    policy = step.trainer.policy
    in_head_group = len(list(weights_of(policy))) - sum(len(list(block.parameters())) for block in policy.blocks)
    assert isinstance(policy, FSDPModule)
    real, chunk = _fsdp_param_group.foreach_all_gather, head_memory.CHUNK_BYTES_PER_VOCABULARY_ENTRY
    chunks = []

    def count(parameters: list, *arguments: Any) -> Any:
        counts["head" if len(parameters) == in_head_group else "blocks"] += 1
        return real(parameters, *arguments)

    objective = type(step.trainer.config.objective)
    call = objective.__call__
    objective.__call__ = lambda *arguments: chunks.append(1) or call(*arguments)
    _fsdp_param_group.foreach_all_gather = count
    head_memory.CHUNK_BYTES_PER_VOCABULARY_ENTRY = {"cpu": 4 * 16}
    try:
        step(batch_tokens=100_000)
    finally:
        head_memory.CHUNK_BYTES_PER_VOCABULARY_ENTRY, _fsdp_param_group.foreach_all_gather = chunk, real
        objective.__call__ = call
    return {**counts, "chunks": len(chunks), "n_blocks": len(policy.blocks)}


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that any operation makes, but for those on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
        self.seen += [x.shape for x in tensors if x.device.type != "meta"]
        return result


def whole_heads(config: Config, world: World) -> int:
    """How many tensors of the whole head's or embedding's shape come to be on this process from when the weights have been read
    until the gradients of the first step are clipped."""
    counts = []
    check = layout_choice.check_architecture
    with Shapes() as shapes:
        layout_choice.check_architecture = lambda policy: (shapes.seen.clear(), check(policy))[1]
        step = OneStep(config, world)
        layout_choice.check_architecture = check
        trainer, clip = step.trainer, step.trainer._clip_gradients
        shape = trainer.policy.lm.get_output_embeddings().weight.shape
        trainer._clip_gradients = lambda *given: (clip(*given), counts.append(shapes.seen.count(shape)))[0]
        step()
    return counts[0]


def launched_again(world: World, parallel: ParallelConfig) -> Any:
    """The same processes with another mesh."""
    from contextlib import nullcontext

    from torch.distributed.device_mesh import init_device_mesh

    if world.mesh is None:
        return nullcontext(world)
    shard = parallel.shard or world.size
    mesh = init_device_mesh("cpu", (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return nullcontext(World(world.rank, world.size, mesh))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = tiny_config(folder)
    with launched(config.model, config.parallel) as world:
        found = run(folder, world)
        if world.is_main:
            torch.save(found, folder / f"{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
