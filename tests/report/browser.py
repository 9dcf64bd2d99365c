"""A headless Chromium for tests, driven through a pair of pipes by its DevTools protocol: no package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 60.0


def executable() -> str:
    """Path of the browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("no Chromium: apt-get install chromium")


class Browser:
    """One browser with one page."""

    def __init__(self, commands: int, answers: int) -> None:
        """Attaches to a new page.

        Args:
            commands: file descriptor that the browser reads.
            answers: file descriptor that it writes.
        """
        self._commands, self._answers = commands, answers
        self._buffer, self._last, self._session = b"", 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def open(self, page: Path, fragment: str = "", width: int = 1300, height: int = 900, dark: bool = False) -> None:
        """Loads a local page in a window of this size (CSS pixels)."""
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=page.resolve().as_uri() + fragment)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, as JSON has it."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.js(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Presses keys one after another, as a hand does: `j`, `ArrowDown`, `Tab`, `Enter`, `Escape`."""
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            code = _CODES.get(key, ord(key.upper()[0]))
            fields: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self._call("Input.dispatchKeyEvent", type="keyDown", **fields, **({"text": text} if text else {}))
            self._call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Writes what is visible, or the whole page, as a PNG."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            piece = os.read(self._answers, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(line))


_CODES = {"ArrowDown": 40, "ArrowUp": 38, "Tab": 9, "Enter": 13, "Escape": 27, "/": 191}


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running browser; skips the test where there is none.

    Args:
        profile: a folder of its own.
    """
    (its_in, commands), (answers, its_out) = os.pipe(), os.pipe()
    its_in, its_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (its_in, its_out))

    def connect() -> None:
        os.dup2(its_in, 3)  # where --remote-debugging-pipe reads
        os.dup2(its_out, 4)  # and writes

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [executable(), *flags, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=connect, pass_fds=(3, 4),
    )  # fmt: skip
    os.close(its_in)
    os.close(its_out)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        process.terminate()
        process.wait(30)
