"""A reward function with the signature of TRL's `reward_funcs`, given to `tbrm.train` as it is.

The tiny model, made on the spot, learns which characters each prompt asks for: the rows' column `kind` says.
"""

from __future__ import annotations

import json
from pathlib import Path

import tbrm

KINDS = {"digits": str.isdigit, "capitals": str.isupper}


def share_of_kind(completions: list[str], kind: list[str], **_: object) -> list[float]:
    """Of all eight characters that a response may have; `prompts`, `completion_ids` and `trainer_state` come along, too."""
    return [sum(map(KINDS[wanted], text)) / 8 for text, wanted in zip(completions, kind, strict=True)]


def main() -> None:
    rows = [{"prompt": f"{kind} {n}", "kind": kind, "answer": ""} for n in range(100) for kind in KINDS]
    Path("runs").mkdir(exist_ok=True)
    Path("runs/kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tbrm.load_config(
        {
            "run": {"dir": "runs/trl_reward"},
            "model": {"name": "tiny", "precision": "float32"},
            "task": {
                "name": "file",
                "path": "runs/kinds.jsonl",
                "heldout_rows": 40,
                "verifier": "given",  # the function below; in a recipe, trl_reward:share_of_kind
                "correct_at": 0.9,  # from which reward on a response counts in the accuracy
            },
            "objective": {"name": "tbrm", "beta": 0.02},
            "rollout": {"prompts": 32, "samples": 2, "max_new_tokens": 8},
            "optim": {"learning_rate": 3e-3},
            "trainer": {"steps": 40},
            "evaluation": {"prompts": 40},
        }
    )
    result = tbrm.train(config, reward=share_of_kind, overwrite=True)
    print(f"mean reward of held-out prompts: {result['reward_before']:.2f} -> {result['reward_after']:.2f}")


if __name__ == "__main__":
    main()
