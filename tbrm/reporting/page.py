"""The report of a run: one HTML page that needs nothing from outside itself, its plots as PNG too, and a short summary.

A run that is still going, or was killed, has a report too: it shows what there is and says what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from tbrm.reporting.plots import draw_all, save_png, to_svg
from tbrm.reporting.run_folder import Row, Run, SamplePair, read_run

SHOWN_SAMPLES = 12
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


def write_report(run_dir: Path) -> Path:
    """Writes report.html and plots/*.png into the run's folder, and returns the page's path.

    Raises ValueError if there is nothing of a run in `run_dir`.
    """
    run = read_run(run_dir)
    figures = draw_all(run.metrics, run.evals)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure, plots / f"{name}.png")

    before, after = accuracies(run)
    by_outcome = group_by_outcome(run.samples)
    page = _template().render(
        name=run_dir.resolve().name,
        gaps=run.gaps,
        before=before,
        after=after,
        n_heldout=_n_heldout(run),
        finished=bool(run.result),
        facts=facts(run),
        figures={name: Markup(to_svg(figure)) for name, figure in figures.items()},
        outcomes={outcome: len(pairs) for outcome, pairs in by_outcome.items()},
        shown=choose(by_outcome, SHOWN_SAMPLES),
        steps=run.sample_steps,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )
    path = run_dir / "report.html"
    # A response may hold half of a UTF-16 pair, which no file can: it becomes a question mark.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def summary_lines(run_dir: Path) -> list[str]:
    """Five lines of plain text: what was reached, how, on what, at what cost, and where the report is."""
    run = read_run(run_dir)
    before, after = (_with_interval(accuracy) for accuracy in accuracies(run))
    known = facts(run)

    def line(*labels: str) -> str:
        return ", ".join(f"{label.lower()} {known[label]}" for label in labels if label in known) or "not recorded"

    return [
        f"accuracy  {before} -> {after} on {_n_heldout(run) or 'the'} held-out prompts"
        + (f", mean reward {known['Mean reward']}" if "Mean reward" in known else ""),
        f"training  {line('Objective', 'Beta', 'Steps', 'Seed')}",
        f"setting   {line('Model', 'Task')}",
        f"cost      {line('Training time', 'Throughput', 'Peak memory')}",
        f"report    {run_dir / 'report.html'}",
    ]


def accuracies(run: Run) -> tuple[Accuracy | None, Accuracy | None]:
    """Before training and at the last evaluation, each None until known."""
    first = next((row for row in run.evals if row["step"] == 0), None)
    last = next((row for row in reversed(run.evals) if row["step"] > 0), None)
    return _accuracy(first, run.result.get("accuracy_before")), _accuracy(last, run.result.get("accuracy_after"))


def facts(run: Run) -> dict[str, str]:
    """What stands beside the accuracy, by its label: only what is known."""
    values = {
        "Model": run.setting("model.name") or run.result.get("model"),
        "Task": run.setting("task.family") or run.setting("task.name") or run.result.get("task"),
        "Objective": run.setting("objective.name") or run.result.get("objective"),
        "Beta": run.setting("objective.beta"),
        "Correct": f"a reward of {run.setting('task.correct_at'):g} or more"
        if run.setting("task.correct_at")
        else None,
        "Mean reward": _mean_rewards(run),
        "Steps": _steps(run),
        "Seed": run.result.get("seed", run.setting("seed")),
        "Changed": "; ".join(f"{', '.join(row['changed'])} after step {row['step']}" for row in run.changes),
        "Training time": _training_time(run),
        "Throughput": _over_steps(run, "tokens_per_second", statistics.median, "{:,.0f} tokens/s"),
        "Peak memory": _over_steps(run, "peak_memory_mib", max, "{:,.0f} MiB"),
        "Ungraded": _over_steps(run, "ungraded", sum, "{:,.0f} responses"),
    }
    return {label: str(value) for label, value in values.items() if value not in (None, "")}


def group_by_outcome(pairs: list[SamplePair]) -> dict[str, list[SamplePair]]:
    """The prompts of each outcome that occurs, in the order of OUTCOMES."""
    groups: dict[str, list[SamplePair]] = {outcome: [] for outcome in OUTCOMES.values()}
    for before, after in pairs:
        groups[OUTCOMES[before["correct"], after["correct"] if after else None]].append((before, after))
    return {outcome: group for outcome, group in groups.items() if group}


def choose(groups: dict[str, list[SamplePair]], count: int) -> dict[str, list[SamplePair]]:
    """The first pairs of each outcome: at least one, and about `count` in all, in proportion to how many there are."""
    shown = dict.fromkeys(groups, 1)
    while sum(shown.values()) < min(count, sum(map(len, groups.values()))):
        # One more for the outcome that is shown least for its size; it has more than are shown, so long as any has.
        shown[max(groups, key=lambda outcome: len(groups[outcome]) / shown[outcome])] += 1
    return {outcome: group[: shown[outcome]] for outcome, group in groups.items()}


def _template() -> Template:
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # Prompts and responses are whatever a model or a data set came up with: all text is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _accuracy(row: Row | None, fallback: float | None) -> Accuracy | None:
    if row is not None:
        return Accuracy(row["accuracy"], row.get("ci_low"), row.get("ci_high"))
    return None if fallback is None else Accuracy(fallback)


def _with_interval(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not evaluated"
    return f"{accuracy} ({accuracy.interval})" if accuracy.interval else str(accuracy)


def _mean_rewards(run: Run) -> str | None:
    """Of the held-out prompts, before training and at the last evaluation."""
    rows = [row for row in run.evals if row.get("reward_mean") is not None]
    if not rows:
        return None
    before = next((row for row in rows if row["step"] == 0), None)
    after = next((row for row in reversed(rows) if row["step"] > 0), None)
    return " -> ".join("not evaluated" if row is None else f"{row['reward_mean']:.4g}" for row in (before, after))


def _n_heldout(run: Run) -> int | None:
    return run.evals[-1].get("n") if run.evals else run.result.get("n_heldout")


def _steps(run: Run) -> str:
    done = run.metrics[-1]["step"] if run.metrics else run.result.get("steps", 0)
    wanted = run.setting("trainer.steps")
    return f"{done}" if wanted in (None, done) else f"{done} of {wanted}"


def _training_time(run: Run) -> str | None:
    """As the trainer took it; of an unfinished run, the sum of its phases."""
    phases = (value for row in run.metrics for key, value in row.items() if key.startswith("seconds/"))
    seconds = round(run.result.get("seconds_training") or sum(phases))
    if seconds < 60:
        return f"{seconds} s" if seconds else None
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _over_steps(run: Run, key: str, summary: Callable[[list[float]], float], text: str) -> str | None:
    values = [row[key] for row in run.metrics if row.get(key) is not None]
    return text.format(summary(values)) if values else None
