"""Training on a file of trajectories and nothing else: no rollouts, no importance ratios, whoever made the responses.

Here nobody in particular did: 1,000 responses of random digits, each with its reward, teach a model to give even ones.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import tbrm
from tbrm.tasks import Grade, Problem

LENGTH = 6


def share_of_even(response: str) -> float:
    return sum(char in "02468" for char in response) / LENGTH


class Even(tbrm.Task):
    """What is evaluated. Training takes its prompts, responses and rewards from the file."""

    def problem(self, index, seed):
        return Problem(f"number {index}", "")

    def heldout(self, count):
        return [Problem(f"number {10_000 + n}", "") for n in range(count)]

    def grade(self, problems, responses):
        return [Grade(share_of_even(text), correct=share_of_even(text) == 1) for text in responses]


def main() -> None:
    draw = random.Random(0)
    responses = ["".join(draw.choices("0123456789", k=LENGTH)) for _ in range(1000)]
    rows = [{"prompt": f"number {n}", "response": r, "reward": share_of_even(r)} for n, r in enumerate(responses)]
    Path("runs").mkdir(exist_ok=True)
    Path("runs/numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"dir": "runs/offline_file"},
        "model": {"name": "tiny", "precision": "float32"},
        "task": {"name": "given"},
        "data": {"trajectories": "runs/numbers.jsonl"},
        "objective": {"name": "tbrm", "beta": 0.05},
        "rollout": {"prompts": 64, "samples": 1, "max_new_tokens": LENGTH},  # trajectories a step; of evaluations
        "optim": {"learning_rate": 3e-3},
        "trainer": {"steps": 100},
        "evaluation": {"prompts": 40},
    }
    result = tbrm.train(tbrm.load_config(recipe), task=Even(), overwrite=True)
    best = max(row["reward"] for row in rows)
    print(f"rewards in the file: {sum(row['reward'] for row in rows) / len(rows):.2f} in the mean, {best:.2f} at most")
    print(f"mean reward of held-out prompts: {result['reward_before']:.2f} -> {result['reward_after']:.2f}")


if __name__ == "__main__":
    main()
