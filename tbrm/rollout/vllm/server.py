"""What rollouts ask of a vLLM server."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tbrm.config.section import ConfigError
from tbrm.policy.ends import Ends
from tbrm.rollout.interface import Response
from tbrm.rollout.vllm.connection import Endpoint, RefusedError, ServerError

SUPPORTED = ((0, 32), (0, 34))
"""Versions of vLLM from the first to before the second: its interface changes between releases."""

_BARRED = -100.0
"""Added to the logit of a token that is not to be drawn: as much as vLLM takes."""
_MOST_BARRED = 1024
"""Tokens whose logits vLLM 0.32 changes for a request on a GPU; more end its engine. It allows as many by a list, too."""


def check_version(version: str, where: str) -> None:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    found = re.match(r"(\d+)\.(\d+)", version)
    if not (found and SUPPORTED[0] <= tuple(map(int, found.groups())) < SUPPORTED[1]):
        raise RefusedError(f"{where} is vLLM {version}; wants vllm>={low},<{high}: pip install 'vllm>={low},<{high}'")


@dataclass(frozen=True)
class Server(Endpoint):
    adapter: str | None = None
    """Which of its LoRA adapters is to answer; None: the model itself."""

    def max_model_len(self) -> int:
        """The most tokens of a prompt and its response together. Raises RefusedError if it is no server that we can use."""
        check_version(str(self.ask("/version", "version")), self.address)
        length = self.ask("/v1/models", "data", 0, "max_model_len")
        if not isinstance(length, int) or length < 1:
            raise ServerError(f"{self.address}/v1/models answered max_model_len {length!r}; wants a number of tokens")
        return length

    def weights(self, *, timeout: float) -> str:
        """The tag of the weights that it has."""
        return str(self.ask("/weight_info", "weight_version", timeout=timeout))

    def load(self, send: Callable[[Server], None], tag: str) -> None:
        """Takes the weights that `send` gives its workers, without a restart. Requests that came before are answered before;
        those that come meanwhile, afterwards. If it fails half-way, the server has no good weights, and claims none."""
        self.call("POST", "/pause?mode=wait")
        self.call("POST", "/update_weight_version", {"new_version": "half-loaded"})
        send(self)
        # Else what it has computed of known prompts would stay that of the old weights. (A pause does it too, but not for ever:
        # that is marked as deprecated.)
        if not self.ask("/reset_prefix_cache", "success", body={}):
            raise ServerError(f"{self.address} did not reset its prefix cache")
        self.call("POST", "/update_weight_version", {"new_version": tag})
        self.call("POST", "/resume")

    def on_workers(self, method: str, arguments: dict[str, Any] | None = None) -> list[Any]:
        """What the method returns on each of its workers."""
        return list(self.ask("/collective_rpc", "results", body={"method": method, "kwargs": arguments or {}}))

    def generate(self, prompt: Sequence[int], sampling: dict[str, Any]) -> list[tuple[Response, set[str]]]:
        """Responses, and for each the tags of the weights that made it."""
        body = {"token_ids": list(prompt), "sampling_params": sampling}
        body |= {"model": self.adapter} if self.adapter else {}
        try:
            choices = self.ask("/inference/v1/generate", "choices", body=body)
        except RefusedError as error:
            if self.adapter and f"`{self.adapter}` does not exist" in str(error):  # it is new
                raise ServerError(str(error)) from error
            raise
        try:
            answers = [(_response(choice), _versions(choice)) for choice in choices]
        except (TypeError, ValueError, LookupError) as error:
            raise ServerError(
                f"{self.address} gave no response ({type(error).__name__}: {error}): {str(choices)[:200]}"
            ) from error
        if len(answers) != sampling.get("n", 1):
            raise ServerError(
                f"{self.address} gave {len(answers)} responses for {sampling.get('n', 1)}: {str(choices)[:200]}"
            )
        return answers


def barrable(barred: Sequence[int]) -> Sequence[int]:
    """The same. Raises ConfigError if they are more than vLLM takes."""
    if len(barred) > _MOST_BARRED:
        raise ConfigError(
            f"rollout.bar_unused_ids: the tokenizer has no text for {len(barred)} ids, and vLLM bars {_MOST_BARRED} at most: "
            "set it to false, or rollout.engine to embedded"
        )
    return barred


def sampling_params(
    count: int, max_tokens: int, temperature: float, seed: int, ends: Ends | None = None, barred: Sequence[int] = ()
) -> dict[str, Any]:
    """vLLM's SamplingParams, the same for servers and in process: no truncation, and no end but those that are named."""
    params = {
        "n": count,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": list(ends.ids) if ends else [],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    if ends and ends.strings:
        params |= {"stop": list(ends.strings), "detokenize": True, "skip_special_tokens": False}
    if barred:
        params |= {"logit_bias": {str(token): _BARRED for token in barred}}
    return params


def cut(response: Response, ends: Ends) -> Response:
    """The response without what a server that cannot see stop strings has written after one."""
    length = ends.length(response.token_ids) if ends.strings else None
    if length is None:
        return response
    logprobs = response.logprobs and response.logprobs[:length]
    return replace(response, token_ids=response.token_ids[:length], logprobs=logprobs, truncated=False)


def room(prompt: Sequence[int], wanted: int, max_model_len: int) -> int:
    """How many of the `wanted` tokens vLLM's model can add to the prompt. Raises ValueError if none."""
    left = max_model_len - len(prompt)
    if left < 1:
        raise ValueError(
            f"a prompt has {len(prompt)} tokens, and vLLM's model takes {max_model_len} with the response: shorten prompts, "
            "or raise max_model_len in rollout.vllm.options"
        )
    return min(wanted, left)


def _versions(choice: dict[str, Any]) -> set[str]:
    """The tags of the weights that made a response: some did."""
    versions = {span["version"] for span in choice["weight_versions"]}
    if not versions:
        raise ServerError("a response came without the versions of the weights that made it: its weight_versions is []")
    return versions


def _response(choice: dict[str, Any]) -> Response:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerError(f"a response ended with finish_reason {choice['finish_reason']!r}")
    ids, logprobs = list(choice["token_ids"]), [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    if len(ids) != len(logprobs):
        raise ServerError(f"a response came with {len(ids)} token_ids and {len(logprobs)} logprobs")
    return Response(ids, truncated=choice["finish_reason"] == "length", logprobs=logprobs)
