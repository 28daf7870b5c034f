"""Whether the hub of a model answers. Its own client tries for a minute before it says no.

Imports neither torch nor transformers: commands ask here before they load them.
"""

from __future__ import annotations

import os
import ssl
import threading
import urllib.request
from urllib.error import HTTPError, URLError

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.registry import GIVEN
from tbrm.storage.paths import is_path

_SECONDS = 5.0
_NOBODY_BEHIND = (502, 503, 504)
"""What a proxy answers for a hub that it cannot reach."""


def require_hub(config: ModelConfig) -> None:
    """Raises ConfigError where a hub must be asked for the model, does not answer, and its cache has no such model."""
    if config.name in ("tiny", GIVEN) or is_path(config.name) or _is_told_not_to_ask():
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    reason = _unanswered(f"{hub}/api/models/{config.name}")
    if reason and not _is_cached(config):
        raise ConfigError(
            f"model.name: {config.name!r} is no folder here, so a hub's, and {hub} cannot be reached: {reason}. Give a folder "
            "(./NAME, if it has no slash), or download the model where there is a network"
        )


def _is_told_not_to_ask() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _is_cached(config: ModelConfig) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(config.name, "config.json", revision=config.revision), str)


def _unanswered(url: str) -> str | None:
    """Why nobody answers there, if so: whatever else the answer is, it is one."""
    reason: list[str | None] = [f"no answer within {_SECONDS:g} s"]
    # A thread, as no time limit holds while a name is looked up.
    asking = threading.Thread(target=lambda: reason.append(_asked(url)), daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return reason[-1]


def _asked(url: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_SECONDS).close()
    except HTTPError as error:
        return str(error) if error.code in _NOBODY_BEHIND else None
    except URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except OSError as error:
        return str(error) or type(error).__name__
    return None
