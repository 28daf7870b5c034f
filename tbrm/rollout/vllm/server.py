"""How to talk to a vLLM server: the requests that rollouts need, each with a time limit and the server's own words if it
fails."""

from __future__ import annotations

import http.client
import json
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tbrm.rollout.base import Response

SUPPORTED = ((0, 32), (0, 34))
"""Versions of vLLM from the first to before the second: its interface changes between releases."""

_HEALTH_SECONDS = 5.0
"""How often a server is asked whether it is well while it owes an answer, and how long it may take to say."""


class ServerError(RuntimeError):
    """A server that gave no answer, or a failure; the message holds its own words. Another try may succeed."""


class LateError(ServerError):
    """No answer within the time limit: the server may be busy, or hang."""


class RefusedError(ValueError):
    """A request that no server of this kind will ever answer."""


def check_version(version: str, where: str) -> None:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if not SUPPORTED[0] <= tuple(int(part) for part in version.split(".")[:2]) < SUPPORTED[1]:
        raise RefusedError(f"{where} is vLLM {version}; wants vllm>={low},<{high}: pip install 'vllm>={low},<{high}'")


@dataclass(frozen=True)
class Server:
    address: str
    """http://host:port, or the path of a Unix socket."""
    timeout: float
    """Seconds for an answer."""
    adapter: str | None = None
    """Which of its LoRA adapters is to answer; None: the model itself."""

    def call(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """The JSON, or text, that the server answers. Raises ServerError or RefusedError."""
        seconds = timeout or self.timeout
        connection = _connect(self.address, seconds)
        try:
            headers = {"content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            self._await_answer(connection, seconds)
            reply = connection.getresponse()
            status, text = reply.status, reply.read().decode(errors="replace")
        except TimeoutError as error:
            raise LateError(f"{self.address}{path}: no answer within {seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.address}{path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if status >= 500:
            raise ServerError(f"{self.address}{path} answered {status}: {text[:2000]}")
        if status >= 400:
            raise RefusedError(f"{self.address}{path} answered {status}: {text[:2000]}")
        return json.loads(text) if text.startswith(("{", "[")) else text

    def _await_answer(self, connection: http.client.HTTPConnection, seconds: float) -> None:
        """Returns when there is something to read. A vLLM whose engine has died may leave calls unanswered, and wait for them
        to end before it ends itself; but it says that it is not well, or lets nobody in. Raises ServerError then, and
        TimeoutError."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(connection.sock, selectors.EVENT_READ)
            while not selector.select(min(_HEALTH_SECONDS, max(0, deadline - time.monotonic()))):
                if time.monotonic() > deadline:
                    raise TimeoutError
                with suppress(LateError, RefusedError):  # it is busy, or what answers for it knows no such question
                    self.call("GET", "/health", timeout=_HEALTH_SECONDS)

    def max_model_len(self) -> int:
        """The most tokens of a prompt and its response together. Raises RefusedError if it is no server that we can use."""
        check_version(self.call("GET", "/version")["version"], self.address)
        length: int = self.call("GET", "/v1/models")["data"][0]["max_model_len"]
        return length

    def weights(self, *, timeout: float) -> str:
        """The tag of the weights that it has."""
        tag: str = self.call("GET", "/weight_info", timeout=timeout)["weight_version"]
        return tag

    def load(self, send: Callable[[Server], None], tag: str) -> None:
        """Takes the weights that `send` gives its workers, without a restart. Requests that came before are answered before;
        those that come meanwhile, afterwards. If it fails half-way, the server has no good weights, and claims none."""
        self.call("POST", "/pause?mode=wait")
        self.call("POST", "/update_weight_version", {"new_version": "half-loaded"})
        send(self)
        # Else what it has computed of known prompts would stay that of the old weights. (A pause does it too, but not for ever:
        # that is marked as deprecated.)
        if not self.call("POST", "/reset_prefix_cache")["success"]:
            raise ServerError(f"{self.address} did not reset its prefix cache")
        self.call("POST", "/update_weight_version", {"new_version": tag})
        self.call("POST", "/resume")

    def on_workers(self, method: str, arguments: dict[str, Any] | None = None) -> list[Any]:
        """What the method returns on each of its workers."""
        answer = self.call("POST", "/collective_rpc", {"method": method, "kwargs": arguments or {}})
        results: list[Any] = answer["results"]
        return results

    def generate(self, prompt: Sequence[int], sampling: dict[str, Any]) -> list[tuple[Response, set[str]]]:
        """Responses, and for each the tags of the weights that made it."""
        body = {"token_ids": list(prompt), "sampling_params": sampling}
        body |= {"model": self.adapter} if self.adapter else {}
        try:
            choices = self.call("POST", "/inference/v1/generate", body)["choices"]
        except RefusedError as error:
            if self.adapter and f"`{self.adapter}` does not exist" in str(error):  # it is new
                raise ServerError(str(error)) from error
            raise
        return [(_response(choice), {span["version"] for span in choice["weight_versions"]}) for choice in choices]


def sampling_params(
    count: int, max_tokens: int, temperature: float, seed: int, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """vLLM's SamplingParams, the same for servers and in process: no truncation, and no end but those that are named."""
    return {
        "n": count,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def room(prompt: Sequence[int], wanted: int, max_model_len: int) -> int:
    """How many of the `wanted` tokens vLLM's model can add to the prompt. Raises ValueError if none."""
    left = max_model_len - len(prompt)
    if left < 1:
        raise ValueError(
            f"a prompt has {len(prompt)} tokens, and vLLM's model takes {max_model_len} with the response: shorten prompts, "
            "or raise max_model_len in rollout.vllm.options"
        )
    return min(wanted, left)


def _response(choice: dict[str, Any]) -> Response:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerError(f"a response ended with finish_reason {choice['finish_reason']!r}")
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Response(choice["token_ids"], truncated=choice["finish_reason"] == "length", logprobs=logprobs)


def _connect(address: str, timeout: float) -> http.client.HTTPConnection:
    if not address.startswith("http"):
        return _UnixConnection(address, timeout)
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
