"""Headless Chromium for tests, driven through a pipe by its DevTools protocol: JSON, each message ended by a zero byte.

Source: https://chromedevtools.github.io/devtools-protocol/ and `--remote-debugging-pipe`, which reads descriptor 3 and
writes descriptor 4.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "ArrowDown": 40}


class Browser:
    """One page of a Chromium of its own.

    Attributes:
        requests: addresses of all that pages asked for.
        faults: uncaught exceptions, errors on the console and broken rules of the content's security policy.
    """

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe, self._waiting, self._sent = pipe, b"", 0
        self.requests: list[str] = []
        self.faults: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    _session = ""

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command of the protocol answers."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._pipe.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._sent:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, address: str) -> None:
        self("Page.navigate", url=address)
        self("Emulation.setFocusEmulationEnabled", enabled=True)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, once it has one."""
        found = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, *, limit_s: float = 10) -> Any:
        """The expression's value as soon as it is true; of an element there is none."""
        until = time.monotonic() + limit_s
        while not (value := self.js(expression)):
            shown = "" if time.monotonic() < until else self.js("document.body.outerHTML.slice(-1000)")
            assert time.monotonic() < until, f"never: {expression}; {self.faults}; {shown}"
            time.sleep(0.02)
        return value

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key of KEYS, or a character, as from a keyboard."""
        text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
        what = {"key": " " if key == "Space" else key, "code": key, "modifiers": 8 if shift else 0}
        what["windowsVirtualKeyCode"] = KEYS.get(key, ord(key[0].upper()))
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **what)
        self("Input.dispatchKeyEvent", type="keyUp", **what)

    def window(self, width: int, height: int = 900, *, scheme: str = "light") -> None:
        """The size of the page's window in CSS pixels, and the colours that the person prefers."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            data = self._pipe.recv(1 << 20)
            assert data, "chromium has stopped"
            self._waiting += data
        message, _, self._waiting = self._waiting.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Runtime.exceptionThrown":
                self.faults.append(str(said["exceptionDetails"]))
            case "Log.entryAdded" if said["entry"]["level"] == "error":
                self.faults.append(said["entry"]["text"])


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in `folder`, ended with all its processes."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with ours:
        with theirs, open(os.devnull, "r+b") as null:
            process = os.posix_spawnp(
                "chromium",
                ["chromium", *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"],
                os.environ,
                file_actions=[
                    *((os.POSIX_SPAWN_DUP2, null.fileno(), end) for end in (0, 1, 2)),
                    *((os.POSIX_SPAWN_DUP2, theirs.fileno(), end) for end in (3, 4)),
                ],
                setpgroup=0,
            )
        try:
            yield Browser(ours)
        finally:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
