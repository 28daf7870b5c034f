"""The training loop: Trajectory Bellman Residual Minimization (arXiv 2505.15311), step by step.

repeat:
    let the policy answer problems, and grade the answers             (or take recorded trajectories)
    score them under the frozen reference                             sum log pi_ref, V_ref(s_1)
    residual = V(s_1) + sum log pi - sum log pi_ref - R / beta        (another objective: its own)
    take one gradient step on the mean of residual^2
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tbrm.chat import encode_problems
from tbrm.checkpoint import Checkpoints, TrainerState, load_optimizer, load_replay, load_state
from tbrm.config import Config, ConfigError, OptimConfig, config_to_dict
from tbrm.data import ScoredBatch, Trajectory, pack, split_by_tokens
from tbrm.evaluate import evaluate
from tbrm.metrics import MetricsLog, Phases, Progress, peak_memory_mib
from tbrm.model import load_policy
from tbrm.objectives.base import TrajectoryLoss
from tbrm.offline import FileSource, read_trajectories, without_prompts
from tbrm.reference_model import ReferenceModel
from tbrm.replay import ReplayBuffer
from tbrm.rollout import EmbeddedEngine, Sampling
from tbrm.rollout.base import derive_seed
from tbrm.rollout.collect import RolloutSource
from tbrm.step_metrics import StepMetrics, trajectory_metrics
from tbrm.tasks import ProblemStream
from tbrm_kernels import TokenStats

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "eval.jsonl",
    "result.json",
    "report.html",
    "wandb_id.txt",
    "samples",
    "plots",
    "tensorboard",
    "checkpoints",
)
"""What a run leaves in its folder."""


class Trainer:
    """One run of a config. `resume` continues from its latest checkpoint, if it has one."""

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.config = config
        self.run_dir = Path(config.run.dir)
        self.checkpoints = Checkpoints(self.run_dir)
        checkpoint = self.checkpoints.latest() if resume else None
        self.state = load_state(checkpoint) if checkpoint else TrainerState()
        self.resumed_at = self.state.step if checkpoint else None

        # Before the model is loaded, which may take long: a task too small for its evaluation is found here.
        self.heldout = config.task.heldout(config.evaluation.prompts) if config.task else []
        self.policy, self.tokenizer = load_policy(config)
        self.device = self.policy.device
        self.reference = ReferenceModel(self.policy)
        self.engine = EmbeddedEngine(self.policy, self.tokenizer, config.rollout.batch_size)
        self.source = self._source()
        self.replay = ReplayBuffer(config.replay.capacity)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=config.optim.learning_rate,
            betas=config.optim.betas,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        if checkpoint:
            self._load(checkpoint)
        self.phases = Phases(self.device)

    def train(self) -> dict[str, Any]:
        """Runs to the last step; returns what it also writes to result.json."""
        config, state = self.config, self.state
        resolved = config_to_dict(config)
        with (
            MetricsLog(self.run_dir, config=resolved, wandb=config.logging.wandb, resume_step=self.resumed_at) as log,
            Progress(config.trainer.steps, done=state.step) as progress,
        ):
            (self.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
            if state.step == 0 and self.heldout:
                state.accuracy_before = state.best_accuracy = self._evaluate(log, progress)
            while state.step < config.trainer.steps:
                started = time.perf_counter()
                metrics = self.train_step()
                state.seconds_training += time.perf_counter() - started
                log.log(state.step, metrics)
                progress.advance(metrics)

                finished = state.step == config.trainer.steps
                best = False
                if self.heldout and (finished or _due(state.step, config.evaluation.every)):
                    state.accuracy_after = self._evaluate(log, progress)
                    best = state.best_accuracy is None or state.accuracy_after > state.best_accuracy
                    state.best_accuracy = state.accuracy_after if best else state.best_accuracy
                if finished or best or _due(state.step, config.checkpoint.every):
                    self._save(best=best)
        return self._write_result()

    def train_step(self) -> dict[str, float]:
        """One optimiser step on fresh trajectories and, if so configured, replayed ones; returns its metrics."""
        config, objective = self.config, self.config.objective
        self.state.step += 1
        collected = self.source.collect(self.state.step, self.phases)
        replayed = self.replay.sample(
            config.replay.samples_per_step, derive_seed("replay", config.seed, self.state.step)
        )
        self.replay.add(collected.trajectories)
        trajectories = [t for t in collected.trajectories + replayed if t.actions]
        rewards = objective.shape_rewards(
            torch.tensor([t.reward for t in trajectories]), torch.tensor([t.group for t in trajectories])
        )

        measured = StepMetrics(self.device)
        for members in self._micro_batches(trajectories):
            part = [trajectories[i] for i in members]
            batch = pack(part, rewards[members]).to(self.device)
            with self.phases("reference"):
                batch = self.reference.fill_in(batch, part)
            with self.phases("update"):
                self._add_gradients(batch, len(trajectories), measured)
        with self.phases("update"):
            learning_rate = learning_rate_at(self.state.step, config.optim, config.trainer.steps)
            grad_norm = self._update(learning_rate)
        if _due(self.state.step, objective.reset_reference_every):
            self.reference.reset(self.policy)

        seconds = self.phases.take()
        return {
            **measured.means(),
            **trajectory_metrics(trajectories, self.state.step),
            **collected.metrics,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **seconds,
            "tokens_per_second": measured.tokens / sum(seconds.values()),
            "peak_memory_mib": peak_memory_mib(self.device),
        }

    def _micro_batches(self, trajectories: list[Trajectory]) -> Iterator[list[int]]:
        """Indices of the trajectories of each forward and backward. Those that the reference has scored are kept apart
        from those that it has not, so that none is scored twice."""
        scored = [self.reference.has_scored(t) for t in trajectories]
        for wanted in (False, True):
            indices = [i for i, has in enumerate(scored) if has is wanted]
            split = split_by_tokens([trajectories[i] for i in indices], self.config.trainer.batch_tokens)
            yield from ([indices[i] for i in members] for members in split)

    def _add_gradients(self, batch: ScoredBatch, n_trajectories: int, measured: StepMetrics) -> None:
        """Adds the batch's part of the gradient of the mean loss over all of the step's trajectories."""
        chunks: list[TrajectoryLoss] = []

        def mean_loss(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
            chunks.append(self.config.objective(stats, batch.scores_of(first, cu_seqlens)))
            return chunks[-1].loss.sum() / n_trajectories

        loss, stats = self.policy.trajectory_loss(batch, mean_loss)
        loss.backward()
        measured.add(stats, TrajectoryLoss(*map(torch.cat, zip(*chunks, strict=True))), batch)

    def _update(self, learning_rate: float) -> float:
        """Clips, steps and clears the gradients; returns their norm."""
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"step {self.state.step}: the gradient norm is {grad_norm}; lower optim.learning_rate or raise objective.beta, "
                "and continue from the last checkpoint with --resume"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _source(self) -> RolloutSource | FileSource:
        config = self.config
        if config.data.trajectories is None:
            assert config.task is not None  # the config's validation saw to it
            stream = ProblemStream(config.task, config.seed, self.heldout)
            return RolloutSource(stream, self.engine, self.tokenizer, config.rollout, config.seed)
        recorded = read_trajectories(config.data.trajectories, self.tokenizer, self.engine.eos_ids)
        usable = without_prompts(recorded, encode_problems(self.tokenizer, self.heldout))
        if not usable:
            raise ConfigError(
                f"data.trajectories: every prompt of {config.data.trajectories} is held out for evaluation"
            )
        if len(usable) < len(recorded):
            left_out = len(recorded) - len(usable)
            print(
                f"data.trajectories: {left_out} of {len(recorded)} left out: their prompts are held out",
                file=sys.stderr,
            )
        return FileSource(usable, config.rollout, config.seed)

    def _evaluate(self, log: MetricsLog, progress: Progress) -> float:
        """Held-out accuracy now; logs it and keeps the responses."""
        settings, step = self.config.evaluation, self.state.step
        assert self.config.task is not None
        sampling = Sampling(
            self.config.rollout.max_new_tokens, settings.temperature, derive_seed("evaluation", self.config.seed, step)
        )
        result = evaluate(
            self.engine, self.tokenizer, self.config.task, self.heldout, k=settings.samples, sampling=sampling
        )
        log.log_eval(step, result.summary())
        path = self.run_dir / "samples" / f"step-{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in result.samples))
        progress.say(
            f"step {step}: held-out accuracy {result.accuracy:.1%} (95% interval {result.ci_low:.1%} to {result.ci_high:.1%})"
        )
        return result.accuracy

    def _save(self, *, best: bool) -> None:
        self.state.position = self.source.position
        self.state.reference_version = self.reference.version
        self.checkpoints.save(
            self.state,
            self.policy,
            self.tokenizer,
            self.optimizer,
            self.reference,
            self.replay.trajectories,
            best=best,
        )

    def _load(self, checkpoint: Path) -> None:
        """Takes weights, reference, optimiser, buffer and position from a checkpoint of this run."""
        # The reference's version 0 is the model as it was first loaded, which is what self.reference holds by now.
        if self.state.reference_version > 0:
            self.reference.load(checkpoint / "trainer" / "reference", self.state.reference_version)
        self.policy.load(checkpoint)
        load_optimizer(checkpoint, self.policy, self.optimizer)
        self.replay.add(load_replay(checkpoint))
        self.source.position = self.state.position

    def _write_result(self) -> dict[str, Any]:
        config, state = self.config, self.state
        result = {
            "accuracy_before": state.accuracy_before,
            "accuracy_after": state.accuracy_after,
            "n_heldout": len(self.heldout),
            "seconds_training": round(state.seconds_training, 1),
            "steps": state.step,
            "seed": config.seed,
            "objective": config.objective.name,
            "model": config.model.name,
            "task": config.task.name if config.task else None,
        }
        (self.run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        return result


def prepare_run_dir(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Sees to it that no earlier run is lost unasked. Raises ConfigError."""
    if overwrite:
        # Only what a run writes: run.dir may be a folder that holds other things too.
        for name in RUN_FILES:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif not resume and (run_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"run.dir: {str(run_dir)!r} holds a run already; give --resume to go on with it, --overwrite to delete it, or "
            "another run.dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: {str(run_dir)!r} cannot be made: {error.strerror}") from error


def learning_rate_at(step: int, optim: OptimConfig, steps: int) -> float:
    """The learning rate of update `step`, counted from 1."""
    if step <= optim.warmup_steps:
        return optim.learning_rate * step / optim.warmup_steps
    done = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.learning_rate * factor


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
