"""Fixtures and helpers. A test that uses `server` has its own nats-server; those that use only `url` share one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nats_presence import testing
from nats_presence._reader import QueueReader
from nats_presence._shared import BaseConnection

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent.parent
LIMIT = testing.TIMEOUT
"""The timeout in seconds for anything that a test waits for. Usually it happens much sooner."""


class Server(testing.Server):
    def connections(self) -> int:
        with urllib.request.urlopen(f"{self.monitoring}/connz", timeout=LIMIT) as response:
            return int(json.load(response)["num_connections"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("nats-server"))
    yield server
    server.stop()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of the test's own server, or of the shared one, to which no other test is connected any more."""
    if "server" in request.fixturenames:
        own: Server = request.getfixturevalue("server")
        return own.url
    shared: Server = request.getfixturevalue("shared_server")
    until(lambda: shared.connections() == 0)
    return shared.url


@pytest.fixture(params=[True, False], ids=["lanes", "level 0"])
def lanes(request: pytest.FixtureRequest) -> bool:
    """Runs a test twice: its connections use lanes, or level 0."""
    return bool(request.param)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waits(reader: QueueReader[Any]) -> bool:
    """Returns whether a thread is waiting for the next item of an iterator."""
    return repr(reader._wait_lock).startswith("<locked")


class Stalled:
    """A condition: for 0.1 s a connection has sent nothing, though messages are pending."""

    def __init__(self, conn: BaseConnection) -> None:
        self.conn, self.seen, self.since = conn, (0, 0), time.monotonic()

    def __call__(self) -> bool:
        stats, now = self.conn.stats(), time.monotonic()
        seen = stats["bytes_waiting"], stats["messages_out"]
        if seen != self.seen:
            self.seen, self.since = seen, now
        return seen[0] > 0 and now - self.since > 0.1


def run_python(code: str, url: str, **options: object) -> subprocess.Popen[str]:
    """Runs code in another Python process. sys.argv[1] is the server's URL."""
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", code, url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **options,  # type: ignore[call-overload]
    )  # fmt: skip
    return process


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}
