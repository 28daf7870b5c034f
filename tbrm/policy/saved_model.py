"""The policy and its tokenizer in a checkpoint: a Hugging Face folder or, where there are adapters, one of peft's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tbrm.policy.hub_folder import save_config, save_tokenizer
from tbrm.policy.lora import WEIGHTS as ADAPTERS
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import saved_weights
from tbrm.policy.weights import detached, read_weights, whole
from tbrm.storage.kept import Kept


class SavedModel(Kept):
    def __init__(self, policy: PolicyModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self._adapters: dict[str, Tensor] = {}

    def tensors(self) -> Mapping[str, Tensor]:
        weights = detached(saved_weights(self.policy))
        if self.policy.adapters is None:
            return weights
        self._adapters = {name: whole(tensor) for name, tensor in weights.items()}
        return {}

    def save(self, folder: Path) -> Mapping[str, str]:
        save_config(self.policy.lm, folder)
        save_tokenizer(self.tokenizer, folder)
        if self.policy.adapters is not None:
            self.policy.adapters.save(folder, self._adapters)
        return {}

    def restore(self, folder: Path) -> None:
        read_weights(saved_weights(self.policy), folder / ADAPTERS if self.policy.adapters else folder)
