from __future__ import annotations

import hashlib
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tbrm.policy.packed_attention import Tree
from tbrm.trajectories import packing as data
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.deal import deal
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory

PROMPTS = ([5], [5, 6], [7, 8, 9])


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    """Some begin with the same system prompt, and some of these have the same prompt."""
    system = draw(st.sampled_from([[], [3, 4]]))
    prompt = st.sampled_from(PROMPTS)
    response = st.lists(st.integers(10, 20), max_size=6)
    mask = st.none() | st.lists(st.booleans(), min_size=6, max_size=6)
    return [
        Trajectory([*system, *p], r, reward=1.0, action_mask=m[: len(r)] if m else None)
        for p, r, m in draw(st.lists(st.tuples(prompt, response, mask), max_size=8))
    ]


def visible(batch: data.PackedBatch, row: int) -> list[int]:
    """The token ids that a packed token sees, in order of position."""
    trees = Tree.of(batch.inputs.segments, torch.device("cpu"))
    segment, allowed = next(tree for tree in trees if tree.segment.start <= row < tree.segment.stop)
    keys = torch.cat([torch.arange(segment.prefix), torch.arange(segment.start, segment.stop)])
    rows = keys[keys <= row if allowed is None else allowed[row - segment.start]]
    return batch.inputs.input_ids[rows[batch.inputs.position_ids[rows].argsort()]].tolist()


@given(trajectories())
def test_every_action_is_predicted_from_its_own_prefix(items: list[Trajectory]) -> None:
    batch = pack(items)
    bounds = batch.cu_seqlens.tolist()
    assert len(bounds) == len(items) + 1
    for item, start, end in zip(items, bounds, bounds[1:], strict=False):
        assert end - start == len(item.actions)
        for action, k in zip(item.actions, range(start, end), strict=True):
            assert batch.targets[k] == item.response_ids[action]
            row = int(batch.inputs.action_rows[k])
            assert visible(batch, row) == item.prompt_ids + item.response_ids[:action]
            assert batch.inputs.position_ids[row] == len(item.prompt_ids) + action - 1


@given(trajectories(), st.integers(1, 40))
def test_micro_batches_hold_each_trajectory_once_within_the_budget(items: list[Trajectory], budget: int) -> None:
    batches = deal(items, budget, 1)[0]
    assert sorted(i for members in batches for i in members) == list(range(len(items)))
    for members in batches:
        tokens = len(pack([items[i] for i in members]).inputs.input_ids)
        assert tokens <= budget or len(members) == 1


@given(trajectories(), st.integers(1, 40), st.integers(1, 5))
def test_processes_are_dealt_every_trajectory_once_and_equally_many_micro_batches(
    items: list[Trajectory], budget: int, processes: int
) -> None:
    dealt = deal(items, budget, processes)
    assert len(dealt) == processes
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(i for batches in dealt for members in batches for i in members) == list(range(len(items)))
    for members in (members for batches in dealt for members in batches):
        assert len(pack([items[i] for i in members]).inputs.input_ids) <= budget or len(members) == 1


def test_processes_are_dealt_equally_many_tokens() -> None:
    lengths = [200, 10, 10, 180, 30, 30, 30, 30, 30, 30, 40, 150, 40, 10, 150, 30]
    items = [Trajectory([5 + i], [9] * (length - 1), 1.0) for i, length in enumerate(lengths)]
    shares = [sum(lengths[i] for members in batches for i in members) for batches in deal(items, 10_000, 4)]
    assert sum(shares) == sum(lengths)
    assert max(shares) <= 1.2 * sum(lengths) / 4


def responses(count: int, samples: int, seed: int = 0) -> list[Trajectory]:
    """Problems that begin alike, most with so many responses; some responses are masked, or too long to share anything."""
    rng = random.Random(seed)
    items = []
    for problem in range(count):
        prompt = [3, 4, *(rng.randrange(5, 9) for _ in range(rng.randrange(1, 9)))]
        for _ in range(samples):
            length = rng.choice([rng.randrange(0, 30), rng.randrange(30, 90)])
            mask = [rng.random() < 0.5 for _ in range(length)] if rng.random() < 0.25 else None
            items.append(Trajectory(prompt, [9] * length, 1.0, group=problem, action_mask=mask))
    rng.shuffle(items)
    return items


def test_the_deal_is_what_it_was_when_each_budget_was_tried_on_the_trajectories_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "MAX_SHARED_SEGMENT", 100)
    dealt = [deal(responses(12, 3, seed), 120, processes) for seed in range(20) for processes in (1, 2, 3, 7)]
    assert dealt[2] == [
        [[0, 20], [30], [1], [7], [27, 2, 4, 25], [3]],
        [[9], [24, 5, 12, 34], [6, 22], [32, 8], [15, 29, 10], []],
        [[19], [33, 11], [14, 23, 13], [17, 31, 16], [26, 35, 18], [21, 28]],
    ]
    assert hashlib.sha256(repr(dealt).encode()).hexdigest()[:16] == "0ab8b9b0ed426f3e"  # of all 80, as of 12fa3bf


