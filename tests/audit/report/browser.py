"""A headless Chromium, spoken to by its own protocol over a pipe: pages as their readers see them.

https://chromedevtools.github.io/devtools-protocol/ (1.3): JSON messages, each ended by a zero byte, over the file
descriptors 3 and 4 of the browser.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
SWITCHES = (
    "--headless",
    "--no-sandbox",  # as root, in a container, on a page of ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
LAPTOP, PHONE = (1280, 800, 1.0), (390, 844, 2.0)
"""Width and height in CSS pixels, and pixels to one of these."""


def executable() -> str:
    """The browser. Without one the test is skipped, and says what to do."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a headless browser: none of {', '.join(NAMES)} is on PATH; run `make browser`")
    return found


@dataclass
class Page:
    """One open page."""

    _process: subprocess.Popen[bytes]
    _down: int
    """Written by us."""
    _up: int
    _session: str | None = None
    _rest: bytes = b""
    _number: int = 0
    complaints: list[str] = field(default_factory=list)
    """What the page wrote to its console or failed to load: errors, warnings, violations of its policy."""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command. Raises `RuntimeError` where the browser refuses it or ends."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._noted(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._up, 1 << 16)
            if not read:
                raise RuntimeError(f"the browser ended with {self._process.wait()}")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _noted(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        method, said = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(said["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(said["exceptionDetails"]["text"])

    def open(self, path: Path, screen: tuple[int, int, float]) -> None:
        """Load a file on a screen; a narrow one is a phone's, which minds the viewport and touches."""
        width, height, pixels = screen
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=pixels, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._noted(self._next())
        self.events.clear()

    def media(self, *, scheme: Literal["light", "dark"] = "light", medium: Literal["", "print"] = "") -> None:
        """What the reader's system prefers."""
        self.call(
            "Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def tap(self, x: float, y: float) -> None:
        """Touch a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Write what is seen in the window as PNG."""
        answer = self.call("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty page, and a profile of its own; ended afterwards."""
    to_browser, down = os.pipe()
    up, from_browser = os.pipe()
    with (profile / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [executable(), *SWITCHES, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: _descriptors(to_browser, from_browser),
            close_fds=False,
        )
    os.close(to_browser)
    os.close(from_browser)
    page = Page(process, down, up)
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page._session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        os.close(down)
        os.close(up)
        process.kill()
        process.wait()


def _descriptors(read: int, write: int) -> None:
    """Runs in the browser's process before it starts: it reads 3 and writes 4."""
    read, write = os.dup(read), os.dup(write)
    os.dup2(read, 3)
    os.dup2(write, 4)
