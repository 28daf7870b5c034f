from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from tbrm.config.rollout import RolloutConfig
from tbrm.experience.collect import WAITING, save_collected
from tbrm.experience.offline import FileSource, RowReader, read_trajectories, write_trajectories
from tbrm.experience.supply import Supply
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.reporting.metrics import Phases
from tbrm.tasks import Grade, Problem, Task
from tbrm.tasks.file import FileTask
from tbrm.tasks.user_code import UserCodeError
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import chat_of

PADDING = 3
"""Embeddings beyond the tokenizer's tokens."""


def reader(*heldout: Problem) -> RowReader:
    return RowReader(chat_of(tiny_model(len(tiny_tokenizer()) + PADDING, seed=0)), None, heldout)


def read(tmp_path: Path, *rows: object, rows_are: RowReader | None = None) -> list[Trajectory]:
    path = tmp_path / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return read_trajectories(path, rows_are or reader())


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


def test_an_action_mask_is_kept(tmp_path: Path) -> None:
    ids = {"prompt_ids": [1, 2], "response_ids": [10, 11, 12, 101 + PADDING - 1], "reward": 1.0}
    masked, none, all_of_them = read(
        tmp_path, {**ids, "action_mask": [1, 0, 0, 1]}, {**ids, "action_mask": None}, {**ids, "action_mask": [True] * 4}
    )
    assert masked.action_mask == [True, False, False, True]
    assert masked.actions == [0, 3]
    assert none.actions == all_of_them.actions == [0, 1, 2, 3]
    written = tmp_path / "written.jsonl"
    write_trajectories(written, [masked])
    assert [t.action_mask for t in read_trajectories(written, reader())] == [masked.action_mask]


def test_log_probs_of_what_sampled_are_kept_for_actions(tmp_path: Path) -> None:
    ids = {"prompt_ids": [1, 2], "response_ids": [10, 11, 12], "reward": 1.0}
    whole, masked, unsaid = found = read(
        tmp_path,
        {**ids, "response_logprobs": [-0.5, -1, 0]},
        {**ids, "response_logprobs": [-0.5, None, -2.25], "action_mask": [True, False, True]},
        ids,
    )
    assert whole.behaviour_logprobs is not None and masked.behaviour_logprobs is not None
    assert (whole.behaviour_logprobs.tolist(), masked.behaviour_logprobs.tolist()) == ([-0.5, -1, 0], [-0.5, -2.25])
    assert unsaid.behaviour_logprobs is None
    written = tmp_path / "written.jsonl"
    write_trajectories(written, found)
    for again, before in zip(read_trajectories(written, reader()), found, strict=True):
        said = before.behaviour_logprobs
        assert again.behaviour_logprobs is said is None or torch.equal(again.behaviour_logprobs, said)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    row = {"prompt": f"1{separator}1", "response": f"2{separator}", "reward": 1.0}
    first, _ = read(tmp_path, json.dumps(row, ensure_ascii=False) + "\r", row)
    assert len(first.response_ids) == 3


@pytest.mark.parametrize(
    "shown",
    [
        {"prompt": "2 + 3"},
        {"prompt": " 2  +\n3 "},
        {"messages": [{"role": "user", "content": "2 + 3", "name": None}]},
        {"prompt": [{"role": "user", "content": "2 + 3"}]},
        {"prompt_ids": tiny_tokenizer()("<|user|>2 + 3<|end|><|assistant|>").input_ids},
        {"prompt_ids": [9], "messages": [{"role": "user", "content": "2 + 3"}]},
    ],
)
def test_a_held_out_problem_is_left_out_however_it_is_shown(tmp_path: Path, shown: dict) -> None:
    rows_are = reader(Problem("2 + 3", "5"))
    other = {"prompt": "2 + 33", "response": "35", "reward": 1.0}
    row = {**shown, "response": "5", "response_ids": [10], "reward": 1.0}
    if "prompt_ids" not in shown:
        del row["response_ids"]
    [kept] = read(tmp_path, row, other, rows_are=rows_are)
    assert "33" in tiny_tokenizer().decode(kept.prompt_ids)
    assert (rows_are.seen, rows_are.left_out) == (2, 1)


def none_for_odd_ones(completions: list[str], **_: object) -> list[float | None]:
    return [None if int(each) % 2 else 0.5 for each in completions]


@pytest.mark.parametrize(("ungraded", "rewards"), [("drop", [0.5, 1.0]), ("zero", [0.0, 0.5, 1.0])])
def test_lines_that_cannot_be_graded_are_left_out_and_counted(
    tmp_path: Path, ungraded: Literal["drop", "zero"], rewards: list[float]
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "a", "answer": "1"}))
    task = FileTask(name="file", path=str(problems), verifier=f"{__name__}:none_for_odd_ones")
    rows_are = RowReader(reader().chat, task, ungraded=ungraded)
    asked = {"prompt": "a", "answer": "1"}
    rows = [{**asked, "response": "3"}, {**asked, "response": "4"}, {"prompt": "a", "response": "5", "reward": 1.0}]
    assert [t.reward for t in read(tmp_path, *rows, rows_are=rows_are)] == rewards
    assert rows_are.counts() == ["1 of 3 could not be graded"]


def by_level(completions: list[str], level: list[int], **_: object) -> list[float]:
    return [float(each) for each in level]


def test_lines_are_graded_by_columns_beside_the_answer_or_in_an_entry(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "a", "answer": "1", "level": 3}))
    task = FileTask(name="file", path=str(problems), verifier=f"{__name__}:by_level")
    row = {"prompt": "a", "answer": "1", "response": "4"}
    rows_are = RowReader(reader().chat, task)
    read_ones = read(tmp_path, {**row, "level": 2}, {**row, "entry": {"level": 5}}, rows_are=rows_are)
    assert [t.reward for t in read_ones] == [2.0, 5.0]


