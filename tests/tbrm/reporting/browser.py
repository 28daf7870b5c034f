"""A real browser for tests of pages: headless Chromium over its debugging pipe, which needs nothing but the browser."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 300
"""After which it is ended, come what may."""
_SETTLED = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))"


class Browser:
    """One tab of it."""

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers, self._id, self._session = commands, answers, 0, None
        self.events: list[dict[str, Any]] = []
        """What happened since the last page was opened."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command of the DevTools protocol."""
        self._id += 1
        session = {"sessionId": self._session} if self._session else {}
        self._commands.write(
            json.dumps({"id": self._id, "method": method, "params": params, **session}).encode() + b"\0"
        )
        self._commands.flush()
        while (message := self._next()).get("id") != self._id:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.emulate(dark=dark)
        self.events.clear()
        self("Page.navigate", url=page.resolve().as_uri())
        while not self.happened("Page.loadEventFired"):
            self.events.append(self._next())

    def emulate(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        end = time.monotonic() + _SECONDS
        while self.ask("matchMedia('(prefers-color-scheme: dark)').matches") != dark:
            assert time.monotonic() < end

    def happened(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression, once the page has drawn what was asked of it before."""
        self("Runtime.evaluate", expression=_SETTLED, awaitPromise=True)
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def place(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, which is scrolled into view."""
        box = (
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.left, b.top, b.width, b.height]}})(document.querySelector({json.dumps(selector)}))"
        )
        left, top, width, height = self.ask(box)
        return left, top, width, height

    def click(self, selector: str, count: int = 1) -> None:
        left, top, width, height = self.place(selector)
        for clicks in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.mouse(kind, left + width / 2, top + height / 2, button="left", clickCount=clicks)

    def screenshot(self, path: Path) -> None:
        taken = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """With a profile of its own in `folder`."""
    assert CHROMIUM is not None
    commands_read, commands_write = os.pipe()
    answers_read, answers_write = os.pipe()
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
        "--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={folder}",
    ]  # fmt: skip
    command = f"exec timeout {_SECONDS} {shlex.join([CHROMIUM, *options])} 3<&{commands_read} 4>&{answers_write}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(commands_read, answers_write), stdout=log, stderr=log
        )
    os.close(commands_read)
    os.close(answers_write)
    with os.fdopen(commands_write, "wb") as commands, os.fdopen(answers_read, "rb") as answers:
        try:
            yield Browser(commands, answers)
        finally:
            process.terminate()
            process.wait(20)
