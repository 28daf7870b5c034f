"""What a trajectory is: a prompt, a response and its reward, as token ids, and what the reference says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ReferenceScore:
    """What the reference model says of one trajectory, on the CPU."""

    version: int
    """The reference's version when it said so; a score of another version is not used."""
    logprobs: Tensor
    """log pi_ref of each action, [H] float32."""
    value: Tensor
    """V_ref(s_1), [] float32."""
    state: Tensor | None = None
    """Its hidden state of the prompt's last token, which V_ref(s_1) is made of, [D] float32; None where nobody wants it."""


@dataclass
class Trajectory:
    """A prompt, a response to it as token ids, and the reward."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float
    truncated: bool = False
    """The response was cut off: its last token is not an end of sequence."""
    group: int = 0
    """Trajectories of one group answer the same problem; group means are taken over them."""
    weight_version: int | None = 0
    """Optimiser steps that the policy had taken when it made the response; None: somebody else made it."""
    action_mask: list[bool] | None = None
    """Which response tokens the policy chose; None for all. Tool and user turns are False: context, never scored."""
    reference: ReferenceScore | None = field(default=None, repr=False)
    behaviour_logprobs: Tensor | None = field(default=None, repr=False)
    """log mu of each action, [H] float32 on the CPU, mu the distribution that it was drawn from: temperature included, under
    the weights of that moment, as the engine computed it. None if nobody said."""

    old_logprobs: Tensor | None = field(default=None, repr=False)
    """With `rollout.importance`, log pi of each action as the trainer computed it when the rollout came in, likewise."""
    old_values: Tensor | None = field(default=None, repr=False)
    """With a critic, what it said of the state of each action when the rollout came in, likewise."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                "Trajectory.prompt_ids is empty: the first state s_1 needs at least one token (a BOS will do)"
            )
        if self.action_mask is not None and len(self.action_mask) != len(self.response_ids):
            raise ValueError(
                f"Trajectory.action_mask has {len(self.action_mask)} entries for {len(self.response_ids)} response tokens"
            )
        if self.behaviour_logprobs is not None and self.behaviour_logprobs.shape != (len(self.actions),):
            raise ValueError(
                f"Trajectory.behaviour_logprobs is {list(self.behaviour_logprobs.shape)} for {len(self.actions)} actions: it "
                "wants one for each"
            )

    @property
    def acts(self) -> bool:
        """Whether the policy chose any token of the response."""
        return bool(self.response_ids) if self.action_mask is None else any(self.action_mask)

    @property
    def actions(self) -> list[int]:
        """Indices into the response of the tokens that the policy chose."""
        if self.action_mask is None:
            return list(range(len(self.response_ids)))
        return [i for i, chosen in enumerate(self.action_mask) if chosen]
