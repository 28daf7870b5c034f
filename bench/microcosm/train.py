"""Training in all worlds at once, under conditions that differ in where the data come from."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.microcosm.net import Adam, Pass
from bench.microcosm.step import Learner, Rollout, statistics
from bench.microcosm.world import LAYOUT, A, Exact, H, Measures, Worlds, states, write
from tbrm.objectives import Objective


@dataclass(frozen=True)
class Regime:
    """Where a step's data come from."""

    responses: int = 1
    """To each prompt."""
    stale: int = 0
    """How many steps older than the policy the weights are that respond."""
    replay: int = 0
    """After each update on new responses another one on those of one of the last so many steps."""
    hopeless: bool = False
    """Whether half of the prompts are never rewarded."""


@dataclass(frozen=True)
class Size:
    """How long a run is."""

    steps: int = 600
    batch: int = 32
    """Responses a step."""
    points: int = 10
    """How often the policy is measured."""


def train(
    exact: Exact, objective: Objective, regime: Regime, rates: list[float], size: Size, seed: int
) -> list[list[Measures]]:
    """For each rate, what the policies of all worlds were like at each point. All rates, and all objectives that are given the
    same worlds and seed, get the same prompts and the same random numbers."""
    worlds, count = exact.worlds, len(exact.worlds)
    policies = worlds.reference.repeat(len(rates), 1)
    reference = policies.clone()
    adam = Adam(policies, torch.tensor(rates).repeat_interleave(count))
    learner = Learner(objective)
    generator, choice = torch.Generator().manual_seed(seed), random.Random(seed)
    past = deque([policies.clone()], maxlen=regime.stale + 1)
    buffer: deque[Rollout] = deque(maxlen=regime.replay)
    curves: list[list[Measures]] = [[] for _ in rates]

    for step in range(size.steps):
        scale = (1 + math.cos(math.pi * step / size.steps)) / 2
        rollout, run = respond(worlds, regime, past[0], reference, size.batch, generator)
        rollout = replace(rollout, number=step)
        if regime.stale:
            run = Pass(LAYOUT, rollout.features)
            run.run(policies)
        adam.step(run.backward(policies, learner.by_logits(run.outputs, rollout)), scale)
        if regime.replay:
            buffer.append(rollout)
            old = choice.choice(buffer)
            run = Pass(LAYOUT, old.features)
            adam.step(run.backward(policies, learner.by_logits(run.run(policies), old)), scale)
        past.append(policies.clone())
        if (step + 1) * size.points // size.steps > step * size.points // size.steps:
            for curve, part in zip(curves, policies.split(count), strict=True):
                curve.append(exact.measure(part))
    return curves


def respond(
    worlds: Worlds, regime: Regime, policies: Tensor, reference: Tensor, batch: int, generator: torch.Generator
) -> tuple[Rollout, Pass]:
    """Responses of `policies` [W, P] to new prompts, and the pass that drew them; W is a multiple of the number of worlds."""
    copies = len(policies) // len(worlds)
    prompts = worlds.prompts(batch // regime.responses, generator).repeat_interleave(regime.responses, 1)
    chance = torch.rand(len(worlds), H, batch, generator=generator).to(prompts).repeat(copies, 1, 1)
    found = states(prompts).repeat(copies, 1, 1, 1)  # [W, H, M, F]
    run = Pass(LAYOUT, found.flatten(1, 2))
    actions = torch.empty(chance.shape, dtype=torch.int64)
    for h in range(H):
        probs = run.run(policies, slice(h * batch, (h + 1) * batch)).softmax(1)
        actions[:, h] = (probs.cumsum(1) < chance[:, None, h]).sum(1).clamp_max(A - 1)
        write(found, h, actions[:, h])
    rewards = worlds.rewards(prompts, actions.view(copies, len(worlds), H, batch)).view(-1, batch)
    said = Pass(LAYOUT, run.features)
    said.run(reference)
    rollout = Rollout(
        run.features,
        actions,
        rewards,
        torch.arange(batch) // regime.responses,
        behaviour=statistics(run.outputs, actions),
        reference=statistics(said.outputs, actions),
        states=said.second[:, :batch],
    )
    return rollout, run
