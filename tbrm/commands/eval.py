"""`tbrm eval`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbrm.commands.command import Command, at_least_one, model_argument, overrides, path
from tbrm.commands.start import load_libraries, of_checkpoint, processes, require_model, run_of
from tbrm.commands.table import table

if TYPE_CHECKING:
    from tbrm.config.schema import Config
    from tbrm.rollout.evaluate import Evaluation
    from tbrm.tasks import Problem, Task


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    overrides(parser, "keys of task, rollout, evaluation and model")
    task = "a recipe whose task is meant, or a task's name (with task.KEY=... after it)"
    parser.add_argument("--task", type=path, help=f"{task}; of a run, the default is its own")
    samples = "responses to each problem, for avg@k and pass@k (default: the recipe's or the run's number, else 1)"
    parser.add_argument("--k", type=at_least_one, help=samples)
    temperature = "0 is greedy; the default is the recipe's or the run's, else 0 for one response, 1 for several"
    parser.add_argument("--temperature", type=float, help=temperature)
    prompts = "held-out problems (default: the recipe's or the run's number, else 200)"
    parser.add_argument("--prompts", type=int, help=prompts)
    seed = "seed of the sampling (default: that of the run's own evaluation of the checkpoint, else 0)"
    parser.add_argument("--seed", type=int, help=seed)
    parser.add_argument("--json", type=path, metavar="FILE", help="also write all figures and responses there")


def run(args: argparse.Namespace) -> None:
    from tbrm.config.section import ConfigError

    run_dir = run_of(args.model)
    config = _configured(args, run_dir)
    task, chosen = config.task, config.evaluation
    assert task is not None  # or it would have been asked for
    if not chosen.prompts:
        raise ConfigError(
            "evaluation.prompts: 0, or the task holds no problems out: give --prompts N, with task.heldout_path=FILE or "
            "task.heldout_rows=N for a task of a file"
        )
    problems = task.heldout(chosen.prompts)
    require_model(config.model)
    load_libraries(args.model)
    from tbrm.chat import make_chat
    from tbrm.policy.load import load_policy
    from tbrm.reporting.progress import alive
    from tbrm.rollout import Sampling, make_engine
    from tbrm.rollout.evaluate import evaluate
    from tbrm.rollout.interface import derive_seed
    from tbrm.training.checkpoint import step_of

    if run_dir is not None:
        _warn_of_trained_problems(run_dir, task, problems)
    config = of_checkpoint(config)
    seed = config.seed
    if run_dir is not None and args.seed is None:  # as in the run's own evaluation
        seed = derive_seed(seed, step_of(Path(config.model.name)) or 0)
    sampling = Sampling(config.rollout.max_new_tokens, chosen.temperature)
    with processes(config) as world:
        policy, tokenizer = load_policy(config, world)
        chat = make_chat(config, policy.lm, tokenizer)
        with closing(make_engine(config.rollout, policy, chat, world)) as engine:
            engine.update_weights(0)
            with alive("evaluation", chosen.samples * len(problems), shown=world.is_main) as watch:
                result = evaluate(
                    engine,
                    chat,
                    task,
                    problems,
                    k=chosen.samples,
                    sampling=sampling,
                    seed=seed,
                    world=world,
                    watch=watch,
                )
        if world.is_main:
            _show(args, config, result)


def _configured(args: argparse.Namespace, run_dir: Path | None) -> Config:
    from tbrm.config.recipe import load_sections, with_sections
    from tbrm.config.section import ConfigError

    settings: dict[str, Any] = {"temperature": args.temperature, "prompts": args.prompts, "samples": args.k and 1}
    config = load_sections(
        args.task, args.overrides, run=run_dir, model={"name": args.model}, evaluation=settings, seed=args.seed
    )
    if config.task is None:
        raise ConfigError(f"--task: missing; {args.model} is not the folder of a run, whose task would be taken")
    if args.k is None:
        return config
    chosen = {**dict(config.evaluation), "samples": args.k}
    if args.temperature is None and args.k > 1:  # greedy ones are all the same
        chosen["temperature"] = chosen["temperature"] or 1.0
    return with_sections(config, evaluation=chosen)


def _warn_of_trained_problems(run_dir: Path, task: Task, problems: Sequence[Problem]) -> None:
    """A run holds out what its own evaluations take; of what is asked for beyond it may have been trained on."""
    from tbrm.training.resume import read_recipe

    recipe = read_recipe(run_dir)
    if recipe is None or (recipe.get("task") or {}).get("name") != task.name:
        return
    count = recipe["evaluation"]["prompts"]
    held_out = {problem.key for problem in task.withheld(count)}
    if others := sum(problem.key not in held_out for problem in problems):
        print(
            f"{others} of these {len(problems)} problems were not held out in {run_dir}, whose evaluation.prompts was {count}, "
            "and may have been trained on",
            file=sys.stderr,
        )


def _show(args: argparse.Namespace, config: Config, result: Evaluation) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(result), indent=2) + "\n")
    assert config.task is not None
    temperature = config.evaluation.temperature
    decoding = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    taken = config.model.name  # of a run's folder, the checkpoint
    model = taken if taken == args.model else f"{taken}, of {args.model}"
    shown = {"model": model, "task": config.task.name, "decoding": decoding, **result.summary()}
    shown["accuracy"] = f"{result.accuracy:.1%} (95% interval {result.ci_low:.1%} to {result.ci_high:.1%})"
    shown["correct"] = f"a reward of {config.task.correct_at:g} or more"
    shown["pass_at_k"] = f"{result.pass_at_k:.1%}"
    del shown["ci_low"], shown["ci_high"]
    print(table([(key, value if isinstance(value, str) else f"{value:.4g}") for key, value in shown.items()]))


EVAL = Command(
    "eval",
    "Measure a model's accuracy on a task's held-out problems.",
    arguments,
    run,
    epilog="examples:\n"
    "  tbrm eval runs/demo\n"
    "  tbrm eval .models/SmolLM2-135M-Instruct --task reasoning_gym --k 4 task.family=chain_sum rollout.max_new_tokens=32",
)
