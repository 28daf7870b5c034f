"""The typed config: YAML recipes with dotted overrides, checked in full before any model is loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined

from tbrm.objectives import OBJECTIVES, Objective
from tbrm.tasks import TASKS, Task
from tbrm_kernels.backends.cpu import multiplies_bfloat16


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message says which key, what it got and what it wants."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunConfig(Section):
    dir: str = Field(description="Folder of the run: config, metrics, checkpoints, samples, report.")


class ModelConfig(Section):
    name: str = Field(description="Hugging Face folder or hub name, or 'tiny': a small random model made on the spot.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the products; weights are float32. auto: bfloat16 where the processor has it (GPUs, AVX512-BF16, AMX).",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. auto takes a GPU where there is one.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off for good reason."
    )

    def resolve_device(self) -> torch.device:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def resolve_precision(self) -> torch.dtype:
        if self.precision == "auto":
            on_cpu = self.resolve_device().type == "cpu"
            return torch.float32 if on_cpu and not multiplies_bfloat16() else torch.bfloat16
        return torch.float32 if self.precision == "float32" else torch.bfloat16


class LoraConfig(Section):
    rank: int = Field(0, ge=0, description="Of the adapters (pip install 'tbrm[lora]'); 0: all weights are trained.")
    alpha: float = Field(16.0, gt=0, description="What an adapter adds is scaled by alpha / rank.")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Linear layers that get an adapter; lm_head is one where it is not tied to the embedding.",
    )


class DataConfig(Section):
    trajectories: str | None = Field(
        None,
        description="JSONL of recorded trajectories (prompt or messages, response, reward) to train on; no rollouts.",
    )


class VllmConfig(Section):
    addresses: list[str] = Field(
        [],
        description="Running servers, such as http://10.0.0.7:8000 (docs/rollouts.md has their command); none: we start them.",
    )
    servers: int = Field(1, ge=1, description="Servers to start, where no addresses are given.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Of vLLM's model. auto: model.precision.")
    kv_cache_gib: int = Field(2, ge=1, description="Memory for keys and values on a CPU, in GiB.")
    gpu_memory: float = Field(0.45, gt=0, le=1, description="Share of the GPU's memory that vLLM may use in all.")
    options: dict[str, Any] = Field(
        {},
        description="More options of vLLM, by its own names, such as {max_model_len: 4096, tensor_parallel_size: 2}.",
    )
    weights_dir: str | None = Field(
        None,
        description="Where weights are handed over; all servers must see it. None: shared memory, else the temporary folder.",
    )
    start_timeout: int = Field(300, ge=1, description="Seconds within which a server must be up, or up again.")
    request_timeout: int = Field(600, ge=1, description="Seconds that a server may take over one answer.")
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="Largest mean difference to our log-probs after a sync. None: 0.001 in float32, 0.2 in bfloat16.",
    )


class RolloutConfig(Section):
    engine: Literal["embedded", "vllm", "vllm_colocated"] = Field(
        "embedded",
        description="What generates: embedded (the policy itself), vllm (servers) or vllm_colocated (vLLM in our process).",
    )
    prompts: int = Field(16, ge=1, description="Problems per rollout.")
    samples: int = Field(4, ge=1, description="Responses to each problem. One is enough for tbrm.")
    max_new_tokens: int = Field(
        256, ge=1, description="Longest response, in tokens; one that is cut off is 'truncated'."
    )
    updates: int = Field(
        1,
        ge=1,
        description="Optimiser steps that share the trajectories of one rollout, an equal part of its problems each.",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Optimiser steps by which rollouts may run ahead, beside training, with weights as many steps old. 0: off.",
    )
    timeout: int = Field(1800, ge=1, description="Seconds that training waits for a rollout made beside it.")
    temperature: float = Field(1.0, gt=0, description="Of sampling, and of Q = logits / temperature in training.")
    batch_size: int = Field(64, ge=1, description="Responses generated at once.")
    truncated: Literal["reward", "fixed", "drop"] = Field(
        "reward", description="A truncated response: its verifier's reward, the fixed reward below, or dropped."
    )
    truncated_reward: float = Field(0.0, description="The reward of a truncated response when truncated is 'fixed'.")
    vllm: VllmConfig = VllmConfig()


class ReplayConfig(Section):
    capacity: int = Field(0, ge=0, description="Trajectories kept for reuse, oldest out first. 0: no such limit.")
    capacity_tokens: int = Field(
        0,
        ge=0,
        description="Tokens, prompts included, of the trajectories kept. 0: no such limit; both 0: none are kept.",
    )
    files: list[str] = Field(
        [],
        description="JSONL of recorded trajectories (as data.trajectories) that join the buffer, patterns such as a/*.jsonl "
        "allowed; lines and files may come while training goes on. Lines without reward are graded by the task.",
    )
    samples_per_step: int = Field(
        0,
        ge=0,
        description="Old trajectories added to each step's fresh ones; all responses to a problem come together.",
    )
    sampling: Literal["uniform", "residual"] = Field(
        "uniform", description="How they are drawn: all alike, or in proportion to their last |residual|."
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Trajectories whose weights are more optimiser steps old than this are dropped. 0: none are.",
    )

    @property
    def enabled(self) -> bool:
        return self.capacity > 0 or self.capacity_tokens > 0


class OptimConfig(Section):
    learning_rate: float = Field(1e-6, gt=0, description="Of AdamW, after warm-up.")
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field((0.9, 0.95), description="AdamW's betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate after warm-up: kept, or falling to 0 at the last step."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")


class TrainerConfig(Section):
    steps: int = Field(ge=1, description="Optimiser steps in all.")
    batch_tokens: int = Field(
        4096, ge=1, description="Packed tokens per forward and backward; gradients accumulate over as many as needed."
    )
    max_skipped: int = Field(
        3, ge=1, description="Steps in a row skipped for a loss or gradient that is not finite, before the run stops."
    )


class ParallelConfig(Section):
    shard: int = Field(
        0,
        ge=0,
        description="Processes over which the weights are cut; 0: all. Fewer: groups that hold the same slices.",
    )
    vocab_parallel: bool = Field(
        False,
        description="Never gather embedding and head: each process computes with its slice of the vocabulary, for all.",
    )
    reshard_after_forward: bool = Field(
        True, description="Give a block's gathered weights back after its forward; off: more memory, fewer gathers."
    )
    accumulate_sharded: bool = Field(
        False, description="Reduce gradients after every micro-batch: less memory, more traffic; off: once per step."
    )
    cpu_offload: bool = Field(False, description="Keep weights, gradients and optimiser state in the CPU's memory.")
    offload_reference: bool = Field(False, description="Keep the weights of the reference in the CPU's memory.")
    activation_checkpointing: bool = Field(
        False, description="Compute each block's activations again in the backward pass instead of keeping them."
    )
    timeout: int = Field(1800, ge=1, description="Seconds that a process waits for the others before it gives up.")


class EvaluationConfig(Section):
    prompts: int = Field(200, ge=0, description="Held-out problems; never trained on. 0: no evaluation.")
    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after training.")
    samples: int = Field(1, ge=1, description="Responses to each problem: k of avg@k and pass@k.")
    temperature: float = Field(0.0, ge=0, description="0: greedy.")

    @model_validator(mode="after")
    def _greedy_repeats(self) -> EvaluationConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples is {self.samples} but temperature is 0: greedy responses are all the same; "
                             "set samples to 1 or temperature above 0")  # fmt: skip
        return self


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only after the last step.")
    keep: int = Field(2, ge=1, description="Latest checkpoints kept, beside the best.")
    asynchronous: bool = Field(
        False, description="Write while training goes on, from a copy of weights and optimiser in the CPU's memory."
    )


class LoggingConfig(Section):
    wandb: bool = Field(False, description="Also log to Weights & Biases (pip install 'tbrm[wandb]').")


class Config(Section):
    """Everything a run depends on."""

    run: RunConfig
    seed: int = Field(0, ge=0, description="Of the problems drawn, the sampling, and the tiny model's weights.")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    task: SerializeAsAny[Task] | None = Field(
        None, description="What is learnt. Keys beside `name` are the task's own."
    )
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: SerializeAsAny[Objective] = Field(description="The loss. Keys beside `name` are the objective's own.")
    replay: ReplayConfig = ReplayConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.task is None and self.data.trajectories is None:
            raise ValueError(
                "neither task nor data.trajectories is set: name a task to generate rollouts for, or a file"
            )
        if self.replay.samples_per_step and not self.replay.enabled:
            raise ValueError(
                "replay.samples_per_step is set but replay.capacity and replay.capacity_tokens are 0: give the buffer room"
            )
        if self.replay.files and not self.replay.samples_per_step:
            raise ValueError("replay.files is set but replay.samples_per_step is 0: nothing would be drawn of them")
        if self.data.trajectories and self.replay.enabled:
            raise ValueError(
                "replay.capacity or replay.capacity_tokens is set together with data.trajectories: a file is read again and "
                "again anyway"
            )
        if self.data.trajectories and self.rollout.max_staleness:
            raise ValueError(
                f"rollout.max_staleness ({self.rollout.max_staleness}) is set together with data.trajectories, with which "
                "there are no rollouts: set it to 0"
            )
        if self.rollout.prompts % self.rollout.updates:
            raise ValueError(
                f"rollout.prompts ({self.rollout.prompts}) is not a multiple of rollout.updates ({self.rollout.updates}): "
                "each update gets an equal part of a rollout's problems"
            )
        if self.lora.rank and self.model.name == "tiny":
            raise ValueError(
                "lora.rank is set but model.name is 'tiny', which no adapter can name as its base: save a model to a folder"
            )
        if self.lora.rank and self.objective.reset_reference_every:
            raise ValueError(
                f"objective.reset_reference_every is {self.objective.reset_reference_every} but lora.rank is set: the "
                "reference is the model without its adapters, and cannot move; set one of the two to 0"
            )
        if self.lora.rank and self.parallel.offload_reference:
            raise ValueError(
                "parallel.offload_reference is true but lora.rank is set: the reference is the model without its adapters, and "
                "has no weights of its own; leave one of the two out"
            )
        if self.rollout.vllm.addresses and self.rollout.engine != "vllm":
            raise ValueError(
                f"rollout.vllm.addresses is set but rollout.engine is {self.rollout.engine!r}: set it to vllm"
            )
        if self.lora.rank and self.rollout.engine != "embedded":
            raise ValueError(
                f"lora.rank is set but rollout.engine is {self.rollout.engine!r}, to which adapters are not sent: set it to "
                "embedded"
            )
        if self.rollout.max_staleness and self.rollout.engine == "vllm_colocated":
            raise ValueError(
                f"rollout.max_staleness is {self.rollout.max_staleness} but rollout.engine is 'vllm_colocated', which shares "
                "the trainer's process: set the one to 0, or the other to vllm or embedded"
            )
        if self.optim.warmup_steps > self.trainer.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is above trainer.steps ({self.trainer.steps}): lower it"
            )
        return self


_PLUGGABLE = {"objective": (Objective, OBJECTIVES), "task": (Task, TASKS)}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; everybody else, and this loader, as a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, applies `key.sub=value` overrides and checks everything. Raises ConfigError."""
    return parse_config(_overridden(_read(recipe), overrides))


