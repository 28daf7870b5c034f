"""Whether a model is one that we compute as it does itself."""

from __future__ import annotations

import torch

from tbrm.policy.model import PolicyModel
from tbrm.trajectories.trajectory import Trajectory


@torch.no_grad()
def check_architecture(policy: PolicyModel) -> None:
    """Compares a few packed tokens with the model's own logits. Raises ValueError where they differ.

    A model may do something to its logits or its attention that we do not know of; training it would go wrong in
    silence.
    """
    vocabulary = policy.lm.get_output_embeddings().weight.shape[0]
    ids = torch.arange(3, 15).mul(7919).remainder(vocabulary).tolist()
    # The first two share a prompt, and all three what it begins with.
    pairs = [(ids[:4], ids[4:9]), (ids[:4], ids[9:]), (ids[:2] + ids[6:8], ids[1:5])]
    trajectories = [Trajectory(prompt, response, reward=0.0) for prompt, response in pairs]
    packed = policy(policy.layout.pack(trajectories).to(policy.device)).logprobs.float()
    own = []
    for prompt, response in pairs:
        tokens = torch.tensor([*prompt, *response], device=policy.device)
        logits = policy.own_logits(tokens)[len(prompt) - 1 : -1].float()
        own.append((logits / policy.temperature).log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0])
    if policy.sharding is not None:
        policy.sharding.reshard(policy)
    gap = (packed - torch.cat(own)).abs().max().item()
    low_precision = torch.bfloat16 in (policy.precision, policy.lm.dtype)
    if not gap <= (0.5 if low_precision else 0.01) / min(1.0, policy.temperature):
        raise ValueError(
            f"model.name: {type(policy.lm).__name__} is not supported: {'padded' if policy.in_rows else 'packed'} token "
            f"log-probs differ from the model's own by {gap:.3g}. It does something tbrm does not know of (attention that "
            "looks ahead, a scaled hidden state, a head of another kind); use another model, or report it"
        )
