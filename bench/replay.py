"""What replay saves, and what stale rollouts save and cost, on the demo's task: real runs, a table and plots from their own
metrics.

    python -m bench.replay RUNS OUT [--only replay] [--seeds 0 1 2] [--recipe R] [key.sub=value ...]

RUNS holds a folder for each run; finished ones are not run again, and one that was stopped goes on from its last
checkpoint. Checkpoints of finished runs are deleted. Runs of the staleness experiment have one thread for training and one
for rollouts, as if each had a device of its own: those without staleness use one at a time. The overrides are for smaller
settings:

    python -m bench.replay /tmp/runs /tmp/out --seeds 0 --recipe recipes/tiny.yaml trainer.steps=8
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tbrm.metrics import read_jsonl

OBJECTIVES = {
    # The recipe's own: one response to each problem.
    "tbrm": ("objective.name=tbrm", "rollout.samples=1"),
    "reval": ("objective.name=reval", "objective.beta=0.05", "objective.centre_rewards=true", "rollout.samples=4"),
    "reinforce": ("objective.name=reinforce", "objective.beta=0.01", "rollout.samples=4"),
}
STALENESS = (0, 2)
# R/beta of wrong and right answers: the recipe's 55 and 105 become 55 and 155. With replay and 105, old wrong answers are
# pushed down until right ones suffer (bench/NOTES.md); without replay both are shown.
HALF_BETA = ("objective.beta=0.01", "objective.reward_offset=0.55")
UPDATES = 2
# Half the recipe's learning rate, since each response is trained on twice.
REPLAY = (f"rollout.updates={UPDATES}", "replay.capacity=1280", "optim.learning_rate=2e-5")
ONE_THREAD_EACH = {"OMP_NUM_THREADS": "1"}
COSTS = {"replay": ("tokens",), "staleness": ("tokens", "seconds")}


@dataclass(frozen=True)
class Variant:
    """One curve: the mean over the seeds of runs with these overrides."""

    experiment: str
    panel: str
    name: str
    overrides: tuple[str, ...]


def variants(prompts: int, rollouts: int) -> list[Variant]:
    """`prompts` problems a rollout; all updates are of the same size."""
    once = (f"trainer.steps={rollouts}", "evaluation.every=1")
    twice = (f"trainer.steps={UPDATES * rollouts}", f"evaluation.every={UPDATES}", *REPLAY)
    twice += (f"replay.samples_per_step={prompts - prompts // UPDATES}",)
    found = [
        Variant("replay", "tbrm", "beta 0.02", once),
        Variant("replay", "tbrm", "beta 0.01", (*once, *HALF_BETA)),
        Variant("replay", "tbrm", "beta 0.01 and replay", (*twice, *HALF_BETA)),
    ]
    for objective, settings in OBJECTIVES.items():
        problems = prompts if objective == "tbrm" else prompts // 4
        for steps in STALENESS:
            overrides = (*settings, f"rollout.prompts={problems}", f"rollout.max_staleness={steps}")
            overrides += (f"trainer.steps={rollouts}", "evaluation.every=2")
            found.append(Variant("staleness", objective, f"{steps} steps old", overrides))
    return found


@dataclass(frozen=True)
class Curve:
    """One run: where it was evaluated."""

    steps: list[int]
    tokens: list[float]
    """Generated in training so far."""
    accuracy: list[float]
    seconds: list[float]
    """Of training so far, evaluations and checkpoints left out, but not what rollouts under way made them wait."""

    def first_at(self, target: float) -> int | None:
        """The first evaluation that reached it."""
        return next((i for i, accuracy in enumerate(self.accuracy) if accuracy >= target), None)


def train(folder: Path, recipe: str, overrides: list[str], environment: dict[str, str]) -> None:
    if (folder / "result.json").exists():
        return
    command = [sys.executable, "-m", "tbrm", "train", recipe, "--resume", f"run.dir={folder}", *overrides]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, **environment})
    shutil.rmtree(folder / "checkpoints")


def read_curve(folder: Path) -> Curve:
    rows, evals = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "eval.jsonl")
    generated = [0, *accumulate(row.get("generated_tokens", 0) for row in rows)]
    steps = [row["step"] for row in evals]
    # Phases of a step follow each other; those of rollouts beside it are not among them.
    phases = sorted({key for row in rows for key in row if key.startswith("seconds/")} - {"seconds/checkpoint"})
    seconds = [0.0, *accumulate(sum(row.get(phase, 0.0) for phase in phases) for row in rows)]
    return Curve(steps, [generated[s] for s in steps], [row["accuracy"] for row in evals], [seconds[s] for s in steps])


def mean_of(curves: list[Curve]) -> Curve:
    """Evaluations stand at the same steps in all seeds."""
    tokens, accuracy, seconds = (
        [fmean(values) for values in zip(*(getattr(curve, name) for curve in curves), strict=True)]
        for name in ("tokens", "accuracy", "seconds")
    )
    return Curve(curves[0].steps, tokens, accuracy, seconds)


def table(curves: dict[Variant, list[Curve]], target: float, costs: tuple[str, ...]) -> str:
    """Of each seed, and of the mean of their curves: how it ended, and the costs at which the target was first reached."""
    heads = ["runs", "accuracy at the end", "mean"]
    for cost in costs:
        heads += [cost, f"to {target:.0%}", "mean"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def reached(name: str, curve: Curve) -> str:
        at = curve.first_at(target)
        return "never" if at is None else f"{getattr(curve, name)[at]:,.0f}"

    for variant, found in curves.items():
        mean = mean_of(found)
        cells = [f"{variant.panel}, {variant.name}"]
        cells += [", ".join(f"{curve.accuracy[-1]:.1%}" for curve in found), f"{mean.accuracy[-1]:.1%}"]
        for name in costs:
            cells.append(f"{getattr(mean, name)[-1]:,.0f}")
            cells += [", ".join(reached(name, curve) for curve in found), reached(name, mean)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(curves: dict[Variant, list[Curve]], target: float, path: Path) -> None:
    """A panel per objective: accuracy against tokens generated; thin lines are seeds, thick ones their mean."""
    panels = list(dict.fromkeys(variant.panel for variant in curves))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for panel, ax in zip(panels, axes[0], strict=True):
        shown = [(variant, found) for variant, found in curves.items() if variant.panel == panel]
        for number, (variant, found) in enumerate(shown):
            for curve in found:
                ax.plot(curve.tokens, curve.accuracy, color=f"C{number}", lw=0.6, alpha=0.5)
            mean = mean_of(found)
            ax.plot(mean.tokens, mean.accuracy, color=f"C{number}", lw=2, marker="o", ms=3, label=variant.name)
        ax.axhline(target, color="black", lw=0.8, ls=":")
        ax.set(title=panel, xlabel="tokens generated", ylabel="held-out accuracy")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--only", choices=("replay", "staleness"), help="one of the two experiments")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--prompts", type=int, default=128, help="responses that each update is made of")
    parser.add_argument("--rollouts", type=int, default=12, help="of each run")
    parser.add_argument("--target", type=float, default=0.5)
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for experiment in [args.only] if args.only else ["replay", "staleness"]:
        curves: dict[Variant, list[Curve]] = {}
        for variant in (v for v in variants(args.prompts, args.rollouts) if v.experiment == experiment):
            for seed in args.seeds:
                folder = args.runs / f"{experiment}-{variant.panel}-{variant.name} seed {seed}".replace(" ", "-")
                common = (f"seed={seed}", f"rollout.prompts={args.prompts}", "checkpoint.every=6")
                environment = ONE_THREAD_EACH if experiment == "staleness" else {}
                train(folder, args.recipe, [*common, *variant.overrides, *args.overrides], environment)
                curves.setdefault(variant, []).append(read_curve(folder))
        text = table(curves, args.target, COSTS[experiment])
        (args.out / f"{experiment}.md").write_text(text)
        plot(curves, args.target, args.out / f"{experiment}.png")
        print(text)


if __name__ == "__main__":
    main()
