"""Shared by the tests of authentication, TLS and permissions: servers with requirements, and checks of connecting."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bindings" / "python"), str(ROOT / "tests" / "e2e")]

import nats_presence  # noqa: E402
from harness import BUILD, TIMEOUT, environment, run, server_binary, steady_port  # noqa: E402

__all__ = [
    "BUILD",
    "ROOT",
    "TIMEOUT",
    "Stranger",
    "environment",
    "nats_presence",
    "nats_server",
    "refused",
    "run",
    "steady_port",
    "works",
]


@contextlib.contextmanager
def nats_server(
    config: str | Path, folder: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[int]:
    """Runs a server with a configuration (a file, or a text to be written into the folder) and yields its port."""
    if isinstance(config, str):
        assert folder
        (folder / "server.conf").write_text(config)
        config = folder / "server.conf"
    command = [server_binary(), "-a", "127.0.0.1", "-p", "-1", "-c", str(config)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    assert server.stderr
    try:
        seen = []
        port = 0
        for line in server.stderr:
            seen.append(line)
            if found := re.search(r"client connections on 127\.0\.0\.1:(\d+)", line):
                port = int(found[1])
            if "Server is ready" in line:
                break
        else:
            pytest.fail("nats-server did not start: " + "".join(seen))
        # Keep reading its log: a full pipe would block it.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield port
    finally:
        server.terminate()
        server.wait()


def works(url: str, **options: Any) -> None:
    with nats_presence.connect(url, **options) as conn, pytest.raises(nats_presence.NoRespondersError):
        next(conn.stream("nobody"))


def refused(url: str, **options: Any) -> str:
    """Checks that connecting fails at once, not by a timeout; returns the message."""
    with pytest.raises((nats_presence.DisconnectedError, nats_presence.InvalidError)) as error:
        nats_presence.connect(url, **options)
    return str(error.value)


class Stranger:
    """A user with a raw connection, who does with its permissions what our library would not do."""

    def __init__(self, port: int, user: str, password: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._lines = self._socket.makefile("rb")
        self._numbers = itertools.count(1)
        # Messages received, with their subjects.
        self.received: list[tuple[str, bytes]] = []
        self.send(f'CONNECT {{"verbose":false,"headers":true,"user":"{user}","pass":"{password}"}}')

    def send(self, line: str, payload: bytes | None = None) -> str:
        """Sends a line and returns nats-server's errors; messages that arrive meanwhile are kept."""
        data = line.encode() + b"\r\n" + (b"" if payload is None else payload + b"\r\n")
        self._socket.sendall(data + b"PING\r\n")
        complaints = ""
        while (answer := self._line()) != b"PONG\r\n":
            if answer.startswith(b"-ERR"):
                complaints += answer.decode()
        return complaints

    def wait(self, count: int) -> list[tuple[str, bytes]]:
        """Waits until `count` messages have arrived."""
        while len(self.received) < count:
            self._line()
        return self.received

    def _line(self) -> bytes:
        """Returns the next line; keeps a message."""
        line = self._lines.readline()
        assert line, "nats-server closed the connection"
        words = line.split()
        if words[0] in (b"MSG", b"HMSG"):
            self.received.append((words[1].decode(), self._lines.read(int(words[-1]) + 2)[:-2]))
        return line

    def publish(self, subject: str, payload: bytes = b"", reply: str = "") -> str:
        return self.send(f"PUB {subject} {reply} {len(payload)}", payload)

    def subscribe(self, subject: str) -> str:
        return self.send(f"SUB {subject} {next(self._numbers)}")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
