"""A headless Chromium, driven over its DevTools protocol: enough for one page, and no package but `websockets`."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

_FLAGS = (
    "--headless",
    "--no-sandbox",  # containers let no process of theirs make one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--remote-debugging-port=0",
)
_START_S, _WAIT_S = 60, 30
#: Resolves when the expression is true; looks often, because a test waits for it.
_UNTIL = """new Promise((resolve, reject) => {
  const end = performance.now() + %d;
  const look = () => {
    const value = (() => %s)();
    if (value) resolve(value);
    else if (performance.now() > end) reject(new Error("never became true"));
    else setTimeout(look, 10);
  };
  look();
})"""


class Page:
    """One tab. `complaints`: uncaught exceptions and what the console was told, content policy violations among it."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._loads = 0
        self.complaints: list[str] = []
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; events that come before its answer are kept."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := self._receive()).get("id") != number:
            pass
        assert "error" not in message, (method, message["error"])
        result: dict[str, Any] = message["result"]
        return result

    def open(self, url: str) -> None:
        loads = self._loads
        self.send("Page.navigate", url=url)
        while self._loads == loads:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        done = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, (script, done["exceptionDetails"])
        return done["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait until the expression is true."""
        return self.run(_UNTIL % (1000 * _WAIT_S, condition))

    def text(self, selector: str) -> str:
        """What is to be read there."""
        text: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return text

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        codes = {"Enter": 13, "Tab": 9, " ": 32}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 if ctrl else 0}
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") and not ctrl else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def look(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Another screen."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(_WAIT_S + 10))
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loads += 1
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
        return message


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A tab of a browser of its own. Skips the test where there is no Chromium, but not in CI."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "no Chromium here; on Debian: apt-get install chromium"
        if os.environ.get("LORAMUX_CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(process, Path(profile) / "DevToolsActivePort")
            new = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            target = json.load(direct.open(new, timeout=_START_S))
            with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen[bytes], file: Path) -> int:
    """The browser writes it down once it listens."""
    deadline = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, f"the browser ended with status {process.returncode}"
        assert time.monotonic() < deadline, "the browser did not start"
        if file.is_file() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.02)
