"""The microcosm: its best policy by brute enumeration, its gradients by autograd from full logits."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.microcosm import study, world
from bench.microcosm.learned import LearnedValues
from bench.microcosm.net import Pass
from bench.microcosm.step import ExactStats, Learner, Rollout, packed
from bench.microcosm.study import Plan, entries, run, save, saved
from bench.microcosm.tables import publish
from bench.microcosm.train import Regime, Size, respond, train
from bench.microcosm.world import LAYOUT, A, Exact, H, Worlds, features
from tbrm.objectives.tbrm import Tbrm
from tbrm.training.learned_value import LearnedValue

BETA = 0.1


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(world, "PRETRAINING", 30)
        return replace(Worlds.make(2, seed=3, dtype=torch.float64), hopeless=True)


def moved(policies: Tensor) -> Tensor:
    return policies + 0.1 * torch.randn(
        policies.shape, generator=torch.Generator().manual_seed(5), dtype=policies.dtype
    )


def logits_of(flat: Tensor, rows: Tensor) -> Tensor:
    """[R, A] of one network, from its definition; flat [P], rows [R, F]."""
    w1, b1, w2, b2, w3, b3 = (layer[0] for layer in LAYOUT.of(flat[None]))
    return torch.tanh(torch.tanh(rows @ w1 + b1) @ w2 + b2) @ w3.mT + b3[:, 0]


def log_prob(flat: Tensor, prompt: Tensor, tokens: tuple[int, ...], h: int) -> Tensor:
    """log pi of token h, given those before it."""
    row = torch.zeros(LAYOUT.features, dtype=torch.float64)
    row[:8] = prompt
    for j in range(h):
        row[8 + j * A + tokens[j]] = 1
    row[8 + (H - 1) * A + h] = 1
    return logits_of(flat, row[None])[0].log_softmax(-1)[tokens[h]]


def test_the_best_policy_and_the_regret_are_those_of_a_brute_enumeration(worlds: Worlds) -> None:
    exact, policies = Exact(worlds, BETA), moved(worlds.reference)
    number, few = 1, 4  # of the world; prompts of it
    lost, of_reference, success, variation, kls = [], [], [], [], []
    for e in range(few):
        prompt = worlds.heldout[number, e]
        scores = worlds.teacher[number] @ prompt
        right = tuple(int(scores[h].argmax()) for h in range(H)) if prompt[1] > 0 else None
        logs: dict[str, dict[tuple[int, ...], Tensor]] = {"pi": {}, "ref": {}}
        for name, flat in (("pi", policies[number]), ("ref", worlds.reference[number])):
            for tokens in product(range(A), repeat=H):
                logs[name][tokens] = sum((log_prob(flat, prompt, tokens, h) for h in range(H)), torch.zeros(()))

        def value(prefix: tuple[int, ...], prompt: Tensor = prompt, right: tuple[int, ...] | None = right) -> float:
            """Of the soft Bellman equation, from the last token backwards."""
            if len(prefix) == H:
                return (prefix == right) / BETA
            total = 0.0
            for token in range(A):
                tokens = (*prefix, token, *[0] * (H - len(prefix) - 1))
                chance = float(log_prob(worlds.reference[number], prompt, tokens, len(prefix)).exp())
                total += chance * math.exp(value((*prefix, token)))
            return math.log(total)

        best = value(())
        assert math.isclose(best, exact.value[number, e], rel_tol=1e-9)
        pi = {tokens: float(log.exp()) for tokens, log in logs["pi"].items()}
        star = {t: float(log.exp()) * math.exp((t == right) / BETA - best) for t, log in logs["ref"].items()}
        assert math.isclose(sum(star.values()), 1, rel_tol=1e-9)
        success.append(sum(p * (tokens == right) for tokens, p in pi.items()))
        kls.append(sum(p * float(logs["pi"][tokens] - logs["ref"][tokens]) for tokens, p in pi.items()))
        lost.append(BETA * best - success[-1] + BETA * kls[-1])
        of_reference.append(BETA * best - sum(float(x.exp()) * (t == right) for t, x in logs["ref"].items()))
        variation.append(sum(abs(p - star[tokens]) for tokens, p in pi.items()) / 2)
    part = Exact(replace(worlds, heldout=worlds.heldout[:, :few]), BETA).measure(policies)
    found = (part.success, part.regret, part.variation, part.kl)
    wanted = (sum(success) / few, sum(lost) / sum(of_reference), sum(variation) / few, sum(kls) / few)
    for values, number_wanted in zip(found, wanted, strict=True):
        assert math.isclose(values[number], number_wanted, rel_tol=1e-9)
    assert min(lost) > 0, "nothing is better than the best"
    assert exact.measure(worlds.reference).regret.tolist() == pytest.approx([1, 1])


def drawn(worlds: Worlds, policies: Tensor, responses: int) -> tuple[Rollout, Pass]:
    generator = torch.Generator().manual_seed(7)
    copies = len(policies) // len(worlds)
    return respond(worlds, Regime(responses), policies, worlds.reference.repeat(copies, 1), 8, generator)


def test_the_gradient_of_tbrm_is_that_of_autograd_from_full_logits(worlds: Worlds) -> None:
    policies = moved(worlds.reference)
    rollout, run = drawn(worlds, policies, 1)
    rollout = replace(rollout, rewards=torch.rand(rollout.rewards.shape, dtype=torch.float64))
    found = run.backward(policies, Learner(Tbrm(beta=BETA)).by_logits(run.outputs, rollout))

    flat = policies.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for number in range(len(worlds)):
        both = []
        for weights in (flat[number], worlds.reference[number]):
            logits = logits_of(weights, rollout.features[number]).view(H, -1, A)
            logs = logits.log_softmax(-1).gather(-1, rollout.actions[number][..., None])[..., 0]
            both.append((logs.sum(0), logits[0].logsumexp(-1)))
        (log_pi, value), (log_ref, _) = both
        total = total + (value + log_pi - log_ref - rollout.rewards[number] / BETA).square().mean()
    (wanted,) = torch.autograd.grad(total, flat)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("responses", [1, 4])
@pytest.mark.parametrize("row", entries())
def test_an_objective_gives_each_of_many_worlds_what_it_gives_it_alone(
    worlds: Worlds, row: str, responses: int
) -> None:
    policies = moved(worlds.reference)
    rollout, run = drawn(worlds, policies, responses)
    chance = torch.Generator().manual_seed(1)
    rewards = torch.randint(2, rollout.rewards.shape, generator=chance).double()
    said = rollout.behaviour._replace(logprobs=rollout.behaviour.logprobs - 0.1)
    rollout = replace(rollout, rewards=rewards, behaviour=said)
    objective = entries()[row](BETA)
    together = Learner(objective).by_logits(run.outputs, rollout)
    assert together.abs().sum((1, 2)).min() > 0
    for number in range(len(worlds)):
        one = slice(number, number + 1)
        behaviour, reference = (
            ExactStats(*(values.view(len(worlds), -1)[number] for values in stats if values is not None))
            for stats in (rollout.behaviour, rollout.reference)
        )
        parts = (rollout.features[one], rollout.actions[one], rollout.rewards[one], rollout.groups)
        its = Rollout(*parts, behaviour, reference, rollout.states[one])
        alone = Learner(objective).by_logits(run.outputs[one], its)
        torch.testing.assert_close(together[one], alone, rtol=1e-9, atol=1e-12)


def test_the_token_baseline_is_the_mean_of_the_returns_weighted_by_energies(worlds: Worlds) -> None:
    policies = moved(worlds.reference)
    rollout, run = drawn(worlds, policies, 4)
    objective = entries()["otb"](BETA)
    batch = packed(rollout, {"rewards": rollout.rewards.flatten()})
    measured = objective.measure(rollout.behaviour, batch)  # type: ignore[arg-type]
    columns = Learner(objective).columns(batch.rewards, rollout, measured)
    probs = run.outputs.softmax(1)  # [W, A, H * M]
    number, first, place = 1, 4, 2  # the second prompt of the second world, its last token
    energies, returns = [], []
    for i in range(first, first + 4):
        rows = [h * 8 + i for h in range(H)]
        one_hot = torch.nn.functional.one_hot(rollout.actions[number, :, i], A)
        scores = [one_hot[h] - probs[number, :, row] for h, row in enumerate(rows)]
        energies.append(sum(float(score.square().sum()) for score in scores[: place + 1]))
        at = (number * 8 + i) * H + place
        ratio = rollout.behaviour.logprobs[at] - rollout.reference.logprobs[at]
        returns.append(float(rollout.rewards[number, i] - BETA * ratio))
    baseline = sum(e * g for e, g in zip(energies, returns, strict=True)) / sum(energies)
    found = columns[f"advantage_{place}"].view(-1, 8)[number, first : first + 4]
    assert found.tolist() == pytest.approx([g - baseline for g in returns])


def test_the_learned_values_are_the_products(worlds: Worlds) -> None:
    """Of two worlds, past the window, with a rollout that comes again."""
    chance = torch.Generator().manual_seed(2)
    ours, theirs = LearnedValues(), [LearnedValue() for _ in worlds.teacher]
    draw = lambda *shape: torch.rand(*shape, generator=chance)  # noqa: E731
    count = 256  # four of these are the window
    numbers = (0, 1, 2, 1, 3, 4)
    states = {number: draw(2, count, 5) for number in numbers}
    for step, number in enumerate(numbers, start=1):
        targets, weights = draw(2, count), draw(2, count)
        ours.learn(number, states[number], targets, weights)
        for world_number, value in enumerate(theirs):
            groups = torch.arange(count) + count * number
            value.learn(
                step, states[number][world_number], targets[world_number], weights[world_number], groups, version=0
            )
    asked = draw(2, 7, 5)
    wanted = torch.stack([value(x, 0) for value, x in zip(theirs, asked, strict=True)])
    torch.testing.assert_close(ours(asked, torch.zeros(2, 7), torch.ones(2, 7)), wanted, rtol=1e-5, atol=1e-6)


def test_shrinkage_leans_on_other_prompts_as_far_as_a_prompts_own_mean_is_noise() -> None:
    from tbrm.objectives import Step

    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([4, 4, 4, 7, 7, 7, 9, 9, 9])
    measured = {"log_ratio": torch.zeros(9, dtype=torch.float64)}
    step = Step(rewards=rewards, groups=groups, lengths=torch.full((9,), 3), measured=measured)
    found = entries()["james_stein"](BETA).columns(step)["advantage"]
    # Of the first prompt: the others have means 1/3 and 1/3, of variance (2/3) / (2 * 3) = 1/9 each, and no spread.
    share = (2 / 3) * (1 / 9) / (1 / 9)
    for i, left_out in ((0, 1 / 2), (1, 1)):
        assert float(found[i]) == pytest.approx(float(rewards[i]) - (1 - share) * left_out - share / 3)


def test_a_rate_of_zero_leaves_the_reference_and_another_one_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "PRETRAINING", 30)
    exact = Exact(Worlds.make(2, seed=3), BETA)
    for regime in (Regime(stale=2, replay=2), Regime(responses=4)):
        still, learning = train(exact, entries()["optimal"](BETA), regime, [0.0, 0.02], Size(20, 8, 2), seed=1)
        assert still[-1].regret.tolist() == pytest.approx([1, 1]) and still[-1].kl.abs().max() < 1e-9
        assert learning[-1].kl.min() > 1e-3


def test_finished_cells_are_not_run_again_and_the_page_shows_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(world, "PRETRAINING", 2)
    study._worlds.cache_clear()
    study.exact.cache_clear()
    plan = Plan(Size(4, 8, 2), seeds=2, tuning=2, rates=(0.01, 0.02))
    out, page = tmp_path / "out", tmp_path / "page.md"
    for row in ("tbrm", "optimal"):
        save(out, run(row, "fresh", plan))
    cell = saved(out, "tbrm", "fresh", plan)
    assert cell and cell["rate"] in plan.rates and len(cell["at_the_end"]["regret"]) == 2
    assert saved(out, "tbrm", "fresh", replace(plan, seeds=3)) is None, "made with other numbers"
    page.write_text("by hand\n<!-- microcosm -->\nold\n<!-- /microcosm -->\nby hand, too\n")
    publish(out, page, plan)
    text = page.read_text()
    assert text.startswith("by hand\n") and text.endswith("by hand, too\n") and "old" not in text
    assert "| `optimal` | " in text and "+0.000 ± 0.000, noise" in (out / "tables.md").read_text()
    study._worlds.cache_clear()
    study.exact.cache_clear()


def test_places_after_a_token_see_it_and_no_others() -> None:
    rows = features(torch.zeros(1, 1, 8), torch.tensor([[[2], [4], [1]]]))[0]
    assert [row.nonzero().flatten().tolist() for row in rows] == [[18], [8 + 2, 19], [8 + 2, 8 + 5 + 4, 20]]
