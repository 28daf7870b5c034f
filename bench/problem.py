"""The problem of the head's benchmark: the TBRM loss of trajectories of 256 tokens and its gradients, from the hidden states
on.

T tokens, V vocabulary entries, D hidden width (896, Qwen2.5-0.5B's, unless another is given), N trajectories.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from bench.shapes import DEVICE
from tbrm_kernels import linear_token_stats, trajectory_residual

D, LENGTH, BETA = 896, 256, 0.002


class Problem:
    def __init__(self, vocab: int, tokens: int, dtype: torch.dtype, width: int = D) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(vocab, width, generator=generator).div_(width**0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, (tokens,), generator=generator)
        count = max(1, tokens // LENGTH)
        self.cu_seqlens = torch.arange(0, tokens + 1, tokens // count, dtype=torch.int32)
        self.rewards = torch.arange(count).remainder(2).float()
        self.ref_logprob_sums = torch.linspace(-10.0, -9.0, count) * (tokens / count)

    def loss(self, logprobs: Tensor, lse: Tensor) -> Tensor:
        """The TBRM loss of per-token log-probs and lse, [T] each."""
        refs, rewards = self.ref_logprob_sums.to(logprobs), self.rewards.to(logprobs)
        return trajectory_residual(logprobs, lse, self.cu_seqlens, refs, rewards, BETA).square().mean()

    def loss_of_logprobs(self, logprobs: Tensor) -> Tensor:
        """For a library that gives log-probs and no lse: plain torch computes V(s_1), for the N tokens that need it."""
        first = self.cu_seqlens[:-1].long()
        values = (self.hidden[first] @ self.weight.T).float().logsumexp(-1)
        return self.loss(logprobs.float(), torch.zeros(len(logprobs)).index_put((first,), values))

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        gradients = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        assert gradients[0] is not None and gradients[1] is not None
        return gradients[0], gradients[1]

    def errors(self, loss: Tensor) -> dict[str, float]:
        """Of a way's loss and of the gradients that it has left, relative to float64; of gradients in the 2-norm."""
        found = self.take_gradients()
        exact_loss, exact_gradients = self.exact()
        errors = {"error_loss": float((loss.double() - exact_loss).abs() / exact_loss)}
        for name, ours, exact in zip(("hidden", "weight"), found, exact_gradients, strict=True):
            scale = exact.norm()
            errors[f"error_{name}"] = float(exact.sub_(ours).norm() / scale)  # in place: it may be of 2 GiB
        return errors

    def exact(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Loss and gradients in float64, through the torch backend, which the tests hold to the definition (and gradcheck to
        its gradients)."""
        exact = copy.copy(self)
        exact.hidden = self.hidden.detach().double().requires_grad_()
        exact.weight = self.weight.detach().double().requires_grad_()
        stats = linear_token_stats(exact.hidden, exact.weight, self.targets)
        loss = exact.loss(stats.logprobs, stats.lse)
        loss.backward()
        return loss.detach(), exact.take_gradients()
