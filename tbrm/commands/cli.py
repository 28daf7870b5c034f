"""The commands. Each is one function; what they do lives in the modules they call."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbrm.processes.place import find_place, refuse_several
from tbrm.storage.paths import expand

if TYPE_CHECKING:
    from tbrm.config.schema import Config
    from tbrm.parallel import World
    from tbrm.rollout.evaluate import Evaluation
    from tbrm.tasks import Problem, Task

# Everything heavy is imported inside the command that needs it: `tbrm --help` must not wait for torch.

_OF_ONE_PROCESS = ("score", "report", "export", "import-gguf")
"""Commands that write files and divide nothing: several processes would all write the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option; overrides after one are still overrides.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        if args.name in _OF_ONE_PROCESS:
            refuse_several(f"tbrm {args.name}")
        args.command(args)
    except Exception as error:
        if not _explains_itself(error):
            raise
        if getattr(args, "debug", False):
            traceback.print_exc()
        elif hasattr(error, "own_traceback"):  # an exception of code of the user's own
            print(error.own_traceback, file=sys.stderr)
        print(f"tbrm {args.name}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


@contextmanager
def _processes(config: Config, **command: object) -> Iterator[World]:
    """Those that a launcher started, once they are known to have been told the same; or this one alone."""
    from tbrm.processes.launch import launched
    from tbrm.training.agreement import facts_of, require_agreement

    with launched(config.model, config.parallel) as world:
        require_agreement(world, lambda: facts_of(config, command))
        yield world


def _explains_itself(error: Exception) -> bool:
    """What our own code raises does, and a traceback would hide it. Anything else is a bug to be seen. A full disk, a folder
    that may not be written: not ours to mend, and a traceback would not help. A signal, too."""
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])
    return ours and isinstance(error, ValueError | ModuleNotFoundError | ArithmeticError | RuntimeError)


