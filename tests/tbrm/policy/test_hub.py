"""A hub that does not answer is said to, at once; every answer is left to the hub's own client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.policy import hub
from tbrm.policy.hub import require_hub

MODEL = ModelConfig(name="owner/name")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, no word of being offline, and an empty cache."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_SECONDS", 0.5)


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}/")
        yield server


@contextmanager
def answering(code: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that answers so; what it was asked."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(monkeypatch):
        pass  # and is gone again
    with pytest.raises(
        ConfigError, match=r"model.name: 'owner/name' is no folder here, .* cannot be reached: .*refused"
    ):
        require_hub(MODEL)


def test_a_hub_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        listening(monkeypatch),
        pytest.raises(ConfigError, match=r"cannot be reached: (timed out|no answer within 0.5 s)"),
    ):
        require_hub(MODEL)


@pytest.mark.parametrize("code", [200, 401, 404, 500])
def test_any_answer_is_one(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(code, monkeypatch) as asked:
        require_hub(MODEL)
    assert asked == ["/api/models/owner/name"]


def test_a_proxy_that_cannot_reach_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(503, monkeypatch), pytest.raises(ConfigError, match="cannot be reached: HTTP Error 503"):
        require_hub(MODEL)


@pytest.mark.parametrize("name", ["tiny", "./folder", "runs/x", "given"])
def test_what_is_no_hubs_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(monkeypatch):
        require_hub(ModelConfig(name=name))


def test_nor_is_a_hub_asked_by_who_was_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with listening(monkeypatch):
        require_hub(MODEL)


def test_what_the_cache_has_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--owner--name"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    with listening(monkeypatch):
        require_hub(MODEL)
