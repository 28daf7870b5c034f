"""Does a server that somebody else has started serve the model that is trained, and say what we compare? The check after a
sync sees what comes out, and in bfloat16 not all that is wrong with it; this one looks at what is there."""

from __future__ import annotations

import re
from contextlib import suppress

from tbrm.policy.model import PolicyModel
from tbrm.rollout.vllm.connection import RefusedError, ServerError
from tbrm.rollout.vllm.server import Server

_INFO_SECONDS = 60.0
"""The first time, vLLM looks at the whole system it is on."""


class SameModel:
    def __init__(self, policy: PolicyModel) -> None:
        config = policy.lm.config.get_text_config()
        self.ours = {
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "vocabulary": config.vocab_size,
        }
        self.temperature = policy.temperature

    def __call__(self, server: Server) -> None:
        """Raises RefusedError."""
        theirs = sizes(_inspection(server))
        for name, ours in self.ours.items():
            if theirs[name] not in (ours, None):
                raise RefusedError(
                    f"{server.address} serves another model than the one that is trained: {name} {theirs[name]} for {ours}; "
                    "start it with that of model.name"
                )
        if self.temperature != 1 and (mode := _logprobs_mode(server)) not in ("processed_logprobs", None):
            raise RefusedError(
                f"{server.address} gives {mode}, which are not those at rollout.temperature ({self.temperature:g}): start it "
                "with --logprobs-mode processed_logprobs"
            )


def sizes(inspection: str) -> dict[str, int | None]:
    """Of a model, out of vLLM's picture of its modules; None where it does not show."""
    blocks = re.findall(r"\n( *)\(layers\): ModuleList.*?\n(.*?)\n\1\)", inspection, re.DOTALL)
    layers = None
    if len(blocks) == 1:
        indent, block = blocks[0]
        numbers = re.findall(rf"^{indent}  \((?:\d+-)?(\d+)\)", block, re.MULTILINE)
        layers = 1 + max(map(int, numbers)) if numbers else None
    return {
        "layers": layers,
        "hidden size": _number(r"\bembedding_dim=(\d+)", inspection),
        "vocabulary": _number(r"\borg_vocab_size=(\d+)", inspection),
    }


def _inspection(server: Server) -> str:
    """Empty if it has no such picture to give: its version may not know how."""
    with suppress(ServerError):
        return str(server.on_workers("get_model_inspection")[0])
    return ""


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _logprobs_mode(server: Server) -> str | None:
    """None if it does not say: it tells of its whole system, too, and may fail in that."""
    with suppress(ServerError, RefusedError):
        path = "/server_info?config_format=json"
        return str(server.ask(path, "vllm_config", "model_config", "logprobs_mode", timeout=_INFO_SECONDS))
    return None