def train(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_config
    from tbrm.config.schema import ConfigError

    if args.overwrite and args.resume_anyway:
        raise ConfigError("--overwrite and --resume-anyway: one deletes what the other goes on with; give one of them")
    config = load_config(args.recipe, args.overrides)
    resume = args.resume or args.resume_anyway
    _load_libraries(config.model.name)
    from tbrm.training.resume import nothing_left
    from tbrm.training.run_lock import RunLock
    from tbrm.training.run_writer import prepare_run_dir
    from tbrm.training.trainer import Trainer

    run_dir = Path(config.run.dir)

    def prepare() -> str | None:
        prepare_run_dir(run_dir, resume=resume, overwrite=args.overwrite)
        return nothing_left(config, anyway=args.resume_anyway) if resume else None

    fate = {"resume": resume, "resume-anyway": args.resume_anyway, "overwrite": args.overwrite}
    with _processes(config, **fate) as world, RunLock(run_dir, world, resume=resume):
        finished = world.on_main(prepare)
        if not finished:
            Trainer(config, resume=resume, anyway=args.resume_anyway, world=world).train()
        if world.is_main:
            print(finished or f"{config.run.dir} holds the run; `tbrm report {config.run.dir}` makes a page of it")


def show_config(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import describe, load_config

    config = load_config(args.recipe, args.overrides)
    print(_table(describe(type(config), dict(config)), ("key", "value", "meaning")))


def plan(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    _load_libraries(f"the shapes of {config.model.name}")
    from tbrm.plan import PHASES, make_plan
    from tbrm.plan.report import GIB, as_dict, rows, sentences

    planned = make_plan(config, args.gpus)
    memory = None if args.gpu_memory is None else args.gpu_memory * GIB
    if args.json:
        print(json.dumps(as_dict(planned, memory), indent=2))
        return
    print(_table(rows(planned), ("GiB in each process", *PHASES)))
    print("\n" + "\n".join(sentences(planned, memory)))


def eval_model(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_sections

    temperature = args.temperature if args.temperature is not None else float(args.k > 1)
    settings: dict[str, Any] = {"samples": args.k, "temperature": temperature, "prompts": args.prompts}
    config = load_sections(args.task, args.overrides, model={"name": args.model}, evaluation=settings, seed=args.seed)
    _load_libraries(args.model)
    from tbrm.chat import make_chat
    from tbrm.policy.load import load_policy
    from tbrm.rollout import Sampling, make_engine
    from tbrm.rollout.evaluate import evaluate

    task, chosen = config.task, config.evaluation
    assert task is not None  # --task is required
    problems = task.heldout(chosen.prompts)
    _warn_of_trained_problems(args.model, task, problems)
    config = _of_checkpoint(config)
    sampling = Sampling(config.rollout.max_new_tokens, chosen.temperature)
    with _processes(config) as world:
        policy, tokenizer = load_policy(config, world)
        chat = make_chat(config, policy.lm, tokenizer)
        with closing(make_engine(config.rollout, policy, chat, world)) as engine:
            engine.update_weights(0)
            result = evaluate(
                engine, chat, task, problems, k=chosen.samples, sampling=sampling, seed=config.seed, world=world
            )
        if world.is_main:
            _show_evaluation(args, config, result)


def _warn_of_trained_problems(model: str, task: Task, problems: Sequence[Problem]) -> None:
    """A run holds out what its own evaluations take; of what is asked for beyond it may have been trained on."""
    from tbrm.training.resume import read_recipe

    recipe = read_recipe(Path(model))
    if recipe is None or (recipe.get("task") or {}).get("name") != task.name:
        return
    count = recipe["evaluation"]["prompts"]
    held_out = {problem.key for problem in task.withheld(count)}
    if others := sum(problem.key not in held_out for problem in problems):
        print(
            f"{others} of these {len(problems)} problems were not held out in {model}, whose evaluation.prompts was {count}, "
            "and may have been trained on",
            file=sys.stderr,
        )


def _show_evaluation(args: argparse.Namespace, config: Config, result: Evaluation) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(result), indent=2) + "\n")
    assert config.task is not None
    decoding = _decoding(config.evaluation.temperature)
    taken = config.model.name  # of a run's folder, the checkpoint
    model = taken if taken == args.model else f"{taken}, of {args.model}"
    shown = {"model": model, "task": config.task.name, "decoding": decoding, **result.summary()}
    shown["accuracy"] = f"{result.accuracy:.1%} (95% interval {result.ci_low:.1%} to {result.ci_high:.1%})"
    shown["correct"] = f"a reward of {config.task.correct_at:g} or more"
    shown["pass_at_k"] = f"{result.pass_at_k:.1%}"
    del shown["ci_low"], shown["ci_high"]
    print(_table([(key, value if isinstance(value, str) else f"{value:.4g}") for key, value in shown.items()]))


def score(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_sections

    config = load_sections(None, args.overrides, model={"name": args.model})
    _load_libraries(args.model)
    from tbrm.chat import make_chat
    from tbrm.commands.score import score_file
    from tbrm.policy.load import load_policy

    policy, tokenizer = load_policy(_of_checkpoint(config))
    with open(args.out, "w") if args.out else sys.stdout as out:
        for row in score_file(policy, make_chat(config, policy.lm, tokenizer), args.data, config.trainer.batch_tokens):
            out.write(json.dumps(row) + "\n")


def rollout(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    _load_libraries(config.model.name)
    from tbrm.experience.record import record

    with _processes(config, steps=args.steps) as world:
        written = record(config, Path(args.out), args.steps, world)
        if world.is_main:
            print(f"{written} trajectories written to {args.out}; train on them with data.trajectories={args.out}")


def doctor(args: argparse.Namespace) -> None:
    from tbrm.commands.doctor import examine

    print(_table(examine(), ("what", "usable", "detail")))


def report(args: argparse.Namespace) -> None:
    from tbrm.reporting.page import summary_lines, write_report

    write_report(Path(args.run))
    print("\n".join(summary_lines(Path(args.run))))


def export(args: argparse.Namespace) -> None:
    _load_libraries(args.source)
    import torch

    from tbrm.training.export import export as write

    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(write(args.source, Path(args.out), dtype, args.overrides))


def import_gguf(args: argparse.Namespace) -> None:
    from tbrm.policy.gguf import import_gguf as convert

    convert(Path(args.file), Path(args.out))
    print(f"{args.out} is ready: model.name={args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tbrm",
        description="Trains language models by Trajectory Bellman Residual Minimization (arXiv 2505.15311).",
    )

    def debug_argument(any_parser: argparse.ArgumentParser) -> None:
        whence = "show where an error came from, in full"
        any_parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=whence)

    debug_argument(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Any, summary: str, **options: Any) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=formatter, **options)
        sub.set_defaults(command=function, name=name)
        debug_argument(sub)
        return sub

    def recipe_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", type=_path, help="a YAML file, such as recipes/tiny.yaml")
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a key of the recipe")

    sub = command("train", train, "Train a model as a recipe says.", add_help=False)
    recipe_arguments(sub)
    fate = sub.add_mutually_exclusive_group()
    fate.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if it has one")
    fate.add_argument("--overwrite", action="store_true", help="delete what run.dir holds and start afresh")
    sub.add_argument(
        "--resume-anyway", action="store_true", help="as --resume, though the recipe makes another run of it"
    )
    sub.add_argument("-h", "--help", nargs=0, action=_HelpWithKeys, help="show this help and every key of a recipe")

    recipe_arguments(command("config", show_config, "Check a recipe and show every key with its value and meaning."))

    sub = command(
        "plan",
        plan,
        "Say how much memory a recipe will take in each process, and what to change where that is too much.",
        epilog="Plans for GPUs, on a machine without any too; model.device=cpu plans for processes on CPUs. No weight is read."
        "\n\nexample:\n  tbrm plan recipes/demo.yaml --gpus 8 --gpu-memory 80 trainer.batch_tokens=65536",
    )
    recipe_arguments(sub)
    sub.add_argument("--gpus", type=_at_least_one, default=1, help="processes, each with a GPU (default 1)")
    sub.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each; without it nothing is said of what fits")
    sub.add_argument("--json", action="store_true", help="bytes, for programs")

    sub = command(
        "eval",
        eval_model,
        "Measure a model's accuracy on a task's held-out problems.",
        epilog="examples:\n"
        "  tbrm eval runs/demo --task recipes/demo.yaml\n"
        "  tbrm eval .models/SmolLM2-135M-Instruct --task reasoning_gym --k 4 task.family=chain_sum rollout.max_new_tokens=32",
    )
    sub.add_argument(
        "model", type=_path, help="a Hugging Face folder, a hub name, or a run's folder (its best checkpoint is taken)"
    )
    sub.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="keys of task, rollout, evaluation and model"
    )
    sub.add_argument(
        "--task",
        type=_path,
        required=True,
        help="a recipe whose task is meant, or a task's name (with task.KEY=... after it)",
    )
    sub.add_argument("--k", type=int, default=1, help="responses to each problem, for avg@k and pass@k (default 1)")
    sub.add_argument("--temperature", type=float, help="0 is greedy; the default is 0 for one response, 1 for several")
    sub.add_argument("--prompts", type=int, help="held-out problems (default: the recipe's number, else 200)")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sub.add_argument("--json", type=_path, metavar="FILE", help="also write all figures and responses there")

    sub = command(
        "score", score, "Audit recorded trajectories: sum of log-probs and V(s_1) under a model, a JSON line each."
    )
    sub.add_argument(
        "model", type=_path, help="a Hugging Face folder, a hub name, or a run's folder (its best checkpoint is taken)"
    )
    sub.add_argument("data", type=_path, help="JSON lines with prompt or messages, response and reward")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys of model, rollout.temperature, ...")
    sub.add_argument("--out", type=_path, metavar="FILE", help="write there instead of to the terminal")

    sub = command(
        "rollout", rollout, "Record graded rollouts of a recipe's model, for offline training (data.trajectories)."
    )
    recipe_arguments(sub)
    sub.add_argument("--out", type=_path, required=True, metavar="FILE", help="the JSON lines file to write")
    sub.add_argument("--steps", type=int, default=1, help="batches of rollout.prompts problems to answer (default 1)")

    command("doctor", doctor, "Show what is usable on this machine, what will be chosen, and why not the rest.")

    sub = command("report", report, "Write a run's report.html and plots; works on a running or killed run too.")
    sub.add_argument("run", type=_path, help="the run's folder, such as runs/demo")

    sub = command("export", export, "Turn a run's checkpoint into a normal Hugging Face folder.")
    sub.add_argument(
        "source", type=_path, help="a run's folder (its best checkpoint is taken, else its latest), or a checkpoint's"
    )
    sub.add_argument("out", type=_path, help="the folder to make")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys of model, such as trust_remote_code")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as the model's files had them before training)",
    )

    sub = command("import-gguf", import_gguf, "Turn a GGUF file into a normal Hugging Face folder.")
    sub.add_argument("file", type=_path, help="a .gguf file of an architecture that transformers reads")
    sub.add_argument("out", type=_path, help="the folder to make")
    return parser


class _HelpWithKeys(argparse.Action):
    """`--help` that also lists every key of a recipe; the list is made only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from tbrm.config.recipe import describe

        parser.print_help()
        print(
            "\nkeys of a recipe (every one may be overridden; `tbrm config RECIPE` adds those of its task and objective):"
        )
        print(_table(describe(), ("key", "default", "meaning")))
        parser.exit()


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    lines = [*([head] if head else []), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}; wants at least 1")
    return number


def _path(text: str) -> str:
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _decoding(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"


def _of_checkpoint(config: Config) -> Config:
    """The config with the checkpoint that a run's folder stands for as its model."""
    from tbrm.policy.load import resolve_model

    model = config.model.model_copy(update={"name": resolve_model(config.model.name)})
    return config.model_copy(update={"model": model})


def _load_libraries(model: str) -> None:
    """Says so first, once, for it takes many seconds. Then only errors of transformers: its bars and notices would break the
    progress bar. And that one process saves alone is what is meant."""
    import warnings

    place = find_place()
    if place is None or place.rank == 0:
        print(f"loading torch, transformers and {model}", file=sys.stderr)

    import transformers

    warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
