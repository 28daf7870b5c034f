"""Keys of where trajectories come from: rollouts, replay and recorded files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tbrm.config.section import Section
from tbrm.config.vllm import VllmConfig
from tbrm.storage.path_keys import ExpandedPath


class DataConfig(Section):
    trajectories: ExpandedPath | None = Field(
        None,
        description="JSONL of recorded trajectories (prompt or messages, response, reward) to train on; no rollouts.",
    )


class RolloutConfig(Section):
    engine: Literal["embedded", "vllm", "vllm_colocated"] = Field(
        "embedded",
        description="What generates: embedded (the policy itself), vllm (servers) or vllm_colocated (vLLM in our process).",
    )
    prompts: int = Field(16, ge=1, description="Problems per rollout.")
    samples: int = Field(4, ge=1, description="Responses to each problem. One is enough for tbrm.")
    refill: int = Field(
        0,
        ge=0,
        description="Further draws of problems, at most, in place of those whose responses all have one reward, which are left "
        "out (DAPO's dynamic sampling). 0: all are trained on.",
    )
    max_new_tokens: int = Field(
        256, ge=1, description="Longest response, in tokens; one that is cut off is 'truncated'."
    )
    max_prompt_tokens: int = Field(0, ge=0, description="Longest prompt, in tokens. 0: no limit.")
    long_prompts: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What becomes of a longer prompt: an error that names it, or left out, counted as prompts_dropped.",
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
    temperature: float = Field(
        1.0, gt=0, description="Temperature of sampling, and of Q = logits / temperature in training."
    )
    importance: Literal["none", "truncated"] = Field(
        "none",
        description="What becomes of the gap between engine and trainer where objectives have ratios: none (it is in them), "
        "truncated (ratios are to the trainer's own, and tokens weigh trainer / engine, up to the cap).",
    )
    importance_cap: float = Field(2.0, gt=0, description="The most that a token weighs with importance: truncated.")
    batch_size: int = Field(64, ge=1, description="Responses generated at once.")
    truncated: Literal["reward", "fixed", "drop"] = Field(
        "reward",
        description="What a truncated response gets: its verifier's reward, the fixed reward below, or dropped.",
    )
    truncated_reward: float = Field(0.0, description="The reward of a truncated response when truncated is 'fixed'.")
    ungraded: Literal["drop", "zero"] = Field(
        "drop",
        description="What becomes of a response that could not be graded (a reward of None, a grader out of time): left out, "
        "or reward 0.",
    )
    vllm: VllmConfig = VllmConfig()

    @property
    def weight_cap(self) -> float | None:
        """Of importance weights; None: there are none."""
        return None if self.importance == "none" else self.importance_cap


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
        "uniform", description="How old trajectories are drawn: all alike, or in proportion to their last |residual|."
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Trajectories whose weights are more optimiser steps old than this are dropped. 0: none are.",
    )

    @property
    def enabled(self) -> bool:
        return self.capacity > 0 or self.capacity_tokens > 0
