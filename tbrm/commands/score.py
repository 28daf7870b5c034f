"""`tbrm score`: an audit of recorded trajectories."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tbrm.commands.command import Command, model_argument, overrides, path
from tbrm.commands.start import load_libraries, of_checkpoint, require_model

if TYPE_CHECKING:
    from tbrm.chat import Chat
    from tbrm.policy.model import PolicyModel


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument("data", type=path, help="JSON lines with prompt or messages, response and reward")
    overrides(parser, "keys of model, rollout.temperature, ...")
    parser.add_argument("--out", type=path, metavar="FILE", help="write there instead of to the terminal")


def run(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_sections

    config = load_sections(None, args.overrides, model={"name": args.model})
    require_model(config.model)
    load_libraries(args.model)
    from tbrm.chat import make_chat
    from tbrm.policy.load import load_policy

    policy, tokenizer = load_policy(of_checkpoint(config))
    with open(args.out, "w") if args.out else nullcontext(sys.stdout) as out:
        for row in score_file(policy, make_chat(config, policy.lm, tokenizer), args.data, config.trainer.batch_tokens):
            out.write(json.dumps(row) + "\n")


def score_file(
    policy: PolicyModel, chat: Chat, path: str | Path, batch_tokens: int
) -> Iterator[dict[str, float | int]]:
    """One row per trajectory of the file, in its order: the sum of its actions' log-probs, V(s_1), and their number."""
    import torch

    from tbrm.experience.offline import RowReader, read_trajectories
    from tbrm.reporting.progress import alive
    from tbrm_kernels import segment_sums

    trajectories = read_trajectories(path, RowReader(chat))
    rows: dict[int, dict[str, float | int]] = {}
    with alive("scoring", len(trajectories)) as watch:
        for members in policy.layout.split(trajectories, batch_tokens)[0]:
            batch = policy.layout.pack([trajectories[i] for i in members]).to(policy.device)
            with torch.no_grad():
                stats = policy(batch)
            sums = segment_sums(stats.logprobs, batch.cu_seqlens).tolist()
            values = batch.values(stats.lse).tolist()
            for i, logprob_sum, value in zip(members, sums, values, strict=True):
                reward, actions = trajectories[i].reward, len(trajectories[i].actions)
                rows[i] = {"index": i, "logprob_sum": logprob_sum, "value": value, "actions": actions, "reward": reward}
            watch(len(members))
    yield from (rows[i] for i in sorted(rows))


SCORE = Command(
    "score",
    "Audit recorded trajectories: sum of log-probs and V(s_1) under a model, a JSON line each.",
    arguments,
    run,
    of_one_process=True,
)
