"""A server that breaks off, lies, or says nothing: connect fails in its time, or the connection is lost and said to be;
nothing is allocated for what it only announces, and closing does not hang."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import Command, Shell
from harness import PATIENCE

MEBI = 1 << 20
OPTIONS = "connect_timeout_ms=400 reconnect_min_ms=1 reconnect_max_ms=20 ping_interval_ms=50 lanes=false"
INFO = b'INFO {"server_id":"X","version":"2.10.0","proto":1,"headers":true,"max_payload":1048576,"port":4222}\r\n'
Script = Callable[[socket.socket], None]


class Liar:
    """Takes connections and does as its script says, then waits until the client has gone."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._changed:
                    self.connections += 1
                    self._changed.notify_all()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            self._script(client)
            while client.recv(65536):
                pass

    def wait_for(self, connections: int) -> None:
        """Waits until there were so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.connections >= connections, PATIENCE)

    def close(self) -> None:
        self._listener.close()


def handshake(client: socket.socket) -> None:
    """As an honest server, up to the answer to the first PING."""
    client.sendall(INFO)
    heard = b""
    while b"PING" not in heard:
        heard += client.recv(65536)
    client.sendall(b"PONG\r\n")


def says(data: bytes, *, close: bool = False) -> Script:
    def script(client: socket.socket) -> None:
        client.sendall(data)
        if close:
            client.shutdown(socket.SHUT_RDWR)

    return script


def says_later(data: bytes) -> Script:
    def script(client: socket.socket) -> None:
        handshake(client)
        client.sendall(data)

    return script


@pytest.fixture
def lie() -> Iterator[Callable[[Script], Liar]]:
    with ExitStack() as stack:

        def lie(script: Script) -> Liar:
            liar = Liar(script)
            stack.callback(liar.close)
            return liar

        yield lie


@pytest.fixture
def shell(shell_program: Command) -> Iterator[Shell]:
    with Shell(shell_program) as shell:
        assert isinstance(shell, Shell)
        yield shell


def resident(shell: Shell) -> int:
    pages = int(Path(f"/proc/{shell.process.pid}/statm").read_text().split()[1])
    return pages * 4096


AT_ONCE = {
    "nothing": says(b""),
    "closes": says(b"", close=True),
    "half an INFO": says(INFO[:40]),
    "half an INFO and closes": says(INFO[:40], close=True),
    "an INFO without its object": says(b"INFO \r\n"),
    "an INFO that is no JSON": says(b"INFO {{{{\r\n"),
    "an INFO of another type": says(b'INFO {"max_payload":"much","port":-1}\r\n'),
    "an INFO with numbers beyond all bounds": says(b'INFO {"max_payload":99999999999999999999999}\r\n'),
    "an INFO without an end": says(b"INFO {" + b'"x":"' + b"a" * (8 * MEBI)),
    "an INFO that nests": says(b"INFO " + b"[" * MEBI + b"\r\n"),
    "something else": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "TLS": says(bytes.fromhex("1503030002022816030300ff")),
    "zeros": says(bytes(MEBI)),
    "an error first": says(b"-ERR 'go away'\r\n", close=True),
    "an error after INFO": says(INFO + b"-ERR 'Authorization Violation'\r\n"),
    "an error that is not text": says(INFO + b"-ERR \xff\xfe'\r\n", close=True),
    "closes after INFO": says(INFO, close=True),
}


@pytest.mark.parametrize("what", AT_ONCE)
def test_connect_fails_in_its_time(shell: Shell, lie: Callable[[Script], Liar], what: str) -> None:
    liar = lie(AT_ONCE[what])
    before = resident(shell)
    reply = shell.ask(f"connect nats://127.0.0.1:{liar.port} connect_timeout_ms=400")
    assert reply["status"] in ("DISCONNECTED", "TIMEOUT"), reply
    assert resident(shell) - before < 64 * MEBI
    assert liar.connections >= 1


LATER = {
    "an error": b"-ERR 'Stale Connection'\r\n",
    "a hundred errors": b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n" * 100
    + b"PONG\r\n" * 3
    + b"nonsense\r\n",
    "a length near 2^64": b"MSG client.offline 1 18446744073709551615\r\nx",
    "a length over 2^64": b"MSG client.offline 1 99999999999999999999999999\r\n",
    "a negative length": b"MSG client.offline 1 -5\r\nhello\r\n",
    "headers longer than the whole": b"HMSG client.offline 1 4000000000 10\r\n",
    "both lengths near 2^64": b"HMSG client.offline 1 18446744073709551614 18446744073709551615\r\n",
    "a header block without its version": b"HMSG client.offline 1 6 6\r\nx: y\r\n\r\n",
    "a bad status": b"HMSG client.offline 1 20 20\r\nNATS/1.0 99999999\r\n\r\n\r\n",
    "no numbers": b"MSG client.offline one two\r\n",
    "no words": b"MSG\r\n",
    "a line without an end": b"MSG " + b"a" * (4 * MEBI),
    "garbage": bytes(range(256)) * 4096 + b"\r\n",
    "an INFO that is no JSON": b"INFO nonsense\r\n",
}


@pytest.mark.parametrize("what", LATER)
def test_a_connection_survives_or_is_made_anew(shell: Shell, lie: Callable[[Script], Liar], what: str) -> None:
    liar = lie(says_later(LATER[what]))
    before = resident(shell)
    shell.ask(f"connect nats://127.0.0.1:{liar.port} {OPTIONS}")
    # However it ends: it pings, and nobody answers, so it is lost and made anew, or it never was.
    liar.wait_for(3)
    reply = shell.ask("online alice")
    assert reply["status"] == "OK"
    assert resident(shell) - before < 64 * MEBI
    assert shell.ask("close 300")["status"] in ("OK", "TIMEOUT", "DISCONNECTED", "CLOSED", "INVALID")


def test_floods_of_errors_are_logged_a_few_times(shell: Shell, lie: Callable[[Script], Liar]) -> None:
    def script(client: socket.socket) -> None:
        handshake(client)
        for _ in range(100):
            client.sendall(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n" * 100)
        client.sendall(b"PING\r\n")

    liar = lie(script)
    shell.do(f"connect nats://127.0.0.1:{liar.port} lanes=false connect_timeout_ms=2000")
    shell.ask("close 0")
    logs = [event for event in shell.events if event.get("event") == "LOG"]
    assert len(logs) <= 40, json.dumps(logs[:3])
