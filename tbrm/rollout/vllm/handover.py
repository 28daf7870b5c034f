"""The folder through which weights go to vLLM: a Hugging Face folder, which a server may also start from, and perhaps
adapters apart."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbrm.config.vllm import VllmConfig
from tbrm.policy.ends import Ends
from tbrm.policy.hub_folder import save_config, save_tokenizer
from tbrm.policy.lora import WEIGHTS
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import saved_weights, weights_of
from tbrm.policy.weights import whole, write_whole
from tbrm.rollout.vllm.connection import RefusedError, ServerError
from tbrm.rollout.vllm.server import Server

ADAPTERS = "adapters"
"""What they are called in the folder, and by the server."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM can make room for. The largest is also what the config allows."""
_UNSEEN = ("Repo id must be in the form", "Cannot find any model weights", "No adapter found")
"""What vLLM says of a folder that is not there: it takes the path for a model of the hub."""


def engine_dtype(config: VllmConfig, policy: PolicyModel) -> torch.dtype:
    dtype: torch.dtype = policy.precision if config.dtype == "auto" else getattr(torch, config.dtype)
    return dtype


class Handover:
    """Made on every process, as each has slices of the weights to give; only the main one, the `owner`, has the folder."""

    def __init__(
        self,
        policy: PolicyModel,
        dtype: torch.dtype,
        ends: Ends,
        parent: str | None = None,
        *,
        owner: bool = True,
        adapters_apart: bool = False,
    ) -> None:
        """The folder is made in `parent`; None: in shared memory, if that has room, else in the temporary folder.

        `adapters_apart`: the model's weights are written once, and LoRA adapters, in place of sums with them, each time.
        """
        self.policy = policy
        self.dtype = dtype
        self._apart = policy.adapters if adapters_apart else None
        self._has_model = False
        self.folder: Path | None = None
        if owner:
            size = sum(weight.numel() * self.dtype.itemsize for weight in self._named().values())
            # Not mkdtemp's, which only its owner may read: a server may run as somebody else.
            parent = parent or _roomy(2 * size) or tempfile.gettempdir()
            self.folder = (Path(parent) / f"tbrm-{secrets.token_hex(4)}").absolute()
            self.folder.mkdir()
            save_config(policy.lm, self.folder)
            if ends.strings:  # which vLLM looks for in the text
                save_tokenizer(ends.tokenizer, self.folder)
            if self._apart is not None:
                self._apart.config.save_pretrained(self.folder / ADAPTERS)

    def write(self) -> None:
        """Puts the policy's weights, as they are now, in the place of the last ones, in one move. All processes call it."""
        if self._apart is None or not self._has_model:
            self._replace("model.safetensors", self._named(), (weight for _, weight in self.weights()))
            self._has_model = True
        if self._apart is not None:
            adapters = saved_weights(self.policy)
            self._replace(f"{ADAPTERS}/{WEIGHTS}", adapters, (whole(weight.detach()) for weight in adapters.values()))

    def _replace(self, name: str, weights: Mapping[str, Tensor], gathered: Iterator[Tensor]) -> None:
        unfinished = self.folder / "unfinished" if self.folder else None
        write_whole(weights, gathered, unfinished, self.dtype)
        if self.folder is not None and unfinished is not None:
            unfinished.rename(self.folder / name)

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What vLLM must be sent, by its names in the transformers model: one weight at a time, whole, and with what an adapter
        adds to it, unless they go apart. All processes go through them together."""
        adapters = None if self._apart else self.policy.adapters
        added = saved_weights(self.policy) if adapters else {}
        for name, weight in self._named().items():
            gathered = whole(weight.detach())
            yield name, adapters.merged(name, gathered, added) if adapters else gathered

    def _named(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = dict(weights_of(self.policy))
        if "lm_head.weight" not in weights:
            # A tied head goes by the embedding's name, but on a CPU vLLM has a copy of it, which would stay as it was.
            lm = self.policy.lm
            embedding = next(name for name, module in lm.named_modules() if module is lm.get_input_embeddings())
            weights["lm_head.weight"] = weights[f"{embedding}.weight"]
        return weights


def read_from(folder: Path, server: Server) -> None:
    """Has the server's workers read the weights, from a folder that they see."""
    with _seen(folder, server):
        server.on_workers("reload_weights", {"weights_path": str(folder)})


def read_adapters_from(folder: Path, server: Server) -> None:
    """Has the server, which has the model, read the adapters."""
    arguments = {"lora_name": ADAPTERS, "lora_path": str(folder / ADAPTERS), "load_inplace": True}
    with _seen(folder, server):
        server.call("POST", "/v1/load_lora_adapter", arguments)


@contextmanager
def _seen(folder: Path, server: Server) -> Iterator[None]:
    try:
        yield
    except (ServerError, RefusedError) as error:
        if not any(words in str(error) for words in _UNSEEN):
            raise
        raise RefusedError(
            f"{server.address} does not see {folder}, through which weights go to it: set rollout.vllm.weights_dir to a folder "
            f"that trainer and servers share, or rollout.vllm.transfer to broadcast. Its own words: {error}"
        ) from error


def options_for_adapters(rank: int) -> dict[str, Any]:
    """What vLLM must be started with: a smaller rank has room in the next that it knows."""
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(known for known in _RANKS if known >= rank)}


def _roomy(size: int) -> str | None:
    """Shared memory, if it has room for so many bytes; else tempfile's choice."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > size else None
