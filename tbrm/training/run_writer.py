"""What a run writes into its folder while it goes, and shows: its metrics, evaluations, samples, progress and result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tbrm.config.recipe import config_to_dict
from tbrm.config.schema import Config
from tbrm.parallel import ALONE, World
from tbrm.reporting.metrics import Metric, MetricsLog, read_jsonl
from tbrm.reporting.progress import Progress, Watch, alive
from tbrm.rollout.evaluate import Evaluation
from tbrm.training.alarms import Alarms
from tbrm.training.resume import write_recipe


class RunWriter(AbstractContextManager["RunWriter"]):
    """All processes call it, and the main one writes."""

    def __init__(self, config: Config, *, step: int, resumed: bool, world: World = ALONE) -> None:
        """`step` is that of the checkpoint that the run goes on from, if `resumed`."""
        self.run_dir = Path(config.run.dir)
        self._stack = ExitStack()
        self._world = world
        world.on_main(lambda: self._open(config, step, resumed))

    def _open(self, config: Config, step: int, resumed: bool) -> None:
        resolved = config_to_dict(config)
        self._correct_at = config.task.correct_at if config.task else 1.0
        self._log = self._stack.enter_context(
            MetricsLog(self.run_dir, config=resolved, wandb=config.logging.wandb, resume_step=step if resumed else None)
        )
        self._alarms = Alarms(config.objective, read_jsonl(self.run_dir / "metrics.jsonl"))
        self._progress = self._stack.enter_context(Progress(config.trainer.steps, done=step))
        if resumed:
            self._progress.say(f"goes on after step {step} of {config.trainer.steps}")
            for row in read_jsonl(self.run_dir / "eval.jsonl")[-1:]:
                self._progress.evaluated(row["accuracy"], row.get("reward_mean") or 0.0)
        write_recipe(self.run_dir, config, resumed_at=step if resumed else None)
        (self.run_dir / "result.json").unlink(missing_ok=True)  # of a run that goes on from its end

    def step(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self._world.on_main(lambda: self._step(step, metrics))

    def _step(self, step: int, metrics: Mapping[str, Metric]) -> None:
        warnings = self._alarms(step, metrics)
        self._log.log(step, {**metrics, **warnings})
        self._progress.advance(metrics)
        for warning in warnings.values():
            self._progress.say(warning)
        if metrics.get("trajectories") == 0:
            lost = {name: metrics.get(name, 0) for name in ("ungraded", "dropped")}
            self._progress.say(
                f"step {step}: nothing to train on: of its responses {lost['ungraded']} could not be graded, and "
                f"{lost['dropped']} were left out in all"
            )

    def evaluating(self, step: int, responses: int) -> AbstractContextManager[Watch]:
        """Shows that the evaluation after `step` updates goes on, and how far it is."""
        return alive(f"evaluation after step {step}", responses, shown=self._world.is_main)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """The figures, and all responses, of the evaluation after `step` updates."""
        self._world.on_main(lambda: self._evaluation(step, result))

    def _evaluation(self, step: int, result: Evaluation) -> None:
        self._log.log_eval(step, result.summary())
        path = self.run_dir / "samples" / f"step-{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in result.samples))
        self._progress.evaluated(result.accuracy, result.reward_mean)
        interval = f"{result.ci_low:.1%} to {result.ci_high:.1%}"
        ungraded = f"; {result.ungraded} responses could not be graded, and count as wrong" if result.ungraded else ""
        self._progress.say(
            f"step {step}: held-out accuracy {result.accuracy:.1%} (95% interval {interval}; correct: a reward of "
            f"{self._correct_at:g} or more), mean reward {result.reward_mean:.4g}{ungraded}"
        )

    def result(self, result: Mapping[str, Any]) -> None:
        text = json.dumps(result, indent=2) + "\n"
        self._world.on_main(lambda: (self.run_dir / "result.json").write_text(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