def token_count(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    return [10 * len(ids) + len(text) for text, ids in zip(completions, completion_ids, strict=True)]


def test_lines_without_reward_are_graded_as_rollouts_are(tmp_path: Path) -> None:
    """With token ids, and the text as the model would have said it: without its end."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "a", "answer": "1"}))
    task = FileTask(name="file", path=str(problems), verifier=f"{__name__}:token_count")
    asked = {"prompt": "a", "answer": "1"}
    ids = {"prompt_ids": [1, 9], "response_ids": [10, 11, 12, 0]}
    rows = [{**asked, "response": "4"}, {**asked, "response": "4<|end|>"}, {**asked, **ids}]
    read_ones = read(tmp_path, *rows, rows_are=RowReader(reader().chat, task))
    assert [t.reward for t in read_ones] == [21.0, 21.0, 43.0]


class Looking(Task):
    """A user's own, with a bug."""

    def problem(self, index: int, seed: int) -> Problem:
        return Problem("a", "1")

    def heldout(self, count: int) -> list[Problem]:
        return []

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade({"4": 1.0}[response], correct=True) for response in responses]


def test_what_a_users_own_task_raises_is_said_to_be_its_own(tmp_path: Path) -> None:
    rows_are = RowReader(reader().chat, Looking(name="looking"))
    with pytest.raises(UserCodeError, match=r"task looking: grade raised KeyError\('5'\) on the response '5' to 'a'"):
        read(tmp_path, {"prompt": "a", "answer": "1", "response": "5"}, rows_are=rows_are)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"data.jsonl:2: "),
        ([1], r"data.jsonl:2: got list; wants an object"),
        ({"prompt": "1", "response": "2"}, r":2: reward: got None; wants a number"),
        ({"prompt": "1", "response": "2", "reward": True}, r":2: reward: got True; wants a number"),
        ({"prompt": "1", "response": "2", "reward": float("nan")}, r":2: reward: got nan; wants a finite number"),
        ({"prompt": "1", "response": "2", "reward": 10**400}, r":2: int too large"),
        ("[" * 100_000, r":2: maximum recursion depth"),
        ({"prompt": "1", "response": 2, "reward": 1}, r":2: response: got 2; wants text"),
        ({"response": "2", "reward": 1}, r":2: neither prompt \(text\) nor messages"),
        ({"messages": [{"role": "user"}], "response": "2", "reward": 1}, r":2: messages holds \{'role': 'user'\}"),
        ({"prompt": "1", "tools": "f", "response": "2", "reward": 1}, r":2: tools holds 'f', and tools are a list"),
        (
            {"prompt": "1", "response": "2", "reward": 1, "truncated": "no"},
            r":2: truncated: got 'no'; wants true or false",
        ),
        (
            {"prompt_ids": [1], "response_ids": [101 + PADDING], "reward": 1},
            r":2: response_ids holds token id 104, and the model has embeddings for 0 to 103",
        ),
        ({"prompt_ids": [1], "response_ids": [True], "reward": 1}, r":2: response_ids: got \[True\]; wants a list of"),
        ({"prompt_ids": [1], "response_ids": [5, 6], "reward": 1, "action_mask": [1]}, r":2: action_mask: got \[1\]"),
        (
            {"prompt_ids": [1], "response_ids": [5], "reward": 1, "action_mask": [[1]]},
            r":2: action_mask: got \[\[1\]\]",
        ),
        ({"prompt_ids": [1], "response_ids": [5], "reward": 1, "action_mask": [False]}, r":2: action_mask: all false"),
        (
            {"prompt": "1", "response": "5", "reward": 1, "action_mask": [True]},
            r"action_mask: given without response_ids",
        ),
        ({"prompt_ids": [], "response_ids": [1], "reward": 1}, r":2: Trajectory.prompt_ids is empty"),
        (
            {"prompt_ids": [1], "response_ids": [5, 6], "reward": 1, "response_logprobs": [-1.0]},
            r":2: response_logprobs: got \[-1.0\]; wants one for each of 2 response_ids",
        ),
        (
            {"prompt_ids": [1], "response_ids": [5], "reward": 1, "response_logprobs": [0.4]},
            r":2: response_logprobs: got 0.4; wants a finite number, 0 or less",
        ),
        (
            {"prompt_ids": [1], "response_ids": [5], "reward": 1, "response_logprobs": [None]},
            r":2: response_logprobs: got None; wants a finite number, 0 or less",
        ),
        (
            {"prompt": "1", "response": "5", "reward": 1, "response_logprobs": [-1.0]},
            r"response_logprobs: given without response_ids",
        ),
        ({"prompt": "1", "response": "", "reward": 1, "truncated": True}, r":2: response: empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {"prompt": "1", "response": "2", "reward": 1}, row)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_trajectories(tmp_path / "none.jsonl", reader())
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


def test_what_waited_in_a_checkpoint_of_an_earlier_version_can_be_saved_again(tmp_path: Path) -> None:
    def supply() -> Supply:
        trajectories = [Trajectory([1, i], [2, 3], 1.0, group=i) for i in range(8)]
        return Supply(FileSource(trajectories, RolloutConfig(prompts=4, samples=1, updates=4), seed=0), updates=4)

    phases = Phases(torch.device("cpu"))
    before, after = supply(), supply()
    before.collect(1, phases)
    save_collected(tmp_path / WAITING, before.waiting)
    after.restore(tmp_path)
    assert [c.trajectories for c in after.waiting] == [c.trajectories for c in before.waiting]
    (tmp_path / "again").mkdir()
    after.save(tmp_path / "again")
