"""What a run came to, in the words of its page and of the terminal: accuracies, facts by their labels, and problems by what
became of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tbrm.reporting.metrics import WARNING
from tbrm.reporting.run_folder import Row, Run, SamplePair, number

T = TypeVar("T")

OUTCOMES = {
    (False, True): "fixed",
    (True, True): "stayed right",
    (False, False): "still wrong",
    (True, False): "broke",
    (True, None): "right before",
    (False, None): "wrong before",
}
"""What became of a prompt, by whether its response was correct before and after (None: not asked again yet)."""


class Accuracy(NamedTuple):
    """Of an evaluation, with its 95% confidence interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.1%}"

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{100 * self.low:.1f}–{100 * self.high:.1f}%"


def accuracies(run: Run) -> tuple[Accuracy | None, Accuracy | None]:
    """Before training and at the last evaluation, each None until known."""
    first = next((row for row in run.evals if row["step"] == 0), None)
    last = next((row for row in reversed(run.evals) if row["step"] > 0), None)
    return (
        _accuracy(first, number(run.result, "accuracy_before")),
        _accuracy(last, number(run.result, "accuracy_after")),
    )


def facts(run: Run) -> dict[str, str]:
    """What stands beside the accuracy, by its label: only what is known."""
    values = {
        "Model": run.setting("model.name") or run.result.get("model"),
        "Task": run.setting("task.family") or run.setting("task.name") or run.result.get("task"),
        "Objective": _objective(run),
        "Beta": run.setting("objective.beta"),
        "Correct": f"a reward of {correct_at:g} or more" if (correct_at := _correct_at(run)) else None,
        "Mean reward": mean_rewards(run),
        "Steps": _steps(run),
        "Seed": run.result.get("seed", run.setting("seed")),
        "Changed": "; ".join(f"{', '.join(row['changed'])} after step {row['step']}" for row in run.changes),
        "Training time": _training_time(run),
        "Throughput": _over_steps(run, "tokens_per_second", statistics.median, "{:,.0f} tokens/s"),
        "Tokens generated": _over_steps(run, "generated_tokens", sum, "{:,.0f}"),
        "Tokens trained on": _over_steps(run, "trained_tokens", sum, "{:,.0f}"),
        "Peak memory": _over_steps(run, "peak_memory_mib", max, "{:,.0f} MiB"),
        "Warnings": " ".join(f"{text}." for row in run.metrics for key, text in row.items() if key.startswith(WARNING)),
        "Ungraded": _over_steps(run, "ungraded", sum, "{:,.0f} responses"),
    }
    return {label: str(value) for label, value in values.items() if value not in (None, "")}


def group_by_outcome(pairs: list[SamplePair]) -> dict[str, list[SamplePair]]:
    """The prompts of each outcome that occurs, in the order of OUTCOMES."""
    groups: dict[str, list[SamplePair]] = {outcome: [] for outcome in OUTCOMES.values()}
    for before, after in pairs:
        groups[OUTCOMES[before["correct"], after["correct"] if after else None]].append((before, after))
    return {outcome: group for outcome, group in groups.items() if group}


def choose(groups: dict[str, list[T]], count: int) -> dict[str, list[T]]:
    """The first of each outcome: at least one, and about `count` in all, in proportion to how many there are."""
    shown = dict.fromkeys(groups, 1)
    while sum(shown.values()) < min(count, sum(map(len, groups.values()))):
        # One more for the outcome that is shown least for its size; it has more than are shown, so long as any has.
        shown[max(groups, key=lambda outcome: len(groups[outcome]) / shown[outcome])] += 1
    return {outcome: group[: shown[outcome]] for outcome, group in groups.items()}


def with_interval(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not evaluated"
    return f"{accuracy} ({accuracy.interval})" if accuracy.interval else str(accuracy)


def _accuracy(row: Row | None, fallback: float | None) -> Accuracy | None:
    if row is not None:
        return Accuracy(row["accuracy"], number(row, "ci_low"), number(row, "ci_high"))
    return None if fallback is None else Accuracy(fallback)


def mean_rewards(run: Run) -> str | None:
    """Of the held-out prompts, before training and at the last evaluation."""
    rows = [row for row in run.evals if number(row, "reward_mean") is not None]
    if not rows:
        return None
    before = next((row for row in rows if row["step"] == 0), None)
    after = next((row for row in reversed(rows) if row["step"] > 0), None)
    return " -> ".join("not evaluated" if row is None else f"{row['reward_mean']:.4g}" for row in (before, after))


def n_heldout(run: Run) -> int | None:
    return run.evals[-1].get("n") if run.evals else run.result.get("n_heldout")


def _objective(run: Run) -> str | None:
    name, value = run.setting("objective.name"), run.setting("objective.value")
    said = f"{name} with value {value}" if name == "tbrm" and value not in (None, "network") else name
    return said or run.result.get("objective")


def phase_seconds(row: Row) -> float:
    """Of a step: the sum of its phases."""
    return sum(number(row, key) or 0.0 for key in row if key.startswith("seconds/"))


def _correct_at(run: Run) -> float | None:
    task = run.setting("task")
    return number(task, "correct_at") if isinstance(task, dict) else None


def _steps(run: Run) -> str:
    done = run.metrics[-1]["step"] if run.metrics else run.result.get("steps", 0)
    wanted = run.setting("trainer.steps")
    return f"{done}" if wanted in (None, done) else f"{done} of {wanted}"


def _training_time(run: Run) -> str | None:
    """As the trainer took it; of an unfinished run, the sum of its phases."""
    seconds = number(run.result, "seconds_training") or sum(map(phase_seconds, run.metrics))
    return duration(seconds) if round(seconds) else None


def duration(seconds: float) -> str:
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _over_steps(run: Run, key: str, summary: Callable[[list[float]], float], text: str) -> str | None:
    values = [value for row in run.metrics if (value := number(row, key)) is not None]
    return text.format(summary(values)) if values else None
