"""A headless Chromium, followed over its DevTools protocol: open a page, wait for what should stand on it, picture it."""

from __future__ import annotations

import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

START_SECONDS = 60.0


class Page:
    """The one page of a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.count = socket, 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; events that come between are not looked at."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != self.count:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def value(self, script: str) -> Any:
        """What a line of JavaScript gives."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, address: str, wanted: str, seconds: float = 60.0) -> str:
        """The page's HTML once `wanted` stands in it.

        Raises:
            AssertionError: it does not come up in time.
        """
        self.call("Page.navigate", url=address)
        until = time.monotonic() + seconds
        while wanted not in (html := str(self.value("document.documentElement.outerHTML"))):
            assert time.monotonic() < until, f"{wanted!r} is not on {address}: {self.value('document.body.innerText')}"
            time.sleep(0.5)
        time.sleep(2.0)  # charts draw themselves in
        return html

    def click(self, text: str, wanted: str, seconds: float = 30.0) -> None:
        """Click the innermost element on which just this text stands, and wait for a link with the wanted one."""
        alike = f"[...document.querySelectorAll('*')].filter(e => e.innerText && e.innerText.trim() === {text!r})"
        self.value(f"{alike}.pop().click()")
        follows = f"[...document.querySelectorAll('a')].some(e => e.innerText.includes({wanted!r}))"
        until = time.monotonic() + seconds
        while not self.value(follows):
            assert time.monotonic() < until, f"no link {wanted!r} comes after a click on {text!r}"
            time.sleep(0.5)
        time.sleep(2.0)

    def picture(self, path: Path, height: int = 1000) -> None:
        """A PNG of the page's first `height` pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=1400, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(1.0)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(chromium: str, folder: Path) -> Iterator[Page]:
    """A browser of our own, with its profile in `folder`, for as long as the context lasts."""
    profile = folder / "profile"
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
        "--remote-allow-origins=*", "--window-size=1400,1000", f"--user-data-dir={profile}",
    ]  # fmt: skip
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen([chromium, *flags, "about:blank"], stdout=log, stderr=log)
    try:
        until = time.monotonic() + START_SECONDS
        while not (note := profile / "DevToolsActivePort").exists() or not note.read_text().strip():
            assert process.poll() is None, (folder / "chromium.log").read_text()[-2000:]
            assert time.monotonic() < until, "Chromium did not say its port"
            time.sleep(0.1)
        port = note.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            (target,) = [t for t in json.loads(answer.read()) if t["type"] == "page"]
        with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
            page = Page(socket)
            page.call("Page.enable")
            yield page
    finally:
        process.terminate()
        process.wait(30)
