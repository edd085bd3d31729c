"""A broken nats-server, or none at all: a status within the configured time, no abort, no large allocation, no hang."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from conftest import Shell
from harness import TIMEOUT, Command
from memory import resident

MARGIN = 32 << 20
"""The most bytes by which a process may grow, whatever a server sends."""
CONNECT_TIMEOUT = 500
"""The connect_timeout_ms of every connection here."""
LATER = 2.0
"""Seconds that a busy machine may take longer."""

HONEST: dict[str, Any] = {
    "server_id": "X",
    "server_name": "X",
    "version": "2.10.0",
    "go": "",
    "host": "127.0.0.1",
    "port": 4222,
    "headers": True,
    "max_payload": 1 << 20,
    "proto": 1,
}


def info(**fields: Any) -> bytes:
    return b"INFO " + json.dumps({**HONEST, **fields}).encode() + b"\r\n"


class Liar:
    """Sends `greeting` to each client, answers PINGs if it is `alive`, and sends what the test gives to `say`."""

    def __init__(self, greeting: bytes, *, hangs_up: bool = False, alive: bool = True) -> None:
        self.greeting, self.hangs_up, self.alive = greeting, hangs_up, alive
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def send(self, data: bytes) -> None:
        """Sends to the last client; one that has hung up receives nothing."""
        with suppress(OSError):
            self._connections[-1].sendall(data)

    def hang_up(self) -> None:
        with suppress(OSError):
            self._connections[-1].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(self.greeting)
            if self.hangs_up:
                connection.shutdown(socket.SHUT_RDWR)
            while data := connection.recv(65536):
                if self.alive:
                    connection.sendall(b"PONG\r\n" * data.count(b"PING\r\n"))


@pytest.fixture
def liars() -> Iterator[ExitStack]:
    with ExitStack() as liars:
        yield liars


@pytest.fixture
def shell(shell_program: Command) -> Iterator[Shell]:
    with Shell(shell_program) as shell:
        assert isinstance(shell, Shell)
        yield shell


def closes(shell: Shell) -> None:
    """Fails at once, with any status."""
    begun = time.monotonic()
    shell.ask("close 100")
    assert time.monotonic() - begun < LATER


HUGE = 8 << 20

GREETINGS: dict[str, tuple[bytes, bool]] = {
    # What the server sends, and whether it hangs up then.
    "nothing": (b"", False),
    "nothing, and hangs up": (b"", True),
    "INFO is cut off": (info()[:40], False),
    "INFO is cut off, and it hangs up": (info()[:40], True),
    "INFO without JSON": (b"INFO \r\n", False),
    "INFO is not JSON": (b"INFO hello\r\n", False),
    "INFO is a list": (b"INFO [1,2,3]\r\n", False),
    "INFO is deep": (b"INFO " + b"[" * 100_000 + b"\r\n", False),
    "INFO is not UTF-8": (b"INFO \xff\xfe\r\n", False),
    "INFO with other types": (info(max_payload="many"), False),
    "INFO with a negative max_payload": (info(max_payload=-1), False),
    "INFO with a port that is none": (info(port=1 << 20), False),
    "INFO with a max_payload of 2^64": (info(max_payload=1 << 64), False),
    "INFO is huge and does not end": (b"INFO " + b"x" * HUGE, False),
    "TLS is wanted, and not spoken": (info(tls_required=True) + b"PONG\r\n" * 10, False),
    "-ERR first": (b"-ERR 'Authorization Violation'\r\n", True),
    "-ERR after INFO": (info() + b"-ERR 'Authorization Violation'\r\n", True),
    "-ERR without a text": (b"-ERR\r\n", False),
    "-ERR that is not UTF-8": (info() + b"-ERR '\xff'\r\n", False),
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", True),
    "TLS at once": (b"\x15\x03\x01\x00\x02\x02\x28\r\n", False),
    "hangs up after INFO": (info(), True),
    "zeros": (bytes(HUGE), False),
    "empty lines": (b"\r\n" * 100_000, False),
    "MSG first": (b"MSG a 1 18446744073709551615\r\n", False),
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS.keys())
def test_invalid_greeting_fails_the_connection(shell: Shell, liars: ExitStack, greeting: tuple[bytes, bool]) -> None:
    lines, hangs_up = greeting
    liar = Liar(lines, hangs_up=hangs_up, alive=False)
    liars.callback(liar.close)
    before = resident(shell)
    begun = time.monotonic()
    reply = shell.ask(f"connect nats://127.0.0.1:{liar.port} connect_timeout_ms={CONNECT_TIMEOUT}")
    assert reply["status"] in ("DISCONNECTED", "TIMEOUT"), reply
    assert f"127.0.0.1:{liar.port}" in reply["text"]
    assert time.monotonic() - begun < 2 * CONNECT_TIMEOUT / 1000 + LATER
    assert resident(shell) - before < MARGIN


def test_server_that_accepts_no_clients_fails_at_once(shell: Shell) -> None:
    """Its backlog is full: even TCP's handshake is not answered."""
    with socket.socket() as listener, ExitStack() as others:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        begun = time.monotonic()
        reply = shell.ask(f"connect nats://127.0.0.1:{listener.getsockname()[1]} connect_timeout_ms={CONNECT_TIMEOUT}")
        assert reply["status"] == "TIMEOUT"
        assert time.monotonic() - begun < 2 * CONNECT_TIMEOUT / 1000 + LATER