def load_sections(
    source: str | None, overrides: Sequence[str] = (), *, seed: int = 0, **sections: dict[str, Any]
) -> Config:
    """A config for the commands that use a model without training it. Raises ConfigError.

    `source` is a recipe, of which the task, rollout and evaluation sections are taken, or a task's name, or None.
    `sections` replace keys of these and others (None values are left out), and overrides come last.
    """
    tree: dict[str, Any] = {}
    if source is not None:
        is_recipe = source.endswith((".yaml", ".yml"))
        tree = _read(source) if is_recipe else {"task": {"name": source}}
        tree = {key: value for key, value in tree.items() if key in ("task", "rollout", "evaluation")}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | {key: value for key, value in values.items() if value is not None}
    required = {"run": {"dir": "."}, "objective": {"name": "tbrm", "beta": 1.0}, "trainer": {"steps": 1}, "seed": seed}
    if source is None:
        required["data"] = {"trajectories": "-"}
    return parse_config(_overridden({**required, **tree}, overrides))


def _read(recipe: str | Path) -> dict[str, Any]:
    try:
        tree = yaml.load(Path(recipe).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"recipe {str(recipe)!r} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {str(recipe)!r} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"recipe {str(recipe)!r} holds {type(tree).__name__}; wants sections such as `model:` and `trainer:`"
        )
    return tree


