"""The training loop: Trajectory Bellman Residual Minimization (arXiv 2505.15311), step by step.

repeat:
    let the policy answer problems, and grade the answers             (or take recorded trajectories)
    score them under the frozen reference                             sum log pi_ref, V_ref(s_1)
    residual = V(s_1) + sum log pi - sum log pi_ref - R / beta        (another objective: its own)
    take one gradient step on the mean of residual^2

Under torchrun every process runs this same loop on the same trajectories: what is divided among them is the answering, the
grading and the micro-batches of a step, and the weights (see parallel.py).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tbrm.chat import make_chat
from tbrm.config.foreseen import notes
from tbrm.config.launched import check_launched
from tbrm.config.schema import Config
from tbrm.experience.offline import RowReader
from tbrm.experience.recorded import RecordedFiles
from tbrm.experience.replay import ReplayBuffer
from tbrm.experience.sources import make_supply, trajectory_source
from tbrm.objectives import TrajectoryLoss
from tbrm.objectives.contract import Contract
from tbrm.parallel import ALONE, World
from tbrm.policy.load import load_policy, set_day
from tbrm.policy.reference import ReferenceModel
from tbrm.policy.saved_model import SavedModel
from tbrm.policy.sharding import accumulate
from tbrm.policy.weights import whole
from tbrm.reporting.metrics import Phases, peak_memory_mib
from tbrm.reporting.summary import conclude
from tbrm.rollout import Sampling, make_engine
from tbrm.rollout.evaluate import evaluate
from tbrm.rollout.interface import derive_seed
from tbrm.storage.kept import Kept
from tbrm.tasks import Progress
from tbrm.training.adaptation import Adaptation
from tbrm.training.agreement import require_agreement
from tbrm.training.callbacks import Callback, Callbacks
from tbrm.training.checkpoint import TRAINER, TrainerState
from tbrm.training.checkpoints import Checkpoints
from tbrm.training.critic_step import make_critic, trained_parts
from tbrm.training.given import check_objects
from tbrm.training.interruption import Interrupted, Interruption
from tbrm.training.micro_batches import MicroBatches
from tbrm.training.optimizer import Optimisers
from tbrm.training.own_logprobs import score_rollout
from tbrm.training.resolved import is_same_reference, resolve, resolve_given
from tbrm.training.result import result_of
from tbrm.training.run_dir import refuse_another_run
from tbrm.training.run_writer import RunWriter
from tbrm.training.schedule import learning_rate_at
from tbrm.training.skipped import give_up
from tbrm.training.step_metrics import StepMetrics, trajectory_metrics
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats


class Trainer:
    """One run of a config. `resume` continues from its latest checkpoint, if it has one; `anyway`: though the model, the
    data or the machine's precision are not what they were. `model` and its tokenizer: where the config's is `given`."""

    def __init__(
        self,
        config: Config,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        anyway: bool = False,
        world: World = ALONE,
    ) -> None:
        check_launched(config, processes=world.size, sharded=world.mesh is not None)
        check_objects(config, model, tokenizer, callbacks)
        self.callbacks = Callbacks(callbacks)
        self.config = config
        self.resume = resume
        self.world = world
        self.run_dir = Path(config.run.dir)
        self.checkpoints = Checkpoints(self.run_dir, config.checkpoint, world)
        checkpoint = self.checkpoints.latest() if resume else None
        self.state = checkpoint.state if checkpoint else TrainerState()
        self.resumed = checkpoint is not None

        # Before the model is loaded, which may take long: a task too small for its evaluation is found here.
        self.heldout = config.task.heldout(config.evaluation.prompts) if config.task else []
        given = {} if model is None else resolve_given(model)
        self.policy, self.tokenizer = load_policy(config, world, model, tokenizer)
        self.state.day = self.state.day or world.gather(date.today().isoformat())[0]  # it may be midnight
        resolved = world.on_main(lambda: resolve(config)) | given
        known = is_same_reference(config, self.state.resolved, resolved, anyway=anyway)
        self.state.resolved = resolved
        set_day(self.tokenizer, date.fromisoformat(self.state.day))
        # What a hub's branch stands for is known now, and may be another commit in another machine's cache.
        require_agreement(world, lambda: {"model.revision": str(getattr(self.policy.lm.config, "_commit_hash", None))})
        self.device = self.policy.device
        self.reference = ReferenceModel(self.policy)
        self.objective = Contract(config.objective)
        self.adaptation = Adaptation(self.objective, self.reference, self.state.auto)
        beside = world.apart()  # rollouts may be made while training uses the other
        self.chat = make_chat(config, self.policy.lm, self.tokenizer)
        self._leave_out_long_problems()
        withheld = config.task.withheld(config.evaluation.prompts) if config.task else []
        self.engine = make_engine(config.rollout, self.policy, self.chat, beside, run_dir=self.run_dir)
        source = trajectory_source(config, self.engine, self.chat, withheld, beside)
        self.replay = ReplayBuffer(config.replay, self.run_dir / "replay", config.seed, world)
        rows = RowReader(self.chat, config.task, withheld if config.replay.files else [], config.rollout.ungraded)
        self.recorded = RecordedFiles(config.replay.files, rows)
        self.critic = make_critic(config, self.policy, world)
        self.optimisers = Optimisers(trained_parts(config, self.policy, self.critic), config.optim)
        self.supply = make_supply(source, config, self.optimisers["policy"])
        if checkpoint:
            checkpoint.restore(self._kept)
            # Scores of another one are not used.
            self.reference.version = self.state.reference_version + (not known)
            source.position = self.state.position
            self.recorded.position = self.state.recorded
        self.phases = Phases(self.device)
        self.interruption = Interruption(says=world.is_main)

    def _leave_out_long_problems(self) -> None:
        """Of those held out; and says so, with what else a user should know of the problems."""
        told = notes(self.config)
        short, _ = self.chat.encode_problems(self.heldout)
        if left_out := len(self.heldout) - len(short):
            told.append(
                f"evaluation: {left_out} of {len(self.heldout)} problems left out, by rollout.max_prompt_tokens"
            )
        self.heldout = short
        for note in told if self.world.is_main else []:
            print(note, file=sys.stderr)

    def train(self) -> dict[str, Any]:
        """Runs to the last step; returns what it also writes to result.json. Raises Interrupted."""
        config, state = self.config, self.state
        if not self.resume:
            self.world.on_main(lambda: refuse_another_run(self.run_dir))
        with (
            RunWriter(config, step=state.step, resumed=self.resumed, world=self.world) as out,
            self.interruption,
            self.checkpoints,
            closing(self.engine),
            closing(self.replay),
            closing(self.supply),
        ):
            self.callbacks.start(self)
            if state.step == 0 and self.heldout:
                before = self._evaluate(out)
                state.accuracy_before, state.reward_before = state.best_accuracy, state.best_reward = before
            while state.step < config.trainer.steps:
                started = time.perf_counter()
                metrics = self.train_step()
                state.seconds_training += time.perf_counter() - started
                out.step(state.step, metrics)
                self.callbacks.step(state.step, metrics)

                finished = state.step == config.trainer.steps or any(self.world.gather(self.callbacks.stop()))
                best = False
                if self.heldout and (finished or _due(state.step, config.evaluation.every)):
                    state.accuracy_after, state.reward_after = after = self._evaluate(out)
                    best = state.best_accuracy is None or after > (state.best_accuracy, state.best_reward or 0.0)
                    if best:
                        state.best_accuracy, state.best_reward = after
                # Signals do not reach all processes in the same step, but all must leave after the same one.
                stop = 0 if finished else max(self.world.gather(self.interruption.signal))
                if finished or best or stop or _due(state.step, config.checkpoint.every):
                    self._save(best=best)
                if stop:
                    self.checkpoints.wait()
                    raise Interrupted(stop, f"stopped after step {state.step}, which is saved; go on with --resume")
                if finished:
                    break
            result = result_of(config, state, len(self.heldout))
            out.result(result)
        self.world.on_main(lambda: conclude(self.run_dir, page=config.logging.report))
        return result

    def train_step(self) -> dict[str, float]:
        """One optimiser step on fresh trajectories and, if so configured, replayed ones; returns its metrics."""
        config = self.config
        self.state.step += 1
        collected = self.supply.collect(self.state.step, self.phases)
        recorded = {}
        if config.replay.files:
            recorded = self.world.on_main(lambda: self.recorded.feed(self.replay, self.state.step, self.phases))
        replayed = self.replay.sample(self.state.step, self.phases)
        trajectories = [t for t in collected.trajectories + replayed if t.acts]

        measured = StepMetrics(self.device)
        micro_batches = MicroBatches(
            trajectories, self.reference, config.trainer.batch_tokens, self.world, config.rollout.weight_cap
        )
        self._score_arrived(collected.trajectories + self.supply.rest_of_rollout(), micro_batches)
        with self.phases("reference"):
            micro_batches.score()
            if config.replay.enabled or config.data.trajectories or self.adaptation.reads_scores:
                micro_batches.share_scores()  # they may come again, to another process
        with self.phases("update"):
            columns = micro_batches.columns(self.objective, self.policy, self.adaptation.before(trajectories))
            for number, members in enumerate(micro_batches.members, start=1):
                reduce = number == len(micro_batches.members) or config.parallel.accumulate_sharded
                batch = micro_batches.batch(members, columns)
                self._add_gradients(batch, len(trajectories), measured, reduce)
        with self.phases("optimizer"):
            learning_rate = learning_rate_at(self.state.step, config.optim, config.trainer.steps)
            means = self._clip_gradients(measured)
            skipped = not all(math.isfinite(means[name]) for name in means if name.endswith(("loss", "grad_norm")))
            self._update(learning_rate, skipped=skipped)
            of_each = measured.of_each(micro_batches.order, self.world)
            adapted = self.adaptation.after(self.state.step, trajectories, of_each)
        if config.replay.enabled:
            with self.phases("replay"):
                self.replay.update(self.state.step, trajectories, of_each.residual.tolist())
        if skipped and (in_a_row := self.state.skipped_in_a_row) >= config.trainer.max_skipped:
            give_up(self.run_dir, self.state.step, in_a_row, trajectories, means, self.world)
        if _due(self.state.step, config.objective.reset_reference_every):
            self.reference.reset(self.policy)

        seconds = self.phases.take()
        return {
            **means,
            **trajectory_metrics(trajectories, self.state.step),
            **micro_batches.metrics,
            **adapted,
            "fresh_share": 1 - len(replayed) / max(1, len(trajectories)),
            **collected.metrics,
            **recorded,
            **self.replay.metrics(),
            "learning_rate": learning_rate,
            "skipped": int(skipped),
            **seconds,
            "trained_tokens": sum(len(t.actions) for t in trajectories),
            "tokens_per_second": measured.tokens / (sum(seconds.values()) - seconds.get("seconds/checkpoint", 0.0)),
            "peak_memory_mib": max(self.world.gather(peak_memory_mib(self.device))),
        }

    def _score_arrived(self, arrived: list[Trajectory], micro_batches: MicroBatches) -> None:
        """Has policy and critic, where they are asked, say what they make of a rollout as it comes in."""
        if micro_batches.weight_cap is not None:
            with self.phases("update"):
                scored = score_rollout(self.policy, arrived, self.config.trainer.batch_tokens, self.world)
                micro_batches.metrics["old_scored"] = scored
        if self.critic:
            with self.phases("critic"):
                self.critic.score(arrived)
                micro_batches.of_actions = self.critic.of_actions(micro_batches.trajectories)

    def _add_gradients(self, batch: ScoredBatch, n_trajectories: int, measured: StepMetrics, reduce: bool) -> None:
        """Adds the batch's part of the gradient of the mean loss over all of the step's trajectories."""
        accumulate(self.policy, reduce=reduce)
        chunks: list[TrajectoryLoss] = []

        def mean_loss(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
            chunks.append(self.objective(stats, batch.scores_of(first, cu_seqlens)))
            return chunks[-1].loss.sum() / n_trajectories

        loss, stats = self.policy.trajectory_loss(batch, mean_loss)
        loss.backward()
        self.objective.check(stats, batch)
        if batch.columns:  # there is none in a step without trajectories
            measured.add_figures(self.objective.figures(stats, batch))
        if chunks:  # none: this process had nothing to add, and only kept the others company
            measured.add(stats, TrajectoryLoss(*map(torch.cat, zip(*chunks, strict=True))), batch)
        if self.critic and n_trajectories:
            self.critic.add_gradients(batch, reduce=reduce)

    def _clip_gradients(self, measured: StepMetrics) -> dict[str, float]:
        """Scales the gradients of each part down to the largest norm allowed; returns the step's means, with the norms."""
        if self.policy.vocabulary is not None:
            self.policy.vocabulary.sum_over_copies()
        if self.critic:
            self.critic.critic.sum_head()
        # Of no gradients, or of those on the CPU, it is there.
        norms = {part: whole(norm).to(self.device) for part, norm in self.optimisers.clip().items()}
        means = measured.means(norms["policy"], self.world)
        return means | (self.critic.metrics(norms) if self.critic else {})

    def _update(self, learning_rate: float, *, skipped: bool) -> None:
        """Takes the step, unless it is to be skipped, and clears the gradients."""
        if not skipped:
            self.optimisers.step(learning_rate)
        self.optimisers.zero_grad()
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0

    def _evaluate(self, out: RunWriter) -> tuple[float, float]:
        """Held-out accuracy and mean reward now; logs them and keeps the responses."""
        settings, step = self.config.evaluation, self.state.step
        assert self.config.task is not None
        self.supply.settle(self.phases)
        self.engine.update_weights(step)
        showing = out.evaluating(step, settings.samples * len(self.heldout))
        with self.interruption.finishing("the evaluation"), showing as watch:
            result = evaluate(
                self.engine,
                self.chat,
                self.config.task,
                self.heldout,
                k=settings.samples,
                sampling=Sampling(self.config.rollout.max_new_tokens, settings.temperature),
                seed=derive_seed(self.config.seed, step),
                world=self.world,
                progress=Progress(step, self.config.trainer.steps),
                watch=watch,
            )
        out.evaluation(step, result)
        self.callbacks.evaluation(step, result)
        return result.accuracy, result.reward_mean

    def _save(self, *, best: bool) -> None:
        """Its time is in the next step's line of metrics."""
        self.supply.settle(self.phases)
        self.state.position = self.supply.source.position
        self.state.recorded = self.recorded.position
        self.state.reference_version = self.reference.version
        with self.phases("checkpoint"):
            self.checkpoints.save(self.state, self._kept, best=best)

    @property
    def _kept(self) -> dict[str, Kept]:
        """What a checkpoint keeps beside the counters, by its folder there."""
        return {
            ".": SavedModel(self.policy, self.tokenizer),
            TRAINER: self.supply,
            f"{TRAINER}/optimizer": self.optimisers,
            f"{TRAINER}/reference": self.reference,
            f"{TRAINER}/replay": self.replay,
            **({f"{TRAINER}/critic": self.critic.critic} if self.critic else {}),
            f"{TRAINER}/value": self.adaptation,
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
