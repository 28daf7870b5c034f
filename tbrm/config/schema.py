"""The typed config as a whole: its sections, and what does not go together, checked before torch and any model are loaded."""

from __future__ import annotations

from pydantic import Field, SerializeAsAny, model_validator

from tbrm.config.model import ChatConfig, LoraConfig, ModelConfig
from tbrm.config.rollout import DataConfig, ReplayConfig, RolloutConfig
from tbrm.config.section import Section
from tbrm.config.training import (
    CheckpointConfig,
    CriticConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from tbrm.objectives import Objective
from tbrm.registry import GIVEN
from tbrm.tasks import Task


class Config(Section):
    """Everything a run depends on."""

    run: RunConfig
    seed: int = Field(0, ge=0, description="Seed of the problems drawn, the sampling, and the tiny model's weights.")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    task: SerializeAsAny[Task] | None = Field(
        None, description="What is learnt. Keys beside `name` are the task's own."
    )
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: SerializeAsAny[Objective] = Field(description="The loss. Keys beside `name` are the objective's own.")
    critic: CriticConfig = CriticConfig()
    replay: ReplayConfig = ReplayConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _sources_of_trajectories(self) -> Config:
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
        if self.data.trajectories and self.objective.beta == "auto":
            raise ValueError(
                "objective.beta is auto but data.trajectories is set: there are no responses of the policy, by which to "
                "measure how far it goes from the reference; give a number"
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
        if self.rollout.refill and self.data.trajectories:
            raise ValueError(
                f"rollout.refill ({self.rollout.refill}) is set together with data.trajectories, with which there are no "
                "rollouts: set it to 0"
            )
        if self.rollout.refill and self.rollout.samples == 1:
            raise ValueError(
                f"rollout.refill is {self.rollout.refill} but rollout.samples is 1: a problem whose responses all have one "
                "reward is left out, and so would be all; set samples to 2 or more, or refill to 0"
            )
        if self.rollout.importance != "none" and not self.objective.takes_ratios:
            raise ValueError(
                f"rollout.importance is {self.rollout.importance} but objective.name is {self.objective.name!r}, which has no "
                "ratio to correct: set it to none"
            )
        if self.rollout.importance != "none" and self.data.trajectories:
            raise ValueError(
                f"rollout.importance is {self.rollout.importance}, together with data.trajectories, with which no engine of "
                "ours samples: set it to none, and ratios are to the file's own log-probs"
            )
        if self.rollout.prompts % self.rollout.updates:
            raise ValueError(
                f"rollout.prompts ({self.rollout.prompts}) is not a multiple of rollout.updates ({self.rollout.updates}): "
                "each update gets an equal part of a rollout's problems"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Config:
        if self.lora.rank and self.model.name in ("tiny", GIVEN):
            raise ValueError(
                f"lora.rank is set but model.name is {self.model.name!r}, which no adapter can name as its base: save a model "
                "to a folder"
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
        return self

    @model_validator(mode="after")
    def _critic(self) -> Config:
        """One needs the values that it had when a rollout came in, and weights that are all trained."""
        if not self.objective.has_critic:
            return self
        refused = {
            "data.trajectories": self.data.trajectories is not None,
            "replay.samples_per_step": self.replay.samples_per_step > 0,
            "lora.rank": self.lora.rank > 0,
            "parallel.vocab_parallel": self.parallel.vocab_parallel,
        }
        for key in (key for key, is_set in refused.items() if is_set):
            raise ValueError(
                f"{key} is set, but objective.name is {self.objective.name!r}, whose critic learns from fresh rollouts, all of "
                "its weights, each process its slices; leave it out"
            )
        if self.model.name == GIVEN and self.critic.model is None:
            raise ValueError("critic.model: left out, but model.name is given, which is not loaded twice: name a model")
        return self

    @model_validator(mode="after")
    def _engines(self) -> Config:
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
        return self

    @model_validator(mode="after")
    def _steps(self) -> Config:
        if self.optim.warmup_steps > self.trainer.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is above trainer.steps ({self.trainer.steps}): lower it"
            )
        return self
