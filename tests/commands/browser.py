"""A headless browser, driven by what every browser's driver speaks (W3C WebDriver), over the standard library alone.

Tests that ask for one are skipped where the system has no chromium and chromedriver.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


# The least contrast (WCAG 2) of what is written, the text where it is, and everything that sticks out of the window.
LOOK = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (element) => { for (; element; element = element.parentElement) {
  const [r, g, b, a = 1] = parts(getComputedStyle(element).backgroundColor); if (a > 0) return [r, g, b]; }
  return [255, 255, 255]; };
const within = (element) => { for (element = element.parentElement; element; element = element.parentElement)
  if (["auto", "scroll", "hidden"].includes(getComputedStyle(element).overflowX)) return true; return false; };
let least = 99, where = ""; const out = [];
for (const element of document.querySelectorAll("body *")) {
  const box = element.getBoundingClientRect();
  if (!box.width || element.matches("script, style")) continue;
  if ((box.right > innerWidth + 0.5 || box.left < -0.5) && !within(element)) out.push(element.outerHTML.slice(0, 80));
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
  const [a, b] = [light(parts(getComputedStyle(element).color)), light(ground(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < least) { least = contrast; where = element.textContent.slice(0, 40); }
}
return {contrast: least, where, out, wide: document.documentElement.scrollWidth - innerWidth,
  ground: ground(document.body)};
"""


class Browser:
    """One window. Raises AssertionError with the browser's own message where a command fails."""

    def __init__(self, port: int, profile: Path) -> None:
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*OPTIONS, f"--user-data-dir={profile}"]}
        found = self._ask("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._address += f"/{found['sessionId']}"

    def _ask(self, path: str, body: Any, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def look(self, width: int, scheme: str) -> None:
        """As a screen of that width, light or dark."""
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        self._devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def open(self, address: str) -> None:
        self._ask("/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script of the page returns."""
        return self._ask("/execute/sync", {"script": script, "args": arguments})

    def wait(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """What a script returns once that is true."""
        until = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < until, script
            time.sleep(0.1)
        return found

    def seen(self) -> dict[str, Any]:
        """``contrast``, the least, and ``where``; ``out``, what sticks out; how much too ``wide``; the ``ground``."""
        return self.run(LOOK)

    def problems(self) -> list[str]:
        """What the page said on its console: scripts that failed, and what its policy refused."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def _devtools(self, command: str, parameters: Any) -> None:
        self._ask("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        self._ask("", None, "DELETE")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(port)
        found = Browser(port, tmp_path_factory.mktemp("browser"))
        try:
            yield found
        finally:
            found.close()
    finally:
        process.terminate()
        process.wait()


def _await(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the browser's driver does not answer")
