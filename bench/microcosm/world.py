"""Worlds whose best policy is known exactly: a prompt is a vector, a response three tokens of five, and one response is right.

A teacher says which: at each place the token that scores highest for the prompt. The reference was trained on noisy answers:
for half of the prompts mostly right ones, for the others mostly wrong ones. The best policy is pi_ref e^(R/beta), normalised
over all 125 responses; success, regret and distance from it are sums over them.

Letters: S worlds of a set, M responses, E held-out prompts, H tokens, A to choose from, L = A^H responses there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.microcosm.net import Adam, Layout, Pass

A, H, PROMPT, HIDDEN = 5, 3, 8, 48
L = A**H
LAYOUT = Layout(PROMPT + (H - 1) * A + H, HIDDEN, A)
LETTERS = torch.stack(
    [torch.arange(L) // A ** (H - 1 - h) % A for h in range(H)]
)  # [H, L]: the tokens of each response
HELDOUT = 48
PRETRAINING, PRETRAINING_PROMPTS = 400, 64


@dataclass(frozen=True)
class Measures:
    """[S] each, of a policy, as means over the held-out prompts."""

    success: Tensor
    """Probability of the right response."""
    regret: Tensor
    """What it is below the best value of E[R] - beta KL, over what the reference is."""
    variation: Tensor
    """Total variation from the best policy: 0 to 1."""
    kl: Tensor
    """From the reference, in nats."""


@dataclass(frozen=True)
class Worlds:
    """S of them; the same seed makes the same ones."""

    teacher: Tensor  # [S, H, A, PROMPT]
    reference: Tensor  # [S, P]
    heldout: Tensor  # [S, E, PROMPT]
    hopeless: bool = False
    """Whether half of the prompts are never rewarded."""

    @classmethod
    def make(cls, count: int, seed: int, dtype: torch.dtype = torch.float32) -> Worlds:
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(count, H, A, PROMPT, generator=generator, dtype=dtype)
        worlds = cls(teacher, LAYOUT.initial(count, generator, dtype), torch.empty(0))
        worlds._pretrain(generator)
        return replace(worlds, heldout=worlds.prompts(HELDOUT, generator))

    def __len__(self) -> int:
        return len(self.teacher)

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(len(self), count, PROMPT, generator=generator, dtype=self.teacher.dtype)

    def right(self, prompts: Tensor) -> Tensor:
        """[S, H, M]: the right response to each of the prompts [S, M, PROMPT]."""
        return torch.einsum("shap,smp->sham", self.teacher, prompts).argmax(2)

    def rewards(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """[..., S, M] of actions [..., S, H, M]."""
        right = (self.right(prompts) == actions).all(-2)
        return (right & (prompts[..., 1] > 0) if self.hopeless else right).to(prompts)

    def _pretrain(self, generator: torch.Generator) -> None:
        adam = Adam(self.reference, torch.full((len(self),), 3e-3))
        for _ in range(PRETRAINING):
            prompts = self.prompts(PRETRAINING_PROMPTS, generator)
            right = self.right(prompts)
            chance = torch.rand(right.shape, generator=generator)
            other = torch.randint(A, right.shape, generator=generator)
            easy = torch.where(chance < 0.6, right, other)
            hard = torch.where(chance < 0.3, right, torch.where(chance < 0.7, (right + 1) % A, other))
            actions = torch.where(prompts[:, None, :, 0] > 0, easy, hard)
            run = Pass(LAYOUT, features(prompts, actions))
            by_logits = run.run(self.reference).softmax(1)
            taken = actions.flatten(1)[:, None]
            by_logits.scatter_add_(1, taken, by_logits.new_full((), -1).expand(taken.shape))
            adam.step(run.backward(self.reference, by_logits / taken.shape[2]))

    def log_probs(self, policies: Tensor) -> Tensor:
        """[S, E, L], float64: of every response to every held-out prompt, under policies [S, P]."""
        count = self.heldout.shape[1]
        total = torch.zeros(len(self), count, 1, dtype=torch.float64)
        for h in range(H):
            prefixes = LETTERS[:, :: A ** (H - h)]  # [H, A^h], of which the first h tokens count
            prompts = self.heldout.repeat_interleave(A**h, 1)
            actions = prefixes.repeat(1, count).expand(len(self), -1, -1)
            logits = Pass(LAYOUT, features(prompts, actions, (h,))).run(policies)
            logs = logits.double().log_softmax(1).mT.reshape(*total.shape, A)
            total = (total[..., None] + logs).flatten(2)
        return total

    def all_rewards(self) -> Tensor:
        """[S, E, L], float64."""
        prompts = self.heldout.repeat_interleave(L, 1)
        actions = LETTERS.repeat(1, self.heldout.shape[1]).expand(len(self), -1, -1)
        return self.rewards(prompts, actions).view(len(self), -1, L).double()


class Exact:
    """The best policy of each of the worlds, and how far another one is from it."""

    def __init__(self, worlds: Worlds, beta: float) -> None:
        self.worlds, self.beta = worlds, beta
        self.rewards = worlds.all_rewards()
        self.reference = worlds.log_probs(worlds.reference)  # [S, E, L]
        tilted = self.reference + self.rewards / beta
        self.value = tilted.logsumexp(-1)  # [S, E]: V*(s_1)
        self.best = tilted - self.value[..., None]  # [S, E, L]: log of the best policy

    def measure(self, policies: Tensor) -> Measures:
        """Of policies [S, P]."""
        logs = self.worlds.log_probs(policies)
        probs = logs.exp()
        success, kl = (probs * self.rewards).sum(-1), (probs * (logs - self.reference)).sum(-1)
        best = self.beta * self.value
        lost = best - (success - self.beta * kl)
        of_reference = best - (self.reference.exp() * self.rewards).sum(-1)
        variation = (probs - self.best.exp()).abs().sum(-1) / 2
        return Measures(success.mean(1), lost.mean(1) / of_reference.mean(1), variation.mean(1), kl.mean(1))


def states(prompts: Tensor, places: Sequence[int] = range(H)) -> Tensor:
    """[S, places, M, F]: the features of these places of responses to prompts [S, M, PROMPT], no tokens written yet."""
    worlds, count, _ = prompts.shape
    found = prompts.new_zeros(worlds, len(places), count, LAYOUT.features)
    found[..., :PROMPT] = prompts[:, None]
    for i, place in enumerate(places):
        found[:, i, :, PROMPT + (H - 1) * A + place] = 1
    return found


def write(found: Tensor, h: int, tokens: Tensor, places: Sequence[int] = range(H)) -> None:
    """The tokens [S, M] of place h into the states after it."""
    for i, place in enumerate(places):
        if place > h:
            found[:, i].scatter_(-1, (PROMPT + h * A + tokens)[..., None], 1.0)


def features(prompts: Tensor, actions: Tensor, places: Sequence[int] = range(H)) -> Tensor:
    """[S, places * M, F], place after place, of responses actions [S, H, M] to prompts [S, M, PROMPT]."""
    found = states(prompts, places)
    for h in range(H):
        write(found, h, actions[:, h], places)
    return found.flatten(1, 2)
