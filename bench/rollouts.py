"""Tokens a second of rollouts: transformers' `generate`, the embedded engine, vLLM.

    python -m bench.rollouts bench/results/rollouts.md

Each way runs in a process of its own, on the model and device that training would use. Its greedy responses are compared
with those of `generate`; in float32 a way whose responses differ gets no figure.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bench.conftest import machine
from tbrm.chat import Chat, make_chat
from tbrm.config.recipe import load_config
from tbrm.config.schema import Config
from tbrm.policy.generation import generation_mode
from tbrm.policy.load import load_policy
from tbrm.policy.model import PolicyModel
from tbrm.rollout import Sampling, make_engine, make_requests
from tbrm.tasks import ProblemStream

RECIPE = Path(__file__).parents[1] / "recipes" / "chain_sum.yaml"
WAYS = {"generate": "transformers `generate`", "embedded": "embedded engine", "vllm": "vLLM engine"}
ROUNDS = 3

_THINGS = ("the moon", "a cat", "Paris", "bread", "rain", "iron", "music", "a bee", "the sea", "gold")
_QUESTIONS = (
    "Name one fact about {}.",
    "What is {}? Answer in one short sentence.",
    "Describe {} briefly.",
    "Is {} alive? Answer yes or no.",
    "Write a sentence with the word {} in it.",
    "Say {} in French.",
    "Give a synonym for {}.",
)
"""Questions whose answers are of a few tokens to more than a cut-off at 64 allows."""

Generate = Callable[[list[list[int]], Sampling, int], list[list[int]]]


def workloads(config: Config, chat: Chat) -> dict[str, tuple[list[list[int]], Sampling]]:
    rollout = config.rollout
    assert config.task is not None
    _, demo = chat.encode_problems(ProblemStream(config.task, config.seed, []).take(rollout.prompts))
    asked = [question.format(thing) for thing in _THINGS for question in _QUESTIONS][:64]
    questions = [chat.encode([{"role": "user", "content": text}]) for text in asked]
    return {
        f"{len(demo)} sums, up to {rollout.max_new_tokens} tokens": (
            demo,
            Sampling(rollout.max_new_tokens, rollout.temperature),
        ),
        f"{len(questions)} questions, up to 64 tokens": (questions, Sampling(64)),
    }


def plain_generate(policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Generate:
    """Padded batches, the weights in the precision of the products, as `generate` is usually called."""

    def generate(prompts: list[list[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        responses: list[list[int]] = []
        with generation_mode(policy) as lm:
            lm = lm.to(policy.precision)
            eos = lm.generation_config.eos_token_id
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                padded = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(lm.device)
                choice: dict[str, Any] = {"do_sample": False}
                if sampling.temperature > 0:
                    choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
                torch.manual_seed(seed)
                out = lm.generate(**padded, max_new_tokens=sampling.max_new_tokens, **choice)
                for ids in out[:, padded["input_ids"].shape[1] :].tolist():
                    responses.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
        return responses

    return generate


def measure(way: str, precision: str) -> dict[str, Any]:
    """By workload: the greedy responses, and tokens and seconds of each round, sampled."""
    named = [] if way == "generate" else [f"rollout.engine={way}"]
    config = load_config(RECIPE, [f"model.precision={precision}", *named])
    policy, tokenizer = load_policy(config)
    chat = make_chat(config, policy.lm, tokenizer)
    cases = workloads(config, chat)
    if way == "generate":
        return timed(plain_generate(policy, tokenizer, config.rollout.batch_size), cases)
    with closing(make_engine(config.rollout, policy, chat, run_dir=Path("runs/bench-rollouts"))) as engine:
        engine.update_weights(0)

        def generate(prompts: list[list[int]], sampling: Sampling, seed: int) -> list[list[int]]:
            return [response.token_ids for [response] in engine.generate(make_requests(prompts, 1, seed), sampling)]

        return timed(generate, cases)


def timed(generate: Generate, cases: dict[str, tuple[list[list[int]], Sampling]]) -> dict[str, Any]:
    found = {}
    for name, (prompts, sampling) in cases.items():
        greedy = generate(prompts, Sampling(sampling.max_new_tokens, temperature=0), 0)
        rounds = []
        for seed in range(ROUNDS):
            started = time.perf_counter()
            responses = generate(prompts, sampling, seed)
            rounds.append((sum(map(len, responses)), time.perf_counter() - started))
        found[name] = {"greedy": greedy, "rounds": rounds}
    return found


def run(way: str, precision: str) -> dict[str, Any] | str:
    """What `measure` finds in a process of its own, or the last line of why it could not."""
    command = [sys.executable, "-m", "bench.rollouts", "--measure", way, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, dict[str, Any] | str], precision: str) -> list[str]:
    plain = found["generate"]
    if isinstance(plain, str):
        raise RuntimeError(f"generate: {plain}")
    lines = []
    for name, case in plain.items():
        lengths = sorted(map(len, case["greedy"]))
        spread = ", ".join(str(lengths[len(lengths) * q // 100]) for q in (10, 25, 50, 75, 90))
        lines += [
            f"**{name}**, {statistics.mean(lengths):.1f} in the mean (greedy; 10, 25, 50, 75, 90%: {spread})",
            "",
            "| | tokens/s | over `generate` | greedy responses equal |",
            "|---|---|---|---|",
        ]
        speed_of = {
            way: statistics.median(tokens / seconds for tokens, seconds in result[name]["rounds"])
            for way, result in found.items()
            if not isinstance(result, str)
        }
        for way, result in found.items():
            if isinstance(result, str):
                lines.append(f"| {WAYS[way]} | not measured: {result} | | |")
                continue
            equal = sum(a == b for a, b in zip(result[name]["greedy"], case["greedy"], strict=True))
            same = equal == len(lengths) or precision != "float32"
            speed = f"{speed_of[way]:.0f} | {speed_of[way] / speed_of['generate']:.2f}" if same else "other responses |"
            lines.append(f"| {WAYS[way]} | {speed} | {equal} of {len(lengths)} |")
        lines.append("")
    return lines


def main() -> None:
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(*sys.argv[2:])))
        return
    out = Path(sys.argv[1])
    config = load_config(RECIPE)
    auto = str(config.model.resolve_precision()).removeprefix("torch.")
    lines = [
        f"Made by `make bench-rollouts` on {machine()}: {config.model.name}, {config.rollout.batch_size} responses at a time.",
        f"Sampled; median of {ROUNDS} rounds. `generate` has its weights in the precision named.",
        "",
    ]
    for precision in dict.fromkeys(("float32", auto)):
        found = {}
        for way in WAYS:
            print(f"{precision}: {WAYS[way]}, some minutes", file=sys.stderr, flush=True)
            found[way] = run(way, precision)
        lines += [f"## {precision}", "", *table(found, precision)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print(out.read_text())


if __name__ == "__main__":
    main()
