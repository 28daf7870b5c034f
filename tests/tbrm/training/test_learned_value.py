"""The value that is learnt beside the policy: against numpy's least squares, from nothing, by age, and resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tbrm.training.learned_value import HALF_LIFE, RIDGE, WINDOW, LearnedValue

STEPS = (3, 4, 6)


def step_of(seed: int, count: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, targets, weights and groups [count]."""
    torch.manual_seed(seed)
    states = 3 + torch.randn(count, width)  # far from 0, as a model's are
    return states, states[:, 0] + 0.1 * torch.randn(count), torch.rand(count), torch.arange(count) + 1000 * seed


def by_numpy(seen: list[tuple[int, Tensor, Tensor, Tensor, Tensor]], asked: Tensor) -> np.ndarray:
    """The same least squares as one system of rows: a weighted one for each trajectory, one for each dimension's ridge."""
    states, targets, weights = (torch.cat([part[i] for part in seen]).double().numpy() for i in (1, 2, 3))
    ages = np.concatenate([np.full(len(part[2]), 0.5 ** ((seen[-1][0] - part[0]) / HALF_LIFE)) for part in seen])
    weights = ages * weights / (np.average(weights, weights=ages))
    centre = np.average(states, axis=0, weights=weights)
    square = np.average(((states - centre) ** 2).sum(1), weights=weights)
    roots = np.sqrt(weights)[:, None]
    width = states.shape[1]
    ridge = np.hstack([np.zeros((width, 1)), np.sqrt(RIDGE * square) * np.eye(width)])
    rows = np.vstack([roots * np.hstack([np.ones((len(states), 1)), states - centre]), ridge])
    wanted = np.concatenate([roots[:, 0] * targets, np.zeros(width)])
    found, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    return found[0] + (asked.double().numpy() - centre) @ found[1:]


@pytest.mark.parametrize("width", [5, 200], ids=["more trajectories than dimensions", "fewer"])
def test_it_is_the_weighted_least_squares_of_numpy(width: int) -> None:
    value, seen = LearnedValue(), []
    for step in STEPS:
        part = step_of(step, 20, width)
        seen.append((step, *part))
        value.learn(step, *part, version=0)
    asked = 3 + torch.randn(7, width)
    ours = value(asked, version=0)
    wanted = by_numpy(seen, asked)
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-5)
    assert wanted.std() > 0.01  # it tells prompts from each other


def test_it_tells_apart_what_is_hopeless_from_what_is_not() -> None:
    torch.manual_seed(0)
    value = LearnedValue()
    for step in range(1, 9):
        kinds = torch.randint(2, (32,)).float()
        states = torch.randn(32, 64) + 4 * kinds[:, None] * torch.arange(64).lt(8)
        value.learn(step, states, kinds * torch.rand(32).lt(0.5), torch.ones(32), torch.arange(32) + 32 * step, 0)
    hopeless, fair = value(torch.randn(50, 64), 0), value(torch.randn(50, 64) + 4.0 * torch.arange(64).lt(8), 0)
    assert hopeless.mean().abs() < 0.08 and (fair.mean() - 0.5).abs() < 0.1


def test_the_newest_count_most_and_the_oldest_go() -> None:
    value = LearnedValue()
    states = torch.zeros(WINDOW, 2)  # prompts that are all alike have their mean
    groups = torch.arange(WINDOW)
    value.learn(1, states, torch.zeros(WINDOW), torch.ones(WINDOW), groups, version=0)
    value.learn(1 + HALF_LIFE, states[:600], torch.ones(600), torch.ones(600), WINDOW + groups[:600], version=0)
    left = (WINDOW - 600) / 2
    assert value(states[:1], 0).item() == pytest.approx(600 / (600 + left), abs=1e-6)


def test_a_group_that_comes_again_counts_once_as_it_is_now() -> None:
    value, other = LearnedValue(), LearnedValue()
    (states, targets, weights, groups), new = step_of(1, 8, 20), step_of(2, 4, 20)
    for step in range(1, 6):
        value.learn(step, states, targets + step, weights, groups, version=0)
    other.learn(5, states, targets + 5, weights, groups, version=0)
    for each in (value, other):
        each.learn(6, *new, version=0)
    assert torch.equal(value(states, 0), other(states, 0))


def test_it_begins_with_nothing_and_anew_with_another_reference() -> None:
    value, (states, *found) = LearnedValue(), step_of(0, 6, 3)
    assert value(states, version=0) is None
    value.learn(1, states, *found, version=0)
    assert value(states, version=0) is not None and value(states, version=1) is None
    value.learn(2, states, *found, version=1)
    assert value(states, version=1) is not None


@pytest.mark.parametrize("weights", [torch.zeros(4), torch.tensor([1.0, torch.nan, -1e-7, 1.0])])
def test_what_is_sure_or_not_finite_leaves_a_value(weights: Tensor) -> None:
    value = LearnedValue()
    value.learn(1, torch.randn(4, 3), torch.tensor([1.0, 0.0, 1.0, 1.0]), weights, torch.arange(4), version=0)
    assert value(torch.randn(2, 3), version=0).isfinite().all()


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    value, other = LearnedValue(), LearnedValue()
    for step in STEPS:
        value.learn(step, *step_of(step, 20, 40), version=2)
    value.save(tmp_path / "value")
    other.restore(tmp_path / "value")
    other.restore(tmp_path / "not there")  # a checkpoint of the first step that was skipped
    for each in (value, other):
        each.learn(7, *step_of(7, 20, 40), version=2)
    asked = torch.randn(5, 40)
    assert torch.equal(value(asked, 2), other(asked, 2))
