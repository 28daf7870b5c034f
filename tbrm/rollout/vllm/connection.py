"""Requests to a vLLM server, each with a time limit, and the server's own words if it fails.

A server that is slow is not dead: while it says that it is well and makes tokens, for whomever, an answer is not late,
whether it is still in the queue there or takes long. The limit counts from the last sign of progress.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any
from urllib.parse import urlsplit

from tbrm.config.section import ConfigError
from tbrm.config.vllm import VllmConfig

_LOOK_SECONDS = 5.0
"""How often a server that owes an answer is looked at, and how long it may take to say that it is well."""
_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
_TRY_AGAIN = (408, 425, 429)
"""Answers below 500 that are of the moment."""
_WANTED = {
    "/weight_info": "VLLM_SERVER_DEV_MODE=1 in its environment",
    "/inference/v1/generate": "--enable-scale-out",
    "/v1/load_lora_adapter": "--enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
}
"""What a server was started without that does not know such a path."""


class ServerError(RuntimeError):
    """A server that gave no answer, or a failure; the message holds its own words. Another try may succeed."""


class LateError(ServerError):
    """No answer within the time limit: the server may be busy, or hang."""


class HungError(LateError):
    """Nor has it made a token in that time, as its own counters say."""


class RefusedError(ValueError):
    """A request that no server of this kind will ever answer."""


class Pulse:
    """The last sign of progress of a server, shared by all requests to it, so that not each of them looks."""

    def __init__(self) -> None:
        self.closed = False
        self.tokens: float | None = None
        """What it has made since its start; None: it does not say."""
        self._looked = self._moved = self._failed = -inf
        self._failure: ServerError | None = None

    def last_beat(self, look: Callable[[], float | None], every: float, since: float) -> float:
        """When it was seen to have made tokens since the look before. Raises ServerError if it was not well since then."""
        if self.closed:
            raise ServerError("closed")
        if time.monotonic() - self._looked >= every:
            self._looked = time.monotonic()
            try:
                tokens = look()
            except ServerError as error:
                self._failure, self._failed = error, time.monotonic()
            else:
                if tokens is not None and tokens != self.tokens:
                    self.tokens, self._moved = tokens, time.monotonic()
        if self._failure is not None and self._failed > since:
            raise ServerError(str(self._failure)) from self._failure
        return self._moved


@dataclass(frozen=True)
class Endpoint:
    address: str
    """http://host:port, perhaps with a path that comes before vLLM's own; or the path of a Unix socket."""
    timeout: float
    """Seconds for an answer, from the server's last sign of progress."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of each request: there may be keys among them."""
    pulse: Pulse = field(default_factory=Pulse, repr=False, compare=False)

    def call(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """The JSON, or text, that the server answers. `timeout`: seconds for one that takes no work, from now on. Raises
        ServerError or RefusedError."""
        where = f"{self.address}{path}"
        connection, prefix = _connect(self.address, timeout or self.timeout)
        try:
            headers = {"content-type": "application/json", **self.headers}
            connection.request(method, prefix + path, None if body is None else json.dumps(body), headers)
            every = min(_LOOK_SECONDS, (timeout or self.timeout) / 4)
            patience = _Patience(connection.sock, every, lambda begun: self._is_late(where, begun, timeout))
            reply = http.client.HTTPResponse(patience, method=method)  # type: ignore[arg-type]
            reply.begin()
            status, text = reply.status, reply.read().decode(errors="replace")
        except TimeoutError as error:
            raise LateError(f"{where}: no connection within {timeout or self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{where}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if status >= 400:
            raise _failure(status, path, f"{where} answered {status}: {text[:2000]}")
        try:
            return json.loads(text) if text.startswith(("{", "[")) else text
        except json.JSONDecodeError as error:
            raise ServerError(f"{where} answered what is not JSON: {text[:200]}") from error

    def ask(self, path: str, *keys: str | int, body: Any = None, timeout: float | None = None) -> Any:
        """One thing of what the server answers. Something else than vLLM may be at the address, and answer, too."""
        answer = found = self.call("GET" if body is None else "POST", path, body, timeout=timeout)
        try:
            for key in keys:
                found = found[key]
        except (TypeError, LookupError):
            raise ServerError(f"{self.address}{path} answered what no vLLM does: {str(answer)[:200]}") from None
        return found

    def _is_late(self, where: str, begun: float, timeout: float | None) -> None:
        """Called while an answer is awaited since `begun`. Raises ServerError if that makes no sense any more."""
        if timeout is not None:
            if time.monotonic() > begun + timeout:
                raise LateError(f"{where}: no answer within {timeout:g} s")
            return
        beat = self.pulse.last_beat(self._tokens_made, min(_LOOK_SECONDS, self.timeout / 4), begun)
        if time.monotonic() > max(begun, beat) + self.timeout:
            late = f"{where} is late: no answer for rollout.vllm.request_timeout ({self.timeout:g} s)"
            if self.pulse.tokens is None:
                raise LateError(
                    f"{late}, and its /metrics do not tell whether it works; raise it if the server is slow"
                )
            raise HungError(f"{late}, and it has made no token in that time")

    def _tokens_made(self) -> float | None:
        """A vLLM whose engine has died may leave calls unanswered, and wait for them to end before it ends itself; but it says
        that it is not well, or lets nobody in. Raises ServerError then."""
        with suppress(LateError, RefusedError):  # it is busy, or what answers for it knows no such question
            self.call("GET", "/health", timeout=_LOOK_SECONDS)
        with suppress(ServerError, ValueError):  # or does not count
            lines = str(self.call("GET", "/metrics", timeout=_LOOK_SECONDS)).splitlines()
            counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(_COUNTERS)]
            return sum(counts) if counts else None
        return None


def headers_from_environment(config: VllmConfig) -> dict[str, str]:
    """Of requests to servers. Keys are among them, which neither a recipe nor a run's folder holds. Raises ConfigError."""
    named = {header: ("headers_env", name) for header, name in config.headers_env.items()}
    if config.api_key_env:
        named["Authorization"] = "api_key_env", config.api_key_env
    headers = {}
    for header, (key, name) in named.items():
        value = os.environ.get(name, "").strip()
        if not value or not (value.isascii() and value.isprintable()):
            raise ConfigError(
                f"rollout.vllm.{key}: the environment has no {name}, or one that no header can hold: export it"
            )
        headers[header] = f"Bearer {value}" if key == "api_key_env" else value
    return headers


class _Patience(io.RawIOBase):
    """Reads from a socket, and has `check` look `every` so many seconds, whether or not anything came: it is given the time of
    the request, and may raise."""

    def __init__(self, sock: socket.socket, every: float, check: Callable[[float], None]) -> None:
        self._sock, self._every, self._check = sock, every, check
        self._begun = self._looked = time.monotonic()
        sock.settimeout(every)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if time.monotonic() >= self._looked + self._every:
                self._check(self._begun)
                self._looked = time.monotonic()
            with suppress(TimeoutError):
                return self._sock.recv_into(buffer)


def _failure(status: int, path: str, said: str) -> ServerError | RefusedError:
    if status >= 500 or status in _TRY_AGAIN:
        return ServerError(said)
    if status in (401, 403):
        said += ". rollout.vllm.api_key_env names the variable that holds its key"
    elif status == 404 and "Not Found" in said and path in _WANTED:  # of a model or an adapter it says more
        said += f". It knows no such path: start it with {_WANTED[path]} (docs/rollouts.md has the command)"
    return RefusedError(said)


def _connect(address: str, timeout: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection, and what comes before the path of each request."""
    if address.startswith("/"):
        return _UnixConnection(address, timeout), ""
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=timeout), parts.path


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
