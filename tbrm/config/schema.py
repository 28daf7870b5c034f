"""The typed config: YAML recipes with dotted overrides, checked in full before torch and any model are loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from tbrm.objectives import Objective
from tbrm.storage.paths import ExpandedPath
from tbrm.tasks import Task

if TYPE_CHECKING:
    import torch


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message says which key, what it got and what it wants."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    dir: ExpandedPath = Field(description="Folder of the run: config, metrics, checkpoints, samples, report.")


class ModelConfig(Section):
    name: ExpandedPath = Field(
        description="Hugging Face folder or hub name, or 'tiny': a small random model made on the spot."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    ignore_weights: list[str] = Field(
        [],
        description="Patterns (*, ?) of tensors in its files to read past, such as a vision tower. What is missing there, or "
        "has no place in the model, is an error.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the products; weights are float32. auto: bfloat16 where the processor has it (GPUs, AVX512-BF16, AMX).",
    )
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = Field(
        "auto",
        description="In training. On a GPU in bfloat16, flash: flash-attn (pip install 'tbrm[gpu]'), varlen: torch's own, "
        "flex: its FlexAttention, compiled. sdpa: segment by segment, anywhere. auto: the first that is there and fits.",
    )
    liger: bool = Field(
        False, description="liger-kernel's RMSNorm, RoPE and gated MLP, on a GPU (pip install 'tbrm[gpu]')."
    )
    compile: bool = Field(
        False, description="torch.compile of each block's norms and MLP; the first steps wait for it. Not with liger."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. auto takes a GPU where there is one.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off for good reason."
    )

    @model_validator(mode="after")
    def _one_way_to_fuse(self) -> ModelConfig:
        if self.compile and self.liger:
            raise ValueError("compile and liger are both true, and both replace norms and MLP: set one to false")
        return self

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"got {device!r}; wants auto, cpu, cuda or cuda:N")
        return device

    def resolve_device(self) -> torch.device:
        """Raises ConfigError for a GPU that is not there."""
        import torch

        device, seen = self._device(), torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= seen:
            raise ConfigError(
                f"model.device: {self.device}; torch sees {seen or 'no'} GPU{'' if seen == 1 else 's'} here, counted from 0 "
                "(`tbrm doctor` says why): set it to auto or cpu"
            )
        return device

    def _device(self) -> torch.device:
        import torch

        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def resolve_precision(self) -> torch.dtype:
        import torch

        from tbrm_kernels.backends.cpu import multiplies_bfloat16

        if self.precision == "auto":
            on_cpu = self._device().type == "cpu"
            return torch.float32 if on_cpu and not multiplies_bfloat16() else torch.bfloat16
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def device_and_precision(self) -> tuple[torch.device, torch.dtype]:
        """As they would be, whether the device is there or not."""
        return self._device(), self.resolve_precision()


class LoraConfig(Section):
    rank: int = Field(0, ge=0, description="Of the adapters (pip install 'tbrm[lora]'); 0: all weights are trained.")
    alpha: float = Field(16.0, gt=0, description="What an adapter adds is scaled by alpha / rank.")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Linear layers that get an adapter; lm_head is one where it is not tied to the embedding.",
    )


class ChatConfig(Section):
    template_kwargs: dict[str, Any] = Field(
        {},
        description="What the model's chat template takes beside messages and tools, such as {enable_thinking: false}.",
    )


class DataConfig(Section):
    trajectories: ExpandedPath | None = Field(
        None,
        description="JSONL of recorded trajectories (prompt or messages, response, reward) to train on; no rollouts.",
    )


_OUR_HEADERS = ("accept-encoding", "content-length", "content-type", "transfer-encoding")


class VllmConfig(Section):
    addresses: list[str] = Field(
        [],
        description="Running servers, such as http://10.0.0.7:8000 (docs/rollouts.md has their command); none: we start them.",
    )
    api_key_env: str | None = Field(
        None, description="Environment variable with the key of the servers at addresses (Authorization: Bearer KEY)."
    )
    headers_env: dict[str, str] = Field(
        {},
        description="More headers for them, each with the environment variable that has its value: {X-Team: TEAM_TOKEN}.",
    )
    servers: int = Field(1, ge=1, description="Servers to start, where no addresses are given.")
    devices: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        description="Dealt out to the servers that we start: numbers of visible GPUs; of cores on a CPU. None: GPUs that "
        "training leaves, then the others; on a CPU a part of the cores for each of several servers.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Of vLLM's model. auto: model.precision.")
    kv_cache_gib: int = Field(2, ge=1, description="Memory for keys and values on a CPU, in GiB.")
    gpu_memory: float = Field(0.45, gt=0, le=1, description="Share of the GPU's memory that vLLM may use in all.")
    options: dict[str, Any] = Field(
        {},
        description="More options of vLLM, by its own names, such as {max_model_len: 4096, tensor_parallel_size: 2}.",
    )
    transfer: Literal["file", "broadcast", "adapters"] = Field(
        "file",
        description="How weights reach servers: file (read by them in weights_dir), broadcast (NCCL; without a GPU gloo), or "
        "adapters (a file of those alone; with lora.rank).",
    )
    weights_dir: ExpandedPath | None = Field(
        None,
        description="Where weights are written; for a file, all servers see it. None: shared memory, or a temporary folder.",
    )
    start_timeout: int = Field(300, ge=1, description="Seconds within which a server must be up, or up again.")
    request_timeout: int = Field(
        600,
        ge=1,
        description="Seconds that a server may owe an answer without making a token; waiting in its queue is none.",
    )
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="Largest mean difference to our log-probs after a sync. None: 0.001 in float32, 0.2 in bfloat16.",
    )

    @field_validator("addresses")
    @classmethod
    def _are_addresses(cls, addresses: list[str]) -> list[str]:
        known = [_server_address(address) for address in addresses]
        if twice := [address for address in known if known.count(address) > 1]:
            raise ValueError(f"{twice[0]} is there twice: name each server once")
        return known

    @field_validator("headers_env")
    @classmethod
    def _are_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name in headers:
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ValueError(f"{name!r} is no name of a header; wants letters, digits and -: X-Team")
            if name.lower() in _OUR_HEADERS:
                raise ValueError(f"{name} is set by tbrm: leave it out")
        return headers

    @model_validator(mode="after")
    def _servers_of_others(self) -> VllmConfig:
        for key in ("api_key_env", "headers_env"):
            if getattr(self, key) and not self.addresses:
                raise ValueError(
                    f"{key} is set but addresses is not, and servers that we start want no key: leave it out"
                )
        if self.api_key_env and "authorization" in map(str.lower, self.headers_env):
            raise ValueError("api_key_env is set, and Authorization in headers_env, too: they are one; leave one out")
        if self.addresses and self.devices:
            raise ValueError(
                "devices is set, and addresses, too: it is for servers that we start; leave one of the two out"
            )
        return self


def _server_address(given: str) -> str:
    """Without /v1, which people are used to write and vLLM's other paths do not have. Raises ValueError."""
    if given.startswith("/"):  # a Unix socket
        return given
    try:
        parts = urlsplit(given)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{given!r} is no address; wants http:// or https://, a host and perhaps a port: http://10.0.0.7:8000"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{parts.hostname}: an address has neither a user, ? nor #, and is written into the run's folder: see api_key_env "
            "and headers_env"
        )
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return parts._replace(netloc=parts.netloc.lower(), path=path).geturl()  # the scheme is lower-case already


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
    max_prompt_tokens: int = Field(0, ge=0, description="Longest prompt, in tokens. 0: no limit.")
    long_prompts: Literal["refuse", "drop"] = Field(
        "refuse", description="A longer one: an error that names it, or left out, counted as prompts_dropped."
    )
    stop_ids: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="Token ids that end a response, beside those of the model, its tokenizer and its chat template."
    )
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Texts that end a response, with the token that completes one; the response keeps it."
    )
    bar_unused_ids: bool = Field(
        False,
        description="Never sample token ids that the tokenizer has no text for (padding of the model's vocabulary).",
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
    ungraded: Literal["drop", "zero"] = Field(
        "drop",
        description="A response that could not be graded (a reward of None, a grader out of time): left out, or reward 0.",
    )
    vllm: VllmConfig = VllmConfig()


class ReplayConfig(Section):
    capacity: int = Field(0, ge=0, description="Trajectories kept for reuse, oldest out first. 0: no such limit.")
    capacity_tokens: int = Field(
        0,
        ge=0,
        description="Tokens, prompts included, of the trajectories kept. 0: no such limit; both 0: none are kept.",
    )
    files: list[ExpandedPath] = Field(
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


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    learning_rate: float = Field(1e-6, gt=0, description="Of AdamW, after warm-up.")
    betas: Annotated[tuple[_Beta, _Beta], Field(strict=False)] = Field((0.9, 0.95), description="AdamW's betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decoupled weight decay, of matrices; norms and biases have none."
    )
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
    chat: ChatConfig = ChatConfig()
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
        if (key := self.objective.wants_several_responses) and not self.data.trajectories and self.rollout.samples == 1:
            raise ValueError(
                f"objective.{key} is true but rollout.samples is 1: less its own mean, every reward would be 0; set samples to "
                "2 or more, or the other to false"
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
        if self.rollout.vllm.transfer == "adapters" and not 0 < self.lora.rank <= 512:
            raise ValueError(
                f"rollout.vllm.transfer is adapters but lora.rank is {self.lora.rank}: set a rank of 1 to 512, which vLLM can "
                "take, or transfer to file"
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
        if self.rollout.vllm.transfer != "file" and self.rollout.engine != "vllm":
            raise ValueError(
                f"rollout.vllm.transfer is {self.rollout.vllm.transfer} but rollout.engine is {self.rollout.engine!r}, which "
                "sends to no server: set the one to file, or the other to vllm"
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
