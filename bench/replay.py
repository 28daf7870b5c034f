"""Three experiments on recipes/chain_sum.yaml, with tables and plots from the metrics of real runs: what replay saves, what
rollouts beside training save (`overlap`), and what training on stale ones costs (`staleness`).

    python -m bench.replay RUNS OUT [--only replay] [--seeds 0 1 2] [--recipe R] [key.sub=value ...]

RUNS holds a folder for each run; finished ones are not run again, and one that was stopped goes on from its last
checkpoint. Checkpoints of finished runs are deleted. Runs of `overlap` have one core for training and another for a vLLM
server, as if each had a device of its own; without staleness the two take turns. The overrides are for smaller settings:

    python -m bench.replay /tmp/runs /tmp/out --only replay --seeds 0 --recipe recipes/tiny.yaml trainer.steps=8
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from tbrm.config.recipe import load_config
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout.vllm.process import ServerProcess, engine_options

OTHERS = {
    "reval": ("objective.name=reval", "objective.beta=0.05", "objective.centre_rewards=true"),
    "reinforce": ("objective.name=reinforce", "objective.beta=0.01"),
}
SAMPLES = 4  # to each problem; `tbrm` takes one
STALENESS = {0: "rollouts by the newest weights", 2: "2 steps old"}
# R/beta of wrong and right answers: the recipe's 55 and 105 become 55 and 155. With replay and 105, old wrong answers are
# pushed down until right ones suffer (bench/NOTES.md); without replay both are shown.
HALF_BETA = ("objective.beta=0.01", "objective.reward_offset=0.55")
UPDATES = 2
# Half the recipe's learning rate, since each response is trained on twice.
REPLAY = (f"rollout.updates={UPDATES}", "replay.capacity=1280", "optim.learning_rate=2e-5")
# Steps of a quarter, at a rate at which stale rollouts teach and do not unteach later (bench/NOTES.md).
SHORT = 4
SHORT_STEPS = ("optim.learning_rate=1.2e-5", "optim.warmup_steps=8", f"evaluation.every={SHORT}")
TRAINER_CORE, SERVER_CORE = 0, 1
# In which a rollout takes about as long as a step's training; with bfloat16 it takes half of that, and longer responses than
# this task's take more.
SERVER_DTYPE = torch.float32
COST = {"replay": "tokens", "overlap": "seconds", "staleness": "tokens"}
COST_TITLE = {"tokens": "tokens generated", "seconds": "seconds of training"}


@dataclass(frozen=True)
class Variant:
    """One curve: the mean over the seeds of runs with these overrides."""

    panel: str
    name: str
    overrides: tuple[str, ...]
    a_core_each: bool = False
    """One core for the trainer, another for a vLLM server."""


def experiments(prompts: int, rollouts: int) -> dict[str, list[Variant]]:
    """Updates on `prompts` responses for `replay`, smaller ones for the others; all of an experiment are of the same size."""
    size = f"rollout.prompts={prompts}"
    once = (size, f"trainer.steps={rollouts}", "evaluation.every=1")
    twice = (size, f"trainer.steps={UPDATES * rollouts}", f"evaluation.every={UPDATES}", *REPLAY)
    twice += (f"replay.samples_per_step={prompts - prompts // UPDATES}",)
    replay = [
        Variant("tbrm", "beta 0.02", once),
        Variant("tbrm", "beta 0.01", (*once, *HALF_BETA)),
        Variant("tbrm", "beta 0.01 and replay", (*twice, *HALF_BETA)),
    ]
    overlap: list[Variant] = []
    others: dict[str, list[Variant]] = {objective: [] for objective in OTHERS}
    for steps, name in STALENESS.items():
        short = (f"trainer.steps={SHORT * rollouts}", *SHORT_STEPS, f"rollout.max_staleness={steps}")
        tbrm = (*short, *HALF_BETA, f"rollout.prompts={prompts // SHORT}")
        overlap.append(Variant("tbrm", name, tbrm, a_core_each=True))
        for objective, settings in OTHERS.items():
            samples = (f"rollout.prompts={prompts // SHORT // SAMPLES}", f"rollout.samples={SAMPLES}")
            others[objective].append(Variant(objective, name, (*short, *settings, *samples)))
    return {"replay": replay, "overlap": overlap, "staleness": sum(others.values(), overlap)}


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


def train(folder: Path, recipe: str, overrides: list[str], *, a_core_each: bool) -> None:
    if (folder / "result.json").exists():
        return
    command = [sys.executable, "-m", "tbrm", "train", recipe, "--resume", f"run.dir={folder}", *overrides]
    print(" ".join(command), flush=True)
    if a_core_each:
        with server(recipe, folder) as address, bound_to(TRAINER_CORE):
            dtype = str(SERVER_DTYPE).removeprefix("torch.")
            command += ["rollout.engine=vllm", f"rollout.vllm.addresses=[{address}]", f"rollout.vllm.dtype={dtype}"]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    else:
        subprocess.run(command, check=True)
    shutil.rmtree(folder / "checkpoints")


@contextmanager
def bound_to(core: int) -> Iterator[None]:
    """Processes that are started here, and theirs, run on that core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def server(recipe: str, folder: Path) -> Iterator[Path]:
    """A vLLM server as tbrm starts its own, but on a core of its own."""
    config = load_config(recipe)
    vllm = config.rollout.vllm
    options = engine_options(vllm, SERVER_DTYPE, config.rollout.batch_size, torch.device("cpu"), {})
    with tempfile.TemporaryDirectory() as made:
        address = Path(made) / "socket"
        with bound_to(SERVER_CORE):
            place = {"VLLM_CPU_OMP_THREADS_BIND": str(SERVER_CORE)}
            log = folder / "engine" / "vllm.log"
            process = ServerProcess(Path(config.model.name), address, options, vllm, log, place)
        try:
            yield address
        finally:
            process.stop()


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


