"""Training steps of a model of Qwen2.5-0.5B's shape with random weights, on recorded trajectories of random tokens.

python -m bench.gpu.trainer build/gpu/trainer.jsonl [KEY=VALUE ...]

A row for each step as it ends. The overrides, such as model.compile=true, are keys of the recipe.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.gpu.json_lines import append
from bench.shapes import DEVICE
from tbrm.config.recipe import load_config
from tbrm.plan import make_plan
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.training.trainer import Trainer

ON_GPU = DEVICE.type == "cuda"
SECONDS = 6.0  # of steps
FEWEST, MOST = (4, 20) if ON_GPU else (2, 2)


class Shape(NamedTuple):
    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    trajectories: int
    prompt: int  # tokens, of the longest
    response: int
    batch_tokens: int


QWEN = Shape(151936, 896, 4864, 24, 14, 2, trajectories=64, prompt=192, response=384, batch_tokens=8192)
TINY = Shape(512, 64, 128, 2, 2, 1, trajectories=4, prompt=6, response=12, batch_tokens=64)


def main(out: Path, overrides: list[str]) -> None:
    shape = QWEN if ON_GPU else TINY
    case = {"case": " ".join(overrides) or "default"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(shape, folder / "model")
        make_trajectories(shape, folder / "trajectories.jsonl")
        config = load_config(make_recipe(shape, folder), overrides)
        try:
            append(out, {**case, "what": "planned_mib", "value": make_plan(config, 1).peak() / 2**20})
        except Exception as error:  # the steps are worth more than the plan
            append(
                out, {**case, "what": "planned_mib", "value": None, "note": f"{type(error).__name__}: {error}"[:300]}
            )
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(config)
        append(out, {**case, "what": "attention", "value": trainer.policy.attention})
        append(out, {**case, "what": "parameters", "value": sum(p.numel() for p in trainer.policy.parameters())})
        begun = time.perf_counter()
        while trainer.state.step < FEWEST or (time.perf_counter() - begun < SECONDS and trainer.state.step < MOST):
            append(out, {**case, "what": "step", **step(trainer)})


def step(trainer: Trainer) -> dict[str, Any]:
    trajectories = trainer.supply.source.trajectories  # type: ignore[union-attr]
    for trajectory in trajectories:
        trajectory.reference = None  # a fresh trajectory has not been scored yet
    begun = time.perf_counter()
    metrics = trainer.train_step()  # its phases wait for the device
    seconds = time.perf_counter() - begun
    tokens = sum(len(t.prompt_ids) + len(t.response_ids) - 1 for t in trajectories)
    kept = ("loss", "grad_norm", "skipped", "peak_memory_mib")
    phases = {key: value for key, value in metrics.items() if key.startswith("seconds/")}
    return {"seconds": seconds, "tokens": tokens, **{key: metrics[key] for key in kept}, **phases}


def make_model(shape: Shape, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with DEVICE:
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_trajectories(shape: Shape, path: Path) -> None:
    """Of many lengths, as answers are."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(shape.trajectories):
            lengths = (draw.randint(longest // 3, longest) for longest in (shape.prompt, shape.response))
            prompt, response = ([draw.randrange(100, shape.vocab) for _ in range(length)] for length in lengths)
            file.write(json.dumps({"prompt_ids": prompt, "response_ids": response, "reward": i % 2}) + "\n")


def make_recipe(shape: Shape, folder: Path) -> Path:
    recipe = {
        "run": {"dir": str(folder / "run")},
        "model": {"name": str(folder / "model"), "device": DEVICE.type, "precision": "bfloat16"},
        "data": {"trajectories": str(folder / "trajectories.jsonl")},
        "rollout": {"prompts": shape.trajectories, "samples": 1},
        "objective": {"name": "tbrm", "beta": 0.02},
        "optim": {"learning_rate": 1e-6},
        "trainer": {"steps": MOST, "batch_tokens": shape.batch_tokens},
        "evaluation": {"prompts": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML, too
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
