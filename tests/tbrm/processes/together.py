"""Run by torchrun in three processes: what they do together where some have nothing to do, fail, or were told something else.

    torchrun --nproc-per-node 3 -m tests.tbrm.processes.together FOLDER

Each writes what it found to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.experience.offline import FileSource
from tbrm.experience.sources import trajectory_source
from tbrm.parallel import World
from tbrm.policy.load import load_policy
from tbrm.policy.model import PolicyModel
from tbrm.processes.launch import launched
from tbrm.rollout import Sampling, make_engine
from tbrm.rollout.interface import make_requests
from tbrm.training.agreement import facts_of, require_agreement
from tbrm.training.checkpoint import FORMAT, Checkpoint
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import chat_of, tiny_config

PROMPTS = (1, 2, 3, 5)


class Stubborn(Exception):
    """Cannot be pickled."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.lock = threading.Lock()


def gathers_of_a_step(policy: PolicyModel) -> int:
    count = 0
    real = _fsdp_param_group.foreach_all_gather

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return real(*arguments)

    _fsdp_param_group.foreach_all_gather = counted
    try:
        batch = pack([Trajectory([5, 6, 7], [8, 9, 10], 0.0)])
        loss, _ = policy.trajectory_loss(batch, lambda stats, cu_seqlens, first: stats.logprobs.sum())
        loss.backward()
    finally:
        _fsdp_param_group.foreach_all_gather = real
    policy.zero_grad()
    return count


def generate_and_step(config: Config, world: World) -> dict[str, Any]:
    """Generation with fewer requests than processes, with as many, and with some that have two; a step after each."""
    policy, tokenizer = load_policy(config, world)
    engine = make_engine(config.rollout, policy, chat_of(policy.lm, tokenizer), world)
    gathers_of_a_step(policy)  # the first one sets FSDP2 up
    found: dict[str, Any] = {"plain": gathers_of_a_step(policy)}
    for count in PROMPTS:
        requests = make_requests([[1, 5 + i, 6] for i in range(count)], 1, "test", 0)
        answers = engine.generate(requests, Sampling(4, 1.0))
        graded = world.split(lambda mine: [sum(ids) for ids in mine], [each[0].token_ids for each in answers])
        found[str(count)] = {
            "answers": [[response.token_ids for response in each] for each in answers],
            "graded": graded,
            "gathers": gathers_of_a_step(policy),
            "later": gathers_of_a_step(policy),
        }
    return found


def failure_of(function: Callable[[], Any]) -> list[str]:
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def fail(error: Exception) -> Any:
    raise error


def failures(world: World) -> dict[str, list[str]]:
    def grade(mine: Sequence[int]) -> Sequence[int]:
        return fail(ValueError("a bad answer")) if 4 in mine else mine

    return {
        "on main": failure_of(lambda: world.on_main(lambda: fail(ConfigError("run.dir: no")))),
        "on main, of the disk": failure_of(lambda: world.on_main(lambda: fail(OSError(28, "No space left", "a/b")))),
        "on main, stubborn": failure_of(lambda: world.on_main(lambda: fail(Stubborn("held")))),
        "of one's share": failure_of(lambda: world.split(grade, [0, 1, 2, 3, 4, 5])),
        "none": failure_of(lambda: world.on_main(lambda: world.rank)),
    }


def grade_by_rank(prompts: Sequence[str], **_: Any) -> list[float]:
    """As one that draws, or asks a judge, does: another reward on each process."""
    return [float(os.environ["RANK"]) for _ in prompts]


def recorded(folder: Path, world: World) -> list[float]:
    """The rewards of lines that the task grades."""
    data = folder / "ungraded.jsonl"
    if world.is_main:
        data.write_text(json.dumps({"prompt": "1", "response": "2", "answer": "3"}) + "\n")
    world.gather(None)  # it is written
    task = {"name": "file", "path": str(data), "verifier": f"{__spec__.name}:grade_by_rank"}
    config = tiny_config(folder, data__trajectories=str(data), task=task, evaluation={"prompts": 0})
    policy, tokenizer = load_policy(config, world)
    chat = chat_of(policy.lm, tokenizer)
    source = trajectory_source(config, make_engine(config.rollout, policy, chat, world), chat, [], world)
    assert isinstance(source, FileSource)
    return [trajectory.reward for trajectory in source.trajectories]


def late_file_system(folder: Path, world: World) -> list[str]:
    """A checkpoint of which one process does not see a file."""
    checkpoint = folder / f"machine-{world.rank}" / "step-000002"
    (checkpoint / "trainer").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    if world.rank != 1:
        (checkpoint / "trainer" / "state.json").write_text(json.dumps({"format": FORMAT, "step": 2}))
    return failure_of(lambda: Checkpoint(checkpoint, world))


def disagreements(folder: Path, world: World) -> dict[str, list[str]]:
    data = folder / f"data-{world.rank // 2}.jsonl"  # of two machines
    data.write_text(json.dumps({"prompt_ids": [1], "response_ids": [2], "reward": world.rank // 2}) + "\n")
    link = folder / f"of rank {world.rank}" / "data.jsonl"
    link.parent.mkdir()
    link.symlink_to(data)
    configs = {
        "nothing": tiny_config(folder),
        "a rate": tiny_config(folder, optim__learning_rate=1e-3 if world.rank == 1 else 1e-4),
        "a task's key": tiny_config(folder, evaluation__prompts=5 + (world.rank == 2)),
    }
    found = {
        what: failure_of(lambda config=config: require_agreement(world, lambda: facts_of(config, {"resume": False})))
        for what, config in configs.items()
    }
    command = {"resume": world.rank == 0}
    found["--resume"] = failure_of(lambda: require_agreement(world, lambda: facts_of(tiny_config(folder), command)))

    def facts_of_data() -> dict[str, str]:
        facts = facts_of(tiny_config(folder, data__trajectories=str(link)), {})
        return {key: value for key, value in facts.items() if key != "data.trajectories"}  # their paths

    found["a file"] = failure_of(lambda: require_agreement(world, facts_of_data))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = tiny_config(folder)
    with launched(config.model, config.parallel) as world:
        found = {
            "generated": generate_and_step(config, world),
            "failures": failures(world),
            "recorded": recorded(folder, world),
            "late file system": late_file_system(folder, world),
            "disagreements": disagreements(folder, world),
        }
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
