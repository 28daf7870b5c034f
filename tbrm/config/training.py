"""Keys of a run's steps, its processes, and what is kept and measured of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tbrm.config.section import Section
from tbrm.storage.path_keys import ExpandedPath


class RunConfig(Section):
    dir: ExpandedPath = Field(description="Folder of the run: config, metrics, checkpoints, samples, report.")


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    learning_rate: float = Field(1e-6, gt=0, description="Learning rate of AdamW, after warm-up.")
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


class CriticConfig(Section):
    model: str | None = Field(
        None, description="Of objectives with a critic: a folder or hub name of its backbone; left out: the policy's."
    )
    learning_rate: float = Field(
        1e-5, gt=0, description="Learning rate of the critic's AdamW; its schedule is the policy's."
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
    prompts: int = Field(
        200,
        ge=0,
        description="Held-out problems; never trained on. 0: no evaluation. Left out: 200, or all that the task holds out.",
    )
    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after training.")
    samples: int = Field(1, ge=1, description="Responses to each problem: k of avg@k and pass@k.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the sampling; 0: greedy.")

    @model_validator(mode="after")
    def _greedy_repeats(self) -> EvaluationConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples is {self.samples} but temperature is 0: greedy responses are all the same; "
                             "set samples to 1 or temperature above 0")  # fmt: skip
        return self

    @property
    def says_prompts(self) -> bool:
        """Whether `prompts` is somebody's word, and not what `fitted` found."""
        return "prompts" in self.model_fields_set

    def fitted(self, held_out: int | None) -> EvaluationConfig:
        """With as many problems as there are, if that is known and `prompts` was left out."""
        if self.says_prompts:
            return self
        default: int = type(self).model_fields["prompts"].default
        fitted = self.model_copy(update={"prompts": default if held_out is None else min(default, held_out)})
        fitted.model_fields_set.discard("prompts")
        return fitted


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only after the last step.")
    keep: int = Field(2, ge=1, description="Latest checkpoints kept, beside the best.")
    asynchronous: bool = Field(
        False,
        description="Write checkpoints while training goes on, from a copy of weights and optimiser in the CPU's memory.",
    )


class LoggingConfig(Section):
    report: bool = Field(True, description="Write report.html and its plots when the run ends, as `tbrm report` does.")
    wandb: bool = Field(False, description="Also log to Weights & Biases (pip install 'tbrm[wandb]').")
