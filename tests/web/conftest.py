"""The demo's page, as `make web` serves it, in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "demo"))
from programs import end_with_parent  # noqa: E402

TIMEOUT = 40.0
expect.set_options(timeout=TIMEOUT * 1000)
LONG = "?length=1000"
"""Streams of 80 s, which have not ended when a test leaves them, even on a slow machine."""
GATEWAYS = ["go", "python", "c"]
"""What concerns the page alone is tested with the one in Go."""
CHROMIUM_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


class Demo:
    """A running demo."""

    def __init__(self, gateway: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "demo/web/run"],
            env={**os.environ, "GATEWAY": gateway, "PORT": "0", "HOST": "127.0.0.1"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        assert self.process.stdout
        output = ""
        for line in self.process.stdout:
            output += line
            if found := re.search(r"The page is at (http://\S+)/ ", line):
                self.url = found[1]
                break
        else:
            pytest.fail(f"make web GATEWAY={gateway} exited with {self.process.wait()}:\n{output}")

    def state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/state", timeout=TIMEOUT) as response:
            state: dict[str, Any] = json.loads(response.readline().removeprefix(b"data: "))
        return state

    @property
    def gateway(self) -> str:
        return f"http://{self.state()['gateway']['url']}"

    def total(self, figure: str, mode: str = "presence") -> int:
        """The sum over the workers of a mode, as they report it."""
        return sum(worker[figure] for worker in self.state()["workers"] if worker["mode"] == mode)

    def pid(self, name: str) -> int:
        return next(process["pid"] for process in self.state()["processes"] if process["name"] == name)

    def log(self) -> str:
        return "\n".join(text for _, text in self.state()["log"])

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + TIMEOUT
        while not (result := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not after {TIMEOUT:.0f} s: {what}; {self.state()['workers']}")
            time.sleep(0.05)
        return result

    def do(self, action: str, origin: str | None = None) -> tuple[int, str]:
        """Presses a button without a browser. Returns the status and the text."""
        request = urllib.request.Request(
            f"{self.url}/do/{action}", method="POST", headers={"Origin": origin or self.url}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self) -> None:
        """Does what Ctrl-C does."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            assert self.process.wait(TIMEOUT) == 0
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def demos() -> Iterator[Callable[[str], Demo]]:
    """Returns the demo with a gateway, which is started when it is first needed."""
    running: dict[str, Demo] = {}

    def get(gateway: str) -> Demo:
        if gateway not in running:
            running[gateway] = Demo(gateway)
        return running[gateway]

    yield get
    for demo in running.values():
        demo.end()


@pytest.fixture
def gateway(request: pytest.FixtureRequest) -> str:
    """The gateway's language; tests that concern all gateways are marked so."""
    return getattr(request, "param", "go")


@pytest.fixture
def demo(demos: Callable[[str], Demo], gateway: str) -> Demo:
    return demos(gateway)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(demo: Demo, browser: Browser) -> Iterator[Page]:
    """The demo's page; it must print nothing in the console, and leave nothing running."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(TIMEOUT * 1000)
    problems: list[str] = []

    def listen(page: Page) -> None:
        page.on("console", lambda message: problems.append(describe(message)))
        page.on("pageerror", lambda error: problems.append(str(error)))

    context.on("page", listen)
    page = context.new_page()
    open_page(page, demo)
    yield page
    context.close()
    # Chromium itself prints a line when a connection is refused or lost, which some tests cause.
    problems = [problem for problem in problems if "net::ERR_" not in problem and "WebSocket" not in problem]
    assert not problems
    demo.wait("no streams run", lambda: demo.total("running") == 0)


def open_page(page: Page, demo: Demo, query: str = LONG) -> None:
    page.goto(f"{demo.url}/{query}")
    page.wait_for_selector("[data-ready=true]")


def describe(message: ConsoleMessage) -> str:
    return f"{message.type}: {message.text}"
