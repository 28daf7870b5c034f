"""What a plan is made of: the sizes of the model's weights, what a step gives a process to do, and what the passes hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from tbrm.chat import make_chat
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.experience.offline import RowReader, read_trajectories
from tbrm.plan.attention import planned_attention
from tbrm.policy.layout_choice import only_rows
from tbrm.policy.load import load_model
from tbrm.policy.lora import Adapters, base_layer
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.tasks import ProblemStream
from tbrm.trajectories.deal import deal
from tbrm.trajectories.packing import common_prefix, pack
from tbrm.trajectories.trajectory import Trajectory


@dataclass(frozen=True)
class Sizes:
    """Elements of the weights."""

    shapes: tuple[torch.Size, ...]
    """Of each weight, adapters included, a tied one once."""
    trained: tuple[torch.Size, ...]
    """Of those that are trained: all, or the adapters."""
    block: int
    """Of the largest block."""
    block_trained: int
    """Of that, what is trained."""
    rest: int
    """Outside of the blocks: embeddings, last norm, head."""
    vocab: int
    width: int
    tied: bool
    head_adapted: bool

    @property
    def total(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    @property
    def adapters_only(self) -> bool:
        return len(self.trained) < len(self.shapes)

    @property
    def embeddings(self) -> int:
        """Embedding and head."""
        return self.vocab * self.width * (1 if self.tied else 2)


def slices(shapes: Iterable[torch.Size], shard: int) -> int:
    """Elements of the process that holds most, of `shard`: FSDP2 cuts the first dimension into equal parts, rounded up."""
    return sum(-(-shape[0] // shard) * shape[1:].numel() for shape in shapes)


def sizes_of(policy: PolicyModel) -> Sizes:
    head = policy.lm.get_output_embeddings()
    weights, trained = list(policy.parameters()), list(trained_weights(policy).values())
    blocks = [{id(weight): weight.numel() for weight in block.parameters()} for block in policy.blocks]
    largest: dict[int, int] = max(blocks, key=lambda block: sum(block.values()), default={})
    return Sizes(
        shapes=tuple(weight.shape for weight in weights),
        trained=tuple(weight.shape for weight in trained),
        block=sum(largest.values()),
        block_trained=sum(largest.get(id(weight), 0) for weight in trained),
        rest=sum(weight.numel() for weight in weights) - sum(sum(block.values()) for block in blocks),
        vocab=head.weight.shape[0],
        width=head.weight.shape[1],
        tied=head.weight is policy.lm.get_input_embeddings().weight,
        head_adapted=base_layer(head) is not head,
    )


@dataclass(frozen=True)
class Work:
    """What a step gives to the process that has most to do."""

    tokens: int
    """Packed, in all of its micro-batches together."""
    longest: int
    """Of one trajectory, which no budget cuts."""
    actions_per_token: float
    responses: int
    """To be generated in a step or an evaluation; 0 if none are."""
    prompt: int
    """Tokens of the longest prompt, without what all of them begin with."""
    sequence: int
    """Tokens of the longest prompt and response."""

    def micro_batches(self, budget: int) -> tuple[int, int]:
        """Packed tokens of the first micro-batch under `trainer.batch_tokens: budget`, and of the largest later one; 0 if none
        comes."""
        first = min(self.tokens, max(budget, self.longest))
        return first, min(first, self.tokens - first)


def work_of(config: Config, trajectories: Sequence[Trajectory], processes: int) -> Work:
    dealt = deal(trajectories, sum(len(t.prompt_ids) + len(t.response_ids) for t in trajectories), processes)
    shares = [pack([trajectories[i] for batch in batches for i in batch]) for batches in dealt]
    largest = max(shares, key=lambda share: len(share.inputs.input_ids))
    rollout, evaluation = config.rollout, config.evaluation
    asked = 0 if config.data.trajectories else rollout.prompts * rollout.samples
    if config.task is not None:
        asked = max(asked, evaluation.prompts * evaluation.samples)
    prompts = [t.prompt_ids for t in trajectories]
    return Work(
        tokens=len(largest.inputs.input_ids),
        longest=max(len(pack([t]).inputs.input_ids) for t in trajectories),
        actions_per_token=len(largest.targets) / len(largest.inputs.input_ids),
        responses=-(-asked // processes),
        prompt=max(map(len, prompts)) - common_prefix(prompts),
        sequence=max(map(len, prompts)) + rollout.max_new_tokens,
    )


def trajectories_of(config: Config, policy: PolicyModel, tokenizer: PreTrainedTokenizerBase) -> list[Trajectory]:
    """Those of a step: the first one's prompts, with responses as long as they may be; of a file, the longest that it has."""
    rollout = config.rollout
    count = rollout.prompts * rollout.samples
    chat = make_chat(config, policy.lm, tokenizer)
    if config.data.trajectories is not None:
        recorded = read_trajectories(config.data.trajectories, RowReader(chat, config.task, grades=False))
        recorded.sort(key=lambda t: len(t.prompt_ids) + len(t.response_ids), reverse=True)
        return (recorded * -(-count // len(recorded)))[:count]
    assert config.task is not None  # the config's validation saw to it
    _, prompts = chat.encode_problems(ProblemStream(config.task, config.seed, []).take(rollout.prompts))
    if not prompts:
        raise ConfigError(
            f"rollout.max_prompt_tokens: {rollout.max_prompt_tokens} is less than each prompt of the first step has; raise it"
        )
    response = [0] * rollout.max_new_tokens
    fresh = [Trajectory(prompt, response, reward=0.0) for prompt in prompts for _ in range(rollout.samples)]
    replayed = config.replay.samples_per_step
    return fresh + (fresh * -(-replayed // count))[:replayed]


def few_of(trajectories: Sequence[Trajectory], prompts: int = 4, responses: int = 4) -> list[Trajectory]:
    """All `responses` of the first `prompts`, or as many as there are: enough to see what a token takes."""
    by_prompt: dict[tuple[int, ...], list[Trajectory]] = {}
    for trajectory in trajectories:
        by_prompt.setdefault(tuple(trajectory.prompt_ids), []).append(trajectory)
    return [t for group in list(by_prompt.values())[:prompts] for t in group[:responses]]


def meta_policy(config: Config) -> tuple[PolicyModel, PreTrainedTokenizerBase]:
    """The model without its weights, on the meta device, and its tokenizer."""
    lm, tokenizer = load_model(config.model, config.seed, meta=True)
    lm = lm.to("meta")  # type: ignore[arg-type]
    adapters = Adapters(lm, config.lora, config.model, config.seed) if config.lora.rank else None
    precision = precision_of(config)
    if config.model.layout == "rows" or only_rows(lm):
        raise ConfigError(
            f"model.layout: {type(lm).__name__} is read in rows, and a plan knows packed trajectories alone"
        )
    policy = PolicyModel(lm, precision=precision, attention=planned_attention(config.model, precision, lm))
    policy.adapters = adapters
    if config.parallel.activation_checkpointing:
        policy.checkpoint_activations()
    return policy, tokenizer


def precision_of(config: Config) -> torch.dtype:
    """Of the products, on the device that is planned for rather than on this machine's."""
    if config.model.device != "cpu" and config.model.precision == "auto":
        return torch.bfloat16
    return config.model.resolve_precision()


def is_sharded(config: Config, processes: int) -> bool:
    """Whether FSDP2 is at work: one process alone needs torchrun only for `parallel.cpu_offload`."""
    return processes > 1 or config.parallel.cpu_offload
