"""The ways to take the step of `bench.step`, each in a process of its own.

The trajectories (bench/step_trajectories.jsonl) are 16 problems with 4 answers each, of up to 16 tokens:

    tbrm rollout recipes/chain_sum.yaml --out bench/step_trajectories.jsonl rollout.prompts=16 rollout.samples=4 \
        evaluation.prompts=0
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, TrainerCallback

from bench.products import Products, floor
from bench.worker import serve, taken_mib
from tbrm.config.model import ModelConfig
from tbrm.config.recipe import load_config
from tbrm.training.trainer import Trainer
from tbrm.trajectories.packing import pack

MODEL = ".models/SmolLM2-135M-Instruct"
TRAJECTORIES = "bench/step_trajectories.jsonl"
MICRO_BATCH = 16
ROUNDS = 5
TEMPERATURE, BETA, LEARNING_RATE, BETAS, MAX_GRAD_NORM = 0.7, 0.002, 3e-5, (0.9, 0.95), 1.0


@cache
def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(TRAJECTORIES).read_text().splitlines()]


def padded_tokens() -> int:
    return len(recorded()) * sum(max(len(row[key]) for row in recorded()) for key in ("prompt_ids", "response_ids"))


def precision() -> str:
    """What is fast on this processor."""
    return str(ModelConfig(name=MODEL).resolve_precision()).removeprefix("torch.")


class Tbrm:
    """This trainer, with the objective `tbrm`: packed, the prompt of 4 answers once, the head in a single pass."""

    def __init__(self, precision: str) -> None:
        overrides = [
            f"model.name={MODEL}",
            f"model.precision={precision}",
            "model.device=cpu",
            f"data.trajectories={TRAJECTORIES}",
            f"objective.beta={BETA}",
            "objective.reward_offset=0.0",
            "rollout.prompts=16",
            "rollout.samples=4",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "evaluation.prompts=0",
            f"run.dir={tempfile.gettempdir()}/unused",
        ]
        self.trainer = Trainer(load_config("recipes/chain_sum.yaml", overrides))

    @torch.no_grad()
    def logprobs(self) -> list[float]:
        return self.trainer.policy(pack(self.trainer.supply.source.trajectories)).logprobs.tolist()

    def steps(self) -> list[float]:
        return [self.step() for _ in range(ROUNDS + 1)]

    def parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.policy.parameters())

    def step(self) -> float:
        for trajectory in self.trainer.supply.source.trajectories:
            trajectory.reference = None  # a fresh trajectory has not been scored yet
        return timed(self.trainer.train_step)


class Padded:
    """All trajectories in one rectangle: prompts padded on the left, responses on the right."""

    def __init__(self) -> None:
        prompts, responses = ([torch.tensor(row[key]) for row in recorded()] for key in ("prompt_ids", "response_ids"))
        kept = [[torch.ones_like(ids) for ids in part] for part in (prompts, responses)]
        self.targets = pad_sequence(responses, batch_first=True)
        self.mask = pad_sequence(kept[1], batch_first=True)
        self.ids = torch.cat([_left(prompts), self.targets], dim=1)
        self.attention = torch.cat([_left(kept[0]), self.mask], dim=1)

    def micro_batches(self) -> list[slice]:
        return [slice(start, start + MICRO_BATCH) for start in range(0, len(self.ids), MICRO_BATCH)]


def _left(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_side="left")


class Eager:
    """Plain PyTorch, as verl's workers do it where padding stays: the model's logits at all positions, log-softmax, gather.
    The loss is ours."""

    def __init__(self, precision: str) -> None:
        self.precision = getattr(torch, precision)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True
        )
        self.batch = Padded()
        self.rewards = torch.tensor([row["reward"] for row in recorded()])

    def _statistics(self, model: torch.nn.Module, rows: slice) -> tuple[Tensor, Tensor]:
        """Log-probs of the responses' tokens [rows, R], and V(s_1) [rows]."""
        batch = self.batch
        attention, targets = batch.attention[rows], batch.targets[rows]
        with torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            logits = model(
                input_ids=batch.ids[rows],
                attention_mask=attention,
                position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
        logits = logits[:, -targets.shape[1] - 1 : -1].float() / TEMPERATURE
        return logits.log_softmax(-1).gather(2, targets[..., None])[..., 0], logits[:, 0].logsumexp(-1)

    @torch.no_grad()
    def logprobs(self) -> list[float]:
        parts = [self._statistics(self.model, rows)[0] for rows in self.batch.micro_batches()]
        return torch.cat(parts)[self.batch.mask.bool()].tolist()

    def steps(self) -> list[float]:
        return [timed(self.step) for _ in range(ROUNDS + 1)]

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def step(self) -> None:
        for rows in self.batch.micro_batches():
            with torch.no_grad():
                reference, _ = self._statistics(self.reference, rows)
            logprobs, values = self._statistics(self.model, rows)
            log_ratios = ((logprobs - reference) * self.batch.mask[rows]).sum(1)
            residual = values + log_ratios - self.rewards[rows] / BETA
            (residual.square().sum() / len(self.rewards)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Trl:
    """GRPOTrainer in its own training loop: what is timed lies between its callbacks `on_step_begin` and `on_step_end`.
    `rollout_func` hands it the recorded trajectories."""

    def __init__(self, precision: str, *, gradient_checkpointing: bool) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in recorded():
            by_prompt.setdefault(str(row["messages"]), []).append(row)

        def rollout(prompts: list[Any], _trainer: GRPOTrainer) -> dict[str, Any]:
            left = {prompt: iter(rows) for prompt, rows in by_prompt.items()}
            taken = [next(left[str(prompt)]) for prompt in prompts]
            columns = {key: [row[key] for row in taken] for key in ("prompt_ids", "response_ids", "reward")}
            return {"completion_ids": columns.pop("response_ids"), "logprobs": None, **columns}

        def rewards(reward: list[float], **_: Any) -> list[float]:
            return reward

        self.clock = StepClock()
        self.trainer = GRPOTrainer(
            model=MODEL,
            args=GRPOConfig(
                output_dir=f"{tempfile.gettempdir()}/unused",
                model_init_kwargs={"dtype": "float32"},
                use_cpu=True,
                bf16=precision == "bfloat16",
                gradient_checkpointing=gradient_checkpointing,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=len(recorded()) // MICRO_BATCH,
                num_generations=len(recorded()) // len(by_prompt),
                max_completion_length=max(len(row["response_ids"]) for row in recorded()),
                temperature=TEMPERATURE,
                beta=BETA,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                max_grad_norm=MAX_GRAD_NORM,
                max_steps=ROUNDS + 1,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            ),
            reward_funcs=rewards,
            rollout_func=rollout,
            train_dataset=Dataset.from_list([{"prompt": rows[0]["messages"]} for rows in by_prompt.values()]),
            callbacks=[self.clock],
        )

    @torch.no_grad()
    def logprobs(self) -> list[float]:
        """By the method that its loss calls."""
        batch = Padded()
        logprobs, *_ = self.trainer._get_per_token_logps_and_entropies(
            self.trainer.model, batch.ids, batch.attention, batch.targets.shape[1], batch_size=MICRO_BATCH
        )
        return logprobs[batch.mask.bool()].tolist()

    def steps(self) -> list[float]:
        self.trainer.train()
        return self.clock.seconds


class StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


WAYS: dict[str, Callable[[str], Tbrm | Eager | Trl]] = {
    "tbrm": Tbrm,
    "plain PyTorch, padded, all logits": Eager,
    "TRL 1.16 GRPOTrainer": partial(Trl, gradient_checkpointing=False),
    "TRL 1.16 GRPOTrainer, its default of gradient checkpointing": partial(Trl, gradient_checkpointing=True),
}


class Case:
    """The worker's side."""

    def __init__(self, way: str, precision: str) -> None:
        self.way = WAYS[way](precision)

    def logprobs(self) -> dict[str, Any]:
        return {"values": self.way.logprobs()}

    def steps(self) -> dict[str, Any]:
        _, *seconds = self.way.steps()  # the first warms up, and makes the optimiser's state
        found = {"seconds": seconds, "peak_mib": taken_mib(peak=True)}
        if isinstance(self.way, Trl):  # its loop is its own, and is over
            return found
        with Products() as products:
            self.way.step()
        if products.unknown:
            raise SystemExit(f"products that the floor does not count: {dict(products.unknown)}")
        return found | floor(products, self.way.parameters())._asdict()


if __name__ == "__main__":
    serve(Case)
