"""Keys of vLLM servers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tbrm.config.section import Section
from tbrm.storage.path_keys import ExpandedPath

_OUR_HEADERS = ("accept-encoding", "content-length", "content-type", "transfer-encoding")


class VllmConfig(Section):
    addresses: list[str] = Field(
        [],
        description="Running servers, such as http://10.0.0.7:8000 (docs/rollouts.md has their command); none: we start them.",
    )
    api_key_env: str | None = Field(
        None, description="Environment variable with the key of the servers at addresses (Authorization: Bearer KEY)."
    )
    headers_env: dict[str, str] = Field(
        {},
        description="More headers for them, each with the environment variable that has its value: {X-Team: TEAM_TOKEN}.",
    )
    servers: int = Field(1, ge=1, description="Servers to start, where no addresses are given.")
    devices: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        description="Devices dealt out to the servers that we start: numbers of visible GPUs; of cores on a CPU. None: GPUs "
        "that training leaves, then the others; on a CPU a part of the cores for each of several servers.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Data type of vLLM's model. auto: model.precision."
    )
    kv_cache_gib: int = Field(2, ge=1, description="Memory for keys and values on a CPU, in GiB.")
    gpu_memory: float = Field(0.45, gt=0, le=1, description="Share of the GPU's memory that vLLM may use in all.")
    options: dict[str, Any] = Field(
        {},
        description="More options of vLLM, by its own names, such as {max_model_len: 4096, tensor_parallel_size: 2}.",
    )
    transfer: Literal["file", "broadcast", "adapters"] = Field(
        "file",
        description="How weights reach servers: file (read by them in weights_dir), broadcast (NCCL; without a GPU gloo), or "
        "adapters (a file of those alone; with lora.rank).",
    )
    weights_dir: ExpandedPath | None = Field(
        None,
        description="Where weights are written; for a file, all servers see it. None: shared memory, or a temporary folder.",
    )
    start_timeout: int = Field(300, ge=1, description="Seconds within which a server must be up, or up again.")
    request_timeout: int = Field(
        600,
        ge=1,
        description="Seconds that a server may owe an answer without making a token; waiting in its queue is none.",
    )
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="Largest mean difference to our log-probs after a sync. None: 0.001 in float32, 0.2 in bfloat16.",
    )

    @field_validator("addresses")
    @classmethod
    def _are_addresses(cls, addresses: list[str]) -> list[str]:
        known = [_server_address(address) for address in addresses]
        if twice := [address for address in known if known.count(address) > 1]:
            raise ValueError(f"{twice[0]} is there twice: name each server once")
        return known

    @field_validator("headers_env")
    @classmethod
    def _are_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name in headers:
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ValueError(f"{name!r} is no name of a header; wants letters, digits and -: X-Team")
            if name.lower() in _OUR_HEADERS:
                raise ValueError(f"{name} is set by tbrm: leave it out")
        return headers

    @model_validator(mode="after")
    def _servers_of_others(self) -> VllmConfig:
        for key in ("api_key_env", "headers_env"):
            if getattr(self, key) and not self.addresses:
                raise ValueError(
                    f"{key} is set but addresses is not, and servers that we start want no key: leave it out"
                )
        if self.api_key_env and "authorization" in map(str.lower, self.headers_env):
            raise ValueError("api_key_env is set, and Authorization in headers_env, too: they are one; leave one out")
        if self.addresses and self.devices:
            raise ValueError(
                "devices is set, and addresses, too: it is for servers that we start; leave one of the two out"
            )
        return self


def _server_address(given: str) -> str:
    """Without /v1, which people are used to write and vLLM's other paths do not have. Raises ValueError."""
    if given.startswith("/"):  # a Unix socket
        return given
    try:
        parts = urlsplit(given)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{given!r} is no address; wants http:// or https://, a host and perhaps a port: http://10.0.0.7:8000"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{parts.hostname}: an address has neither a user, ? nor #, and is written into the run's folder: see api_key_env "
            "and headers_env"
        )
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return parts._replace(netloc=parts.netloc.lower(), path=path).geturl()  # the scheme is lower-case already