MOST = (1 << 64) - 1

ENDS = {
    "MSG of 2^64 - 1 bytes": b"MSG a 1 %d\r\nPING\r\n" % MOST,
    "MSG of 2^64 bytes": b"MSG a 1 %d\r\n" % (MOST + 1),
    "MSG whose length and line are 2^64 together": b"MSG a 1 %d\r\n" % (MOST - 10),
    "MSG of fewer than no bytes": b"MSG a 1 -1\r\n\r\n",
    "MSG without a length": b"MSG a 1\r\n\r\n",
    "MSG without words": b"MSG\r\n",
    "MSG with too many words": b"MSG a 1 b c d 1\r\nx\r\n",
    "MSG longer than it says": b"MSG a 1 1\r\nxxxxxxxxxxxx\r\n",
    "MSG shorter than it says": b"MSG a 1 20\r\nx\r\nPING\r\nPING\r\nPING\r\nPING\r\n",
    "MSG for no number": b"MSG a b 1\r\nx\r\n",
    "MSG that is not UTF-8": b"MSG \xff 1 1\r\nx\r\n",
    "HMSG of 2^64 - 1 bytes": b"HMSG a 1 %d %d\r\nPING\r\n" % (MOST, MOST),
    "HMSG whose headers are longer than all": b"HMSG a 1 20 10\r\nNATS/1.0\r\n\r\n\r\n",
    "HMSG whose lengths are both near 2^64": b"HMSG a 1 %d %d\r\nPING\r\n" % (MOST - 1, MOST),
    "HMSG without a version": b"HMSG a 1 6 6\r\nx: y\r\n\r\n",
    "HMSG with a bad status": b"HMSG a 1 20 20\r\nNATS/1.0 99999999\r\n\r\n\r\n",
    "HMSG without headers": b"HMSG a 1 0 1\r\nx\r\n",
    "INFO that is not JSON": b"INFO hello\r\n",
    "-ERR without a text": b"-ERR\r\n",
    "-ERR that is not UTF-8": b"-ERR '\xff'\r\n",
    "another protocol": b"HTTP/1.1 200 OK\r\n\r\n",
    "an empty line": b"\r\n",
    "all bytes, again and again": bytes(range(256)) * 4096 + b"\r\n",
    "zeros and a line's end": bytes(1000) + b"\r\n",
}


@pytest.mark.parametrize("last", ENDS.values(), ids=ENDS.keys())
def test_fatal_server_line_causes_a_reconnect(shell: Shell, liars: ExitStack, last: bytes) -> None:
    liar = Liar(info())
    liars.callback(liar.close)
    shell.do(f"connect nats://127.0.0.1:{liar.port} reconnect_min_ms=10")
    before = resident(shell)
    liar.send(last)
    assert shell.wait(event="DISCONNECTED")["status"] == "DISCONNECTED"
    # It goes on with a working connection.
    shell.wait(event="CONNECTED")
    assert resident(shell) - before < MARGIN
    closes(shell)


COMPLAINTS = [
    b"-ERR 'Permissions Violation for Publish to \"client.offline\"'",
    b"-ERR 'Permissions Violation for Subscription to \"client.offline\"'",
    b"-ERR 'Permissions Violation for Publish to \"\"'",
    b"-ERR 'Permissions Violation for Publish to \"'",
    b"-ERR 'Permissions Violation'",
    b"-ERR 'Unknown Protocol Operation'",
    b"-ERR 'Stale Connection'",
    b"-ERR 'Slow Consumer'",
    b"-ERR 'Maximum Payload Violation'",
    b"-ERR 'Invalid Subject'",
    b"-ERR ''",
    b"-ERR '''",
    b"-ERR " + b"x" * 10_000,
]


