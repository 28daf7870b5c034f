"""The critic: a value of each state, from a backbone of its own and a linear head."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.parallel import World
from tbrm.policy.load import load_policy
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import weights_of
from tbrm.policy.weights import detached, read_weights
from tbrm.storage.kept import Kept
from tbrm.trajectories.batch import TrajectoryBatch
from tbrm.trajectories.layout import Rows


class Critic(nn.Module, Kept):
    """V(s) = w . hidden state + c, which begins at 0. The backbone is loaded, cut over processes and read as the policy is; its
    own head of logits, where it is not the embedding, is left as it is. Each process has all of w and c."""

    def __init__(self, config: Config, policy: PolicyModel, world: World) -> None:
        super().__init__()
        self.backbone, _ = load_policy(critic_config(config), world)
        ours, theirs = (len(model.lm.get_input_embeddings().weight) for model in (self.backbone, policy))
        if ours != theirs:
            raise ConfigError(
                f"critic.model: {config.critic.model!r} has {ours} embeddings and model.name {theirs}: both must read the same"
            )
        if isinstance(policy.layout, Rows):  # a micro-batch is laid out once for both
            self.backbone.take_rows(policy.layout.class_of)
        elif self.backbone.in_rows:
            raise ConfigError(
                f"critic.model: {config.critic.model!r} must be read in rows, and model.name is packed: set model.layout=rows"
            )
        width = self.backbone.lm.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=self.backbone.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._world = world
        logits = self.backbone.lm.get_output_embeddings().weight
        tied = logits is self.backbone.lm.get_input_embeddings().weight
        self.backbone_weights = {
            f"critic.{name}": weight
            for name, weight in weights_of(self.backbone).items()
            if weight.requires_grad and (tied or weight is not logits)
        }
        """Those of them that learn, by their names in a checkpoint. Asked now, while nothing is gathered."""
        self.head_weights = {f"critic.value.{name}": weight for name, weight in self.head.named_parameters()}

    def forward(self, batch: TrajectoryBatch) -> Tensor:
        """[A] float32: the value of the state of each action."""
        values: Tensor = self.head(self.backbone.states(batch).float())[:, 0]
        return values

    @torch.no_grad()
    def sum_head(self) -> None:
        """Sums the head's gradients over the processes; FSDP2 has summed the backbone's."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.head.parameters()]
        summed = self._world.gather_rows(torch.cat([gradient.flatten() for gradient in gradients])).sum(0)
        parts = summed.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(self.head.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def tensors(self) -> dict[str, Tensor]:
        return detached(self.backbone_weights | self.head_weights)

    def restore(self, folder: Path) -> None:
        read_weights(self.backbone_weights | self.head_weights, folder)


def critic_config(config: Config) -> Config:
    """The config with the critic's backbone for its model: `critic.model` or, if left out, what the policy begins as."""
    if config.critic.model is None:
        return config
    model = config.model.model_copy(update={"name": config.critic.model, "revision": None})
    return config.model_copy(update={"model": model})