def table(curves: dict[Variant, list[Curve]], target: float, cost: str) -> str:
    """Of each seed, and of the mean of their curves: how it ended, and the cost at which the target was first reached."""
    heads = ["runs", "accuracy at the end", "mean", cost, f"to {target:.0%}", "mean"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def reached(curve: Curve) -> str:
        at = curve.first_at(target)
        return "never" if at is None else f"{getattr(curve, cost)[at]:,.0f}"

    for variant, found in curves.items():
        mean = mean_of(found)
        cells = [f"{variant.panel}, {variant.name}"]
        cells += [", ".join(f"{curve.accuracy[-1]:.1%}" for curve in found), f"{mean.accuracy[-1]:.1%}"]
        cells += [f"{getattr(mean, cost)[-1]:,.0f}", ", ".join(map(reached, found)), reached(mean)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(curves: dict[Variant, list[Curve]], target: float, cost: str, path: Path) -> None:
    """A panel per objective: accuracy against what it cost; thin lines are seeds, thick ones their mean."""
    panels = list(dict.fromkeys(variant.panel for variant in curves))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, ax in zip(panels, axes[0], strict=True):
        shown = [(variant, found) for variant, found in curves.items() if variant.panel == panel]
        for number, (variant, found) in enumerate(shown):
            for curve in found:
                ax.plot(getattr(curve, cost), curve.accuracy, color=f"C{number}", lw=0.6, alpha=0.5)
            mean = mean_of(found)
            ax.plot(getattr(mean, cost), mean.accuracy, color=f"C{number}", lw=2, marker="o", ms=3, label=variant.name)
        ax.axhline(target, color="black", lw=0.8, ls=":")
        ax.set(title=panel, xlabel=COST_TITLE[cost], ylabel="held-out accuracy")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--only", choices=COST, help="one of the experiments")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--recipe", default="recipes/chain_sum.yaml")
    parser.add_argument("--prompts", type=int, default=128, help="responses that each update of replay is made of")
    parser.add_argument("--rollouts", type=int, default=12, help="of each run of replay")
    parser.add_argument("--target", type=float, default=0.5)
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for experiment, variants in experiments(args.prompts, args.rollouts).items():
        if args.only not in (None, experiment):
            continue
        curves: dict[Variant, list[Curve]] = {}
        for variant in variants:
            for seed in args.seeds:
                folder = args.runs / f"{variant.panel} {variant.name} seed {seed}".replace(" ", "-")
                overrides = [f"seed={seed}", "checkpoint.every=12", *variant.overrides, *args.overrides]
                train(folder, args.recipe, overrides, a_core_each=variant.a_core_each)
                curves.setdefault(variant, []).append(read_curve(folder))
        text = table(curves, args.target, COST[experiment])
        (args.out / f"{experiment}.md").write_text(text)
        plot(curves, args.target, COST[experiment], args.out / f"{experiment}.png")
        print(text)


if __name__ == "__main__":
    main()