def test_server_errors_are_reported(shell: Shell, liars: ExitStack) -> None:
    """The first few are reported, and nothing that is not about our own subjects."""
    liar = Liar(info())
    liars.callback(liar.close)
    shell.do(f"connect nats://127.0.0.1:{liar.port}")
    before = resident(shell)
    for _ in range(1000):
        liar.send(b"\r\n".join([*COMPLAINTS, b""]))
    assert "nats-server says" in shell.wait(event="LOG")["data"]
    assert shell.ask("stats")["connects"] == 1
    events = 1
    while shell.take(event="LOG"):
        events += 1
    assert events < 40
    assert resident(shell) - before < MARGIN
    closes(shell)


HARMLESS = {
    "messages for nobody": b"MSG a 99 1\r\nx\r\n" * 1000,
    "messages for nobody, with the greatest of numbers": b"MSG a %d 1\r\nx\r\n" % MOST,
    "PINGs": b"PING\r\n" * 10_000,
    "PONGs that nobody asked for": b"PONG\r\n" * 10_000,
    "+OK": b"+OK\r\n" * 10_000,
    "INFO with servers that are none": info(connect_urls=["", ":", "a b", "x" * 10_000, "nats://[", "127.0.0.1:1"]),
    "INFO with ten thousand servers": info(connect_urls=[f"127.0.0.1:{port}" for port in range(10_000)]),
    "a subject with nothing in it": b"MSG . 99 1\r\nx\r\n",
    "a line that does not end": b"MSG " + b"a" * (4 << 20),
    "MSG with a length that never comes": b"MSG a 1 %d\r\n" % (1 << 40),
}


@pytest.mark.parametrize("line", HARMLESS.values(), ids=HARMLESS.keys())
def test_odd_server_line_is_tolerated(shell: Shell, liars: ExitStack, line: bytes) -> None:
    liar = Liar(info())
    liars.callback(liar.close)
    shell.do(f"connect nats://127.0.0.1:{liar.port}")
    before = resident(shell)
    liar.send(line)
    liar.hang_up()
    shell.wait(event="DISCONNECTED")
    shell.wait(event="CONNECTED")
    assert resident(shell) - before < MARGIN
    closes(shell)


def test_unconfirmed_calls_time_out(shell: Shell, liars: ExitStack) -> None:
    """It accepts everything and answers nothing but PINGs."""
    liar = Liar(info())
    liars.callback(liar.close)
    shell.do(f"connect nats://127.0.0.1:{liar.port} connect_timeout_ms={CONNECT_TIMEOUT}")
    for command, status in [
        ("serve svc - 0", "TIMEOUT"),
        ("listen", "TIMEOUT"),
        ("request 1 svc ann hello", "OK"),
        ("offline bob", "OK"),
        ("close 100", "TIMEOUT"),
    ]:
        begun = time.monotonic()
        assert shell.ask(command)["status"] == status, command
        assert time.monotonic() - begun < 2 * CONNECT_TIMEOUT / 1000 + LATER, command
    assert shell.wait(event="ERROR", tag=1)["status"] == "CLOSED"


def test_silent_server_is_lost_after_two_pings(shell: Shell, liars: ExitStack) -> None:
    liar = Liar(info())
    liars.callback(liar.close)
    shell.do(f"connect nats://127.0.0.1:{liar.port} ping_interval_ms=100 connect_timeout_ms={CONNECT_TIMEOUT}")
    liar.alive = False
    shell.wait(event="DISCONNECTED", timeout=1 + LATER)
    closes(shell)


def test_failed_attempts_leave_nothing_behind(shell: Shell, liars: ExitStack) -> None:
    """It sends garbage to each attempt: attempts become rare, and log and memory stay bounded."""
    liar = Liar(info())
    liars.callback(liar.close)
    shell.do(f"connect nats://127.0.0.1:{liar.port} reconnect_min_ms=1 reconnect_max_ms=20 connect_timeout_ms=100")
    before = resident(shell)
    liar.greeting = b"INFO " + b"x" * HUGE
    liar.hang_up()
    time.sleep(2)
    liar.greeting = info()
    shell.wait(event="CONNECTED", timeout=TIMEOUT)
    events = 0
    while shell.take(event="LOG"):
        events += 1
    assert 1 <= events < 40
    assert resident(shell) - before < MARGIN
    closes(shell)
