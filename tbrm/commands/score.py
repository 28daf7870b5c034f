"""Auditing recorded trajectories under a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from tbrm.chat import Chat
from tbrm.experience.offline import RowReader, read_trajectories
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.deal import split_by_tokens
from tbrm.trajectories.packing import pack
from tbrm_kernels import segment_sums


@torch.no_grad()
def score_file(
    policy: PolicyModel, chat: Chat, path: str | Path, batch_tokens: int
) -> Iterator[dict[str, float | int]]:
    """One row per trajectory of the file, in its order: the sum of its actions' log-probs, V(s_1), and their number."""
    trajectories = read_trajectories(path, RowReader(chat))
    rows: dict[int, dict[str, float | int]] = {}
    bar = tqdm(total=len(trajectories), disable=None, desc="scoring", unit="trajectory")
    for members in split_by_tokens(trajectories, batch_tokens):
        batch = pack([trajectories[i] for i in members]).to(policy.device)
        stats = policy(batch)
        sums = segment_sums(stats.logprobs, batch.cu_seqlens).tolist()
        values = stats.lse[batch.cu_seqlens[:-1].long()].tolist()
        for i, logprob_sum, value in zip(members, sums, values, strict=True):
            reward, actions = trajectories[i].reward, len(trajectories[i].actions)
            rows[i] = {"index": i, "logprob_sum": logprob_sum, "value": value, "actions": actions, "reward": reward}
        bar.update(len(members))
    bar.close()
    yield from (rows[i] for i in sorted(rows))
