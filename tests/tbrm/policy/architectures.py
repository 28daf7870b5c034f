"""Run in several processes, or alone: every architecture is loaded from files that transformers writes, trained, saved, and
resumed after its first step.

    torchrun --nproc-per-node N -m tests.tbrm.policy.architectures FOLDER

reads models and trajectories from FOLDER, and leaves its runs, and what was said of folders that hold no whole model, in
FOLDER/N.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from tbrm.parallel import World
from tbrm.policy.load import load_policy
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.processes.launch import launched
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import ARCHITECTURES, tiny_config, write_model
from tests.tbrm.policy.every_model import tiny

SEEING = "gemma3, with a vision tower that no text trains"
IN_ROWS = "qwen3_5_text"
"""With layers whose state would run on over packed trajectories."""
MODELS = [*ARCHITECTURES, SEEING, IN_ROWS]
STEPS = 2


def write_models(folder: Path) -> None:
    for name in ARCHITECTURES:
        write_model(folder / name, name)
    tokenizer = tiny_tokenizer()
    text = {**ARCHITECTURES["gemma3"].to_dict(), "vocab_size": len(tokenizer), "final_logit_softcapping": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    in_rows = tiny(IN_ROWS, len(tokenizer))
    in_rows.config.max_position_embeddings = 256  # one trajectory is long
    in_rows.save_pretrained(folder / IN_ROWS)
    lm.save_pretrained(folder / SEEING)
    for name in (SEEING, IN_ROWS):
        tokenizer.save_pretrained(folder / name)


def config_of(folder: Path, world: World, model: Path, run: str) -> Any:
    return tiny_config(
        folder / str(world.size) / run,
        model__name=str(model),
        model__layout="rows" if model.name == IN_ROWS else "auto",
        data__trajectories=str(folder / "trajectories.jsonl"),
        rollout__prompts=8,
        rollout__samples=1,
        trainer__steps=STEPS,
        trainer__batch_tokens=80,
        evaluation={"prompts": 0},
        checkpoint={"every": 1},
    )


def go_back(run: Path, copy_to: Path) -> None:
    """A copy of a run as it was after its first step."""
    shutil.copytree(run, copy_to, symlinks=True)
    link = copy_to / "checkpoints" / "latest"
    link.unlink()
    link.symlink_to("step-000001")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    first = tiny_config(folder)
    with launched(first.model, first.parallel) as world:
        for name in MODELS:
            Trainer(config_of(folder, world, folder / name, name), world=world).train()
            runs = folder / str(world.size)
            world.on_main(lambda name=name, runs=runs: go_back(runs / name, runs / f"{name}, resumed"))
            Trainer(config_of(folder, world, folder / name, f"{name}, resumed"), world=world, resume=True).train()
        said: dict[str, list[str]] = {}
        for broken in sorted((folder / "broken").iterdir()):
            try:
                load_policy(config_of(folder, world, broken, "none"), world)
                answer = "loaded"
            except ValueError as error:
                answer = str(error)
            said[broken.name] = world.gather(answer)
        if world.is_main:
            (runs / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
