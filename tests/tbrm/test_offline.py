from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tbrm.config import RolloutConfig
from tbrm.data import Trajectory
from tbrm.metrics import Phases
from tbrm.offline import FileSource, read_trajectories
from tbrm.tiny import tiny_tokenizer

EOS = [0, 3]


def read(tmp_path: Path, *rows: object) -> list[Trajectory]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_trajectories(path, tiny_tokenizer(), EOS)


def test_text_is_encoded_and_ended_and_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text, chat, cut, ids = read(
        tmp_path,
        {"prompt": "1 + 1", "response": "2", "reward": 1},
        {"messages": [{"role": "user", "content": "1 + 1"}], "response": "3", "reward": 0.5},
        {"prompt": "7", "response": "12", "reward": 0.0, "truncated": True},
        {"prompt_ids": [5, 6], "response_ids": [7, 3], "reward": -1.0, "response": "ignored", "messages": None},
    )
    assert tokenizer.decode(text.prompt_ids) == "<|user|>1 + 1<|end|><|assistant|>"
    assert tokenizer.decode(text.response_ids) == "2<|end|>"
    assert (chat.prompt_ids, chat.group, chat.reward) == (text.prompt_ids, text.group, 0.5)
    assert tokenizer.decode(cut.response_ids) == "12"
    assert cut.truncated
    assert (ids.prompt_ids, ids.response_ids, ids.reward) == ([5, 6], [7, 3], -1.0)
    assert len({text.group, cut.group, ids.group}) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"data.jsonl:2: "),
        ([1], r"data.jsonl:2: got list; wants an object"),
        ({"prompt": "1", "response": "2"}, r":2: reward: got None; wants a number"),
        ({"prompt": "1", "response": "2", "reward": True}, r":2: reward: got True; wants a number"),
        ({"prompt": "1", "response": "2", "reward": float("nan")}, r":2: reward: got nan; wants a finite number"),
        ({"prompt": "1", "response": 2, "reward": 1}, r":2: response: got 2; wants text"),
        ({"response": "2", "reward": 1}, r":2: neither prompt \(text\) nor messages"),
        ({"messages": [{"role": "user"}], "response": "2", "reward": 1}, r":2: messages: got \{'role': 'user'\}"),
        (
            {"prompt": "1", "response": "2", "reward": 1, "truncated": "no"},
            r":2: truncated: got 'no'; wants true or false",
        ),
        (
            {"prompt_ids": [1], "response_ids": [10**6], "reward": 1},
            r":2: response_ids: wants a list of token ids from 0",
        ),
        ({"prompt_ids": [], "response_ids": [1], "reward": 1}, r":2: Trajectory.prompt_ids is empty"),
        ({"prompt": "1", "response": "", "reward": 1, "truncated": True}, r":2: response: empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {"prompt": "1", "response": "2", "reward": 1}, row)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_trajectories(tmp_path / "none.jsonl", tiny_tokenizer(), EOS)
    with pytest.raises(ValueError, match="holds no trajectories"):
        read(tmp_path)


def test_every_epoch_deals_all_trajectories_in_a_new_order() -> None:
    items = [Trajectory([1], [i], 0.0) for i in range(10)]
    phases = Phases(torch.device("cpu"))

    def source(seed: int) -> FileSource:
        return FileSource(items, RolloutConfig(prompts=2, samples=2), seed)

    one = source(0)
    dealt = [t.response_ids[0] for step in range(1, 6) for t in one.collect(step, phases).trajectories]
    assert len(dealt) == 20
    assert set(Counter(dealt[:10]).values()) == set(Counter(dealt[10:]).values()) == {1}
    assert dealt[:10] != dealt[10:]

    resumed = source(0)
    resumed.position = 8
    assert [t.response_ids[0] for t in resumed.collect(3, phases).trajectories] == dealt[8:12]
    assert [t.response_ids[0] for t in source(1).collect(1, phases).trajectories] != dealt[:4]


def test_a_step_may_take_more_than_one_epoch() -> None:
    items = [Trajectory([1], [i], 0.0) for i in range(3)]
    source = FileSource(items, RolloutConfig(prompts=4, samples=2), seed=0)
    dealt = [t.response_ids[0] for t in source.collect(1, Phases(torch.device("cpu"))).trajectories]
    assert sorted(dealt[:3]) == sorted(dealt[3:6]) == [0, 1, 2]
    assert len(dealt) == 8
