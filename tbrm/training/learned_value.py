"""What a prompt is worth, learnt beside the policy: a linear function of its hidden state, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tbrm.storage.files import save_tensors
from tbrm.storage.kept import Kept

WINDOW = 1024
"""Trajectories that are fitted, the last ones."""
HALF_LIFE = 8
"""Steps after which one counts for half: what a prompt is worth rises as the policy learns."""
RIDGE = 16.0
"""How many trajectories it takes to believe half of what one direction of the states says."""

_FILE = "seen.safetensors"


class LearnedValue(Kept):
    """v(x) = m + u . x, in rewards, of the hidden state x [D] that the reference has of a prompt's last token.

    After each step m and u are those that minimise, over the last trajectories, sum w (y - v(x))^2 + RIDGE s^2 |u|^2: y is what
    would have made the residual zero, R - beta sum_h (log pi - log pi_ref), w what `optimal` weighs a response by, halved with
    age, and s^2 the mean square of x about its mean. So there is no rate to choose, states that tell nothing cost nothing, and
    all processes, each of which does the same, have the same. The reference's states do not move while the policy learns, or
    what was seen before would say nothing of them; when it is reset, all begins anew.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}
        """`states` [K, D], `targets`, `weights`, `groups`, `steps` and the reference's `versions` of those that are fitted."""
        self._centre = self._slope = torch.zeros(0)
        self._mean: Tensor | None = None

    def __call__(self, states: Tensor, version: int) -> Tensor | None:
        """[N] float32 of [N, D], under a reference of this version; None where nothing of it was seen yet."""
        self._forget_others(version)
        if self._mean is None:
            return None
        return (self._mean + (states.double() - self._centre) @ self._slope).float()

    def learn(self, step: int, states: Tensor, targets: Tensor, weights: Tensor, groups: Tensor, version: int) -> None:
        """From what a step's trajectories came to, [N] each and [N, D], of which some may not be finite. A group that comes
        again, from a file or of replay, has its latest say alone: seen often enough, it would be its own value."""
        self._forget_others(version)
        fine = targets.isfinite() & weights.isfinite()
        new = {
            "states": states[fine].float(),
            "targets": targets[fine].float(),
            "weights": weights[fine].float().clamp(min=0),
            "groups": groups[fine],
            "steps": torch.full((int(fine.sum()),), step),
            "versions": torch.full((int(fine.sum()),), version),
        }
        old = self._seen or {name: column[:0] for name, column in new.items()}
        others = ~torch.isin(old["groups"], new["groups"])
        self._seen = {name: torch.cat([old[name][others], column])[-WINDOW:] for name, column in new.items()}
        self._fit()

    def _forget_others(self, version: int) -> None:
        if self._seen and (self._seen["versions"] != version).any():
            self._seen, self._mean = {}, None

    def _fit(self) -> None:
        """Through the K x K products of states, as there may be more dimensions than trajectories."""
        if not self._seen or not len(self._seen["steps"]):
            return
        states, targets = self._seen["states"].double(), self._seen["targets"].double()
        weights = decayed(self._seen["weights"].double(), self._seen["steps"])
        total = weights.sum()
        self._mean, self._centre = weights @ targets / total, weights @ states / total
        about = states - self._centre
        square = weights @ about.square().sum(1) / total
        roots = weights.sqrt()
        # Of (G + RIDGE s^2 I) a = sqrt(w) (y - m), with G of sqrt(w) x; u = x^T sqrt(w) a.
        rooted = roots[:, None] * about
        kernel = rooted @ rooted.T
        kernel.diagonal().add_(RIDGE * square.clamp(min=1e-30))
        solved = torch.cholesky_solve((roots * (targets - self._mean))[:, None], torch.linalg.cholesky(kernel))
        self._slope = (rooted.T @ solved)[:, 0]

    def save(self, folder: Path) -> Mapping[str, str]:
        if self._seen:
            folder.mkdir(exist_ok=True)
            save_tensors(self._seen, folder / _FILE)
        return {}

    def restore(self, folder: Path) -> None:
        if folder.exists():
            self._seen = load_file(folder / _FILE)
            self._fit()


def decayed(weights: Tensor, steps: Tensor) -> Tensor:
    """[K]: as they count by now, the newest step's 1 on average; by age alone where all are sure of every token."""
    ages = 0.5 ** ((steps.max() - steps).double() / HALF_LIFE)
    mean = (ages * weights).sum() / ages.sum()
    return ages * (weights / mean if mean > 0 else 1)
