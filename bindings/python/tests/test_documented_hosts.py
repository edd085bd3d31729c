"""Runs the programs of docs/python-hosts.md without changes, under real web servers, with browsers that leave."""

from __future__ import annotations

import ctypes
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, until

import nats_presence

PROGRAMS = dict(
    re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/python-hosts.md").read_text(), flags=re.DOTALL)
)
SERVERS = {
    "uvicorn": ["serve.py"],
    "uvicorn's own": ["-m", "uvicorn", "--port", "{port}", "--log-level", "error", "app:app"],
    "hypercorn": ["-m", "hypercorn", "--bind", "127.0.0.1:{port}", "--log-level", "error", "app:app"],
    "gunicorn": ["-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--threads", "50", "--log-level", "error", "wsgi:app"],
}
FORGED = "one\n\nevent: evil\ndata: x\r\revent: evil\r\n\r\nevent: evil"


class Worker:
    """A worker that sends one message and, while `waits` is set, waits until its stream is stopped."""

    def __init__(self, url: str) -> None:
        self.message = "begun"
        self.waits = True
        self.running: set[str] = set()
        self.stopped: set[str] = set()
        self.conn = nats_presence.connect(url)
        self.conn.service("answers", threads=100)(self.answer)

    def answer(self, request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        self.running.add(request.client_id)
        sender.send(self.message)
        while self.waits and not sender.closed:
            time.sleep(0.002)
        if sender.closed:
            self.stopped.add(request.client_id)


@pytest.fixture
def worker(url: str) -> Iterator[Worker]:
    worker = Worker(url)
    yield worker
    worker.conn.close()


@contextmanager
def started(kind: str, directory: Path, url: str, keepalive: float = 15) -> Iterator[tuple[str, int]]:
    for name, program in PROGRAMS.items():
        (directory / f"{name}.py").write_text(program)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [word.format(port=port) for word in SERVERS[kind]]
    variables = environment(NATS_URL=url, PORT=str(port), KEEPALIVE=str(keepalive))
    process = subprocess.Popen([sys.executable, *command], cwd=directory, env=variables)
    try:
        deadline = time.monotonic() + LIMIT
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def get(address: tuple[str, int], path: str) -> socket.socket:
    browser = socket.create_connection(address, timeout=LIMIT)
    browser.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return browser


def read(browser: socket.socket, until: bytes) -> bytes:
    """Reads up to and including some bytes."""
    got = b""
    while until not in got:
        more = browser.recv(4096)
        assert more, got
        got += more
    return got


ROUTES = [
    *(("events", server) for server in SERVERS),
    *((route, server) for route in ("gathered", "threads") for server in SERVERS if server != "gunicorn"),
]


@pytest.mark.parametrize(("route", "kind"), ROUTES)
def test_a_browser_that_leaves_stops_its_worker(
    worker: Worker, url: str, tmp_path: Path, route: str, kind: str
) -> None:
    # WSGI servers detect it when they send a comment.
    with started(kind, tmp_path, url, keepalive=0.1 if kind == "gunicorn" else 15) as address:
        browsers = [get(address, f"/{route}/{number}") for number in range(45)]  # anyio has 40 threads
        until(lambda: len(worker.running) >= (40 if route == "threads" else 45))
        for browser in browsers:
            browser.close()
        until(lambda: worker.stopped >= worker.running)
        worker.waits = False
        with get(address, f"/{route}/last") as browser:  # The server still answers.
            read(browser, b"begun")


@pytest.mark.parametrize("kind", SERVERS)
def test_a_message_cannot_forge_an_event(worker: Worker, url: str, tmp_path: Path, kind: str) -> None:
    worker.message, worker.waits = FORGED, False
    with started(kind, tmp_path, url) as address, get(address, "/events/tab") as browser:
        got = read(browser, b"event: end\ndata:\n\n")
    fields = [line.partition(b":")[0] for line in re.split(b"\r\n|\r|\n", got.partition(b"\r\n\r\n")[2])]
    assert fields.count(b"event") == 1, got
    lines = re.findall(rb"(?:^|\n)data: ?([^\r\n]*)", got)
    assert lines[:-1] == [b"one", b"", b"event: evil", b"data: x", b"", b"event: evil", b"", b"event: evil"]


@pytest.mark.parametrize("kind", SERVERS)
def test_comments_keep_a_silent_connection_open(worker: Worker, url: str, tmp_path: Path, kind: str) -> None:
    with started(kind, tmp_path, url, keepalive=0.05) as address, get(address, "/events/tab") as browser:
        got = read(browser, b": keep-alive\n\n")
        assert b"data: begun\n\n" in got
        read(browser, b": keep-alive\n\n")
        assert not worker.stopped


def vanish(browser: socket.socket) -> None:
    """Lets the kernel drop all packets for this socket. Like a machine without power, it sends no FIN, RST or ACK."""
    drop = struct.pack("HBBI", 0x06, 0, 0, 0)  # of BPF: return 0
    buffer = ctypes.create_string_buffer(drop)
    SO_ATTACH_FILTER = 26
    browser.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(buffer)))


def test_a_browser_that_vanishes_is_detected(worker: Worker, url: str, tmp_path: Path) -> None:
    with started("uvicorn", tmp_path, url, keepalive=0.3) as address, get(address, "/events/tab") as browser:
        read(browser, b"begun")
        vanish(browser)
        until(lambda: worker.stopped == {"tab"})


def test_a_failed_stream_does_not_look_complete(worker: Worker, url: str, tmp_path: Path) -> None:
    with started("uvicorn", tmp_path, url) as address, get(address, "/events/tab") as browser:
        read(browser, b"begun")
        threading.Thread(target=worker.conn.close).start()
        read(browser, b"event: error\ndata:\n\n")