def parse_config(tree: dict[str, Any]) -> Config:
    """Checks a config given as nested dicts. Raises ConfigError."""
    tree = dict(tree)
    for section, (base, registry) in _PLUGGABLE.items():
        if isinstance(tree.get(section), dict):
            tree[section] = _build(section, tree[section], base, registry)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, Config, tree)) from None


def config_to_dict(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _build(section: str, values: dict[str, Any], base: Any, registry: Any) -> Any:
    name = values.get("name")
    if not isinstance(name, str):
        raise ConfigError(
            f"{section}.name: got {name!r}; wants one of {', '.join(registry.builtin)}, or an import path"
        )
    kind: Any
    try:
        kind = registry(name)
    except ValueError as error:
        raise ConfigError(f"{section}.name: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(f"{section}.name: {name!r} is not a subclass of tbrm.{section}s.{base.__name__}")
    model: type[BaseModel] = kind
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, values, prefix=section)) from None


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with every `key.sub=value` set in it."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: wants key.sub=value, for instance optim.learning_rate=2e-5")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {parent} is not a section")
        try:
            node[leaf] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    return tree


def _explain(error: ValidationError, model: type[BaseModel], tree: dict[str, Any], prefix: str = "") -> str:
    known = [f"{prefix}.{key}" if prefix else key for key in _known_keys(model, tree)]
    return "\n".join(_explain_one(detail, known, prefix) for detail in error.errors())


