"""A small HTTP server in vLLM's place, which answers as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tbrm.rollout.vllm.server import Server

NOT_FOUND = 404, '{"detail":"Not Found"}'
HTML = 200, "<html>please log in</html>"
CHOICE = {
    "token_ids": [7, 8],
    "finish_reason": "stop",
    "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
    "weight_versions": [{"version": "run-1"}],
}
Answer = tuple[int, str]


class Drip(str):
    """A body that comes a byte at a time."""


class Fake(ThreadingHTTPServer):
    """Answers each path with what `answers` has for it, or that gives; 404 where there is none."""

    daemon_threads = True

    def __init__(self, **answers: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = {f"/{path}": answer for path, answer in answers.items()}
        self.asked: list[tuple[str, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server(self, timeout: float = 5, **options: Any) -> Server:
        return Server(f"http://127.0.0.1:{self.server_port}", timeout, **options)


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(self.path.partition("?")[0], NOT_FOUND)
        status, text = answer(json.loads(body or "{}")) if callable(answer) else answer
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        with suppress(ConnectionError):  # who asked waits no longer
            for piece in text if isinstance(text, Drip) else [text]:
                self.wfile.write(piece.encode())
                time.sleep(0.1 * isinstance(text, Drip))

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def vllm_that_keeps(tag: dict[str, str]) -> dict[str, Any]:
    """What a keeper asks, with the tag of the weights in `tag`."""

    def update(body: dict[str, str]) -> Answer:
        tag["tag"] = body["new_version"]
        return 200, ""

    return {
        "version": (200, '{"version": "0.32.0"}'),
        "v1/models": (200, '{"data": [{"max_model_len": 512}]}'),
        "weight_info": lambda _: (200, json.dumps({"weight_version": tag["tag"]})),
        "update_weight_version": update,
        "reset_prefix_cache": (200, '{"success": true}'),
        "pause": (200, ""),
        "resume": (200, ""),
    }


def busy(progress: Callable[[], object], seconds: float, **answers: Any) -> Fake:
    """Owes an answer for so long, and counts tokens as `progress` says."""

    def generate(_: Any) -> Answer:
        time.sleep(seconds)
        return 200, json.dumps({"choices": [CHOICE]})

    def metrics(_: Any) -> Answer:
        return (
            200,
            f'# HELP x\nvllm:prompt_tokens_total{{engine="0"}} 7.0\nvllm:generation_tokens_total{{e="0"}} {progress()}\n',
        )

    return Fake(**{"health": (200, ""), "metrics": metrics, "inference/v1/generate": generate, **answers})
