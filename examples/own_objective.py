"""An objective of one's own: TBRM's residual under Huber's loss, which a few large residuals do not rule."""

from __future__ import annotations

import random

import torch
from pydantic import Field
from torch.nn.functional import huber_loss

import tbrm
from tbrm.objectives import TrajectoryLoss
from tbrm.tasks import Grade, Problem
from tbrm_kernels import segment_sums, trajectory_residual

DIGITS = {"even": "02468", "odd": "13579"}


class Huber(tbrm.Objective):
    """A function of per-token statistics, which never sees logits; its fields are keys of a recipe."""

    threshold: float = Field(10.0, gt=0, description="Residual, in nats, beyond which the loss is linear.")

    def __call__(self, stats, batch):
        ref_sums = segment_sums(batch.ref_logprobs, batch.cu_seqlens)
        residual = trajectory_residual(*stats[:2], batch.cu_seqlens, ref_sums, batch.rewards, self.beta)
        loss = huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.threshold)
        return TrajectoryLoss(loss, residual)


class Parity(tbrm.Task):
    """Six even or six odd digits, as the prompt says; the reward is the share that there are."""

    def problem(self, index, seed):
        draw = random.Random(f"{seed} {index}")
        return Problem(f"{draw.choice(['even', 'odd'])} {draw.randrange(1000)}", "")

    def heldout(self, count):
        return [Problem(f"{['even', 'odd'][n % 2]} {1000 + n}", "") for n in range(count)]

    def grade(self, problems, responses):
        wanted = [DIGITS[problem.prompt.split()[0]] for problem in problems]
        counts = [sum(map(digits.count, text)) for digits, text in zip(wanted, responses, strict=True)]
        return [Grade(count / 6, correct=count == 6) for count in counts]


if __name__ == "__main__":
    recipe = {
        "run": {"dir": "runs/own_objective"},
        "model": {"name": "tiny", "precision": "float32"},
        "task": {"name": "given"},  # the two below; in a recipe, own_objective:Parity and own_objective:Huber
        "objective": {"name": "given"},
        "rollout": {"prompts": 32, "samples": 2, "max_new_tokens": 6},
        "optim": {"learning_rate": 3e-3},
        "trainer": {"steps": 40},
        "evaluation": {"prompts": 40},
    }
    objective = Huber(beta=0.02, threshold=20.0)
    result = tbrm.train(tbrm.load_config(recipe), task=Parity(), objective=objective, overwrite=True)
    print(f"mean reward of held-out prompts: {result['reward_before']:.2f} -> {result['reward_after']:.2f}")