def _explain_one(detail: ErrorDetails, known: list[str], prefix: str) -> str:
    key = ".".join(str(part) for part in ((prefix,) if prefix else ()) + detail["loc"])
    if detail["type"] == "extra_forbidden":
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = difflib.get_close_matches(key, known, n=1) or [
            leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), n=1)
        ]
        hint = f"; did you mean {near[0]}?" if near else f"; valid keys: {', '.join(known)}"
        return f"{key}: unknown key (value {detail['input']!r}){hint}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"] or detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return (
        f"{key}: got {detail['input']!r} ({type(detail['input']).__name__}); wants: {message[0].lower()}{message[1:]}"
    )


def _known_keys(model: type[BaseModel], tree: dict[str, Any]) -> list[str]:
    return [key for key, _, _ in describe(model, tree)]


def describe(model: type[BaseModel] = Config, values: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """Every key as (dotted name, default or value, one line of meaning). The objective's and the task's own keys are
    those of the classes that `values` holds, or of the base class."""
    values = values or {}
    rows: list[tuple[str, str, str]] = []
    for name, info in model.model_fields.items():
        value = values.get(name, info.get_default(call_default_factory=True))
        section = type(value) if isinstance(value, BaseModel) else _section_type(info.annotation)
        if section is not None:
            nested = dict(value) if isinstance(value, BaseModel) else value if isinstance(value, dict) else {}
            rows += [(f"{name}.{key}", default, text) for key, default, text in describe(section, nested)]
        else:
            rows.append(
                (name, "required" if value is PydanticUndefined else _yaml_inline(value), info.description or "")
            )
    return rows


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        for inner in get_args(candidate):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                return inner
    return None


def _yaml_inline(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