def test_the_tokens_of_a_trajectory_are_looked_at_once_a_deal_whatever_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = []
    counted = data._fed_tokens
    monkeypatch.setattr(data, "_fed_tokens", lambda trajectory: looked_at.append(trajectory) or counted(trajectory))
    items = responses(40, 4)
    for processes in (1, 8, 64):
        looked_at.clear()
        deal(items, 200, processes)
        assert len(looked_at) == len(items)


def test_a_shared_prompt_is_packed_once() -> None:
    items = [Trajectory([5, 6, 7], [10, 11, 2], 0.0), Trajectory([5, 6, 7], [12, 2], 0.0)]
    # The last token of a response predicts nothing and is not fed.
    assert pack(items).inputs.input_ids.tolist() == [5, 6, 7, 10, 11, 12]
    assert len(pack([items[0], Trajectory([9], [2], 0.0), items[1]]).inputs.segments) == 3


def test_a_shared_beginning_is_packed_once_and_counted_once() -> None:
    items = [Trajectory([5, 6, 7], [10, 11, 2], 0.0), Trajectory([5, 6, 8, 9], [12, 2], 0.0)]
    assert pack(items).inputs.input_ids.tolist() == [5, 6, 7, 10, 11, 8, 9, 12]
    assert deal(items, 8, 1)[0] == [[0, 1]]
    assert deal(items, 7, 1)[0] == [[0], [1]]


def test_a_prompt_that_is_the_beginning_of_another_keeps_its_last_token() -> None:
    """Its hidden state predicts the first action."""
    batch = pack([Trajectory([5, 6], [10], 0.0), Trajectory([5, 6, 7], [12], 0.0)])
    assert batch.inputs.input_ids.tolist() == [5, 6, 6, 7]


def test_equal_prompts_far_apart_meet_in_one_micro_batch() -> None:
    items = [Trajectory([5], [10], 0.0), Trajectory([6], [10], 0.0), Trajectory([5], [11], 0.0)]
    assert deal(items, 100, 1)[0] == [[0, 2, 1]]


def test_long_responses_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_SHARED_SEGMENT", 6)
    items = [Trajectory([5, 6], [10, 11, 12], 0.0)] * 3
    segments = pack(items).inputs.segments
    assert [(s.stop - s.start, s.prefix) for s in segments] == [(1, 0), (5, 1), (3, 1)]
    items[2] = Trajectory([5, 6], [10] * 6, 0.0)  # too long to share even the beginning
    assert [(s.stop - s.start, s.prefix) for s in pack(items).inputs.segments] == [(6, 0), (7, 0)]


def test_some_trajectories_of_a_batch_keep_their_own_columns_and_scores() -> None:
    items = [Trajectory([5], [10, 11], 1.0), Trajectory([5], [], 0.0), Trajectory([6], [12, 13, 14], 0.0)]
    columns = {"rewards": torch.tensor([1.0, 2.0, 3.0]), "baseline": torch.tensor([4.0, 5.0, 6.0])}
    batch = ScoredBatch(
        **vars(pack(items)),
        ref_logprobs=torch.arange(5.0),
        ref_values=torch.arange(3.0),
        behaviour_logprobs=torch.arange(5.0, 10.0),
        columns=columns,
    )
    part = batch.scores_of(1, torch.tensor([0, 0, 3], dtype=torch.int32))
    assert {name: column.tolist() for name, column in part.columns.items()} == {"rewards": [2, 3], "baseline": [5, 6]}
    assert part.rewards.tolist() == [2, 3]
    assert (part.bounds, part.targets.tolist()) == ((0, 0, 3), [12, 13, 14])
    assert (part.ref_logprobs.tolist(), part.ref_values.tolist()) == ([2, 3, 4], [1, 2])
    assert part.behaviour_logprobs.tolist() == [7, 8, 9]


def test_rewards_that_an_objective_does_not_keep_are_asked_for() -> None:
    columns = {"baseline": torch.zeros(1)}
    batch = ScoredBatch(
        **vars(pack([Trajectory([5], [10], 1.0)])),
        ref_logprobs=torch.zeros(1),
        ref_values=torch.zeros(1),
        behaviour_logprobs=torch.zeros(1),
        columns=columns,
    )
    with pytest.raises(ValueError, match=r"`columns` gave \['baseline'\]: have it give 'rewards', too"):
        _ = batch.rewards


def test_impossible_trajectories_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        Trajectory([], [1], 0.0)
    with pytest.raises(ValueError, match="action_mask has 1 entries for 2"):
        Trajectory([1], [1, 2], 0.0, action_mask=[True])
    with pytest.raises(ValueError, match=r"behaviour_logprobs is \[2\] for 1 actions"):
        Trajectory([1], [1, 2], 0.0, action_mask=[True, False], behaviour_logprobs=torch.zeros(2))
