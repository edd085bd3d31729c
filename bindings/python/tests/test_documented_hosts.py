"""Runs the programs of docs/python-hosts.md without changes, under real web servers, with browsers that leave."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT, ROOT, Server, environment, until

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
Address = tuple[str, int]
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
        try:
            sender.send(self.message)  # Raises if the browser has left already.
            while self.waits and not sender.closed:
                time.sleep(0.002)
        finally:
            if sender.closed:
                self.stopped.add(request.client_id)


@pytest.fixture
def worker(shared_server: Server) -> Iterator[Worker]:
    worker = Worker(shared_server.url)
    yield worker
    worker.conn.close()


class WebServers:
    """Web servers that run the documented programs. Tests that need the same one share it."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        for name, program in PROGRAMS.items():
            (directory / f"{name}.py").write_text(program)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.started: dict[tuple[str, float, str], Address] = {}

    def __call__(self, kind: str, keepalive: float | None = None, only_for: str = "") -> Address:
        if keepalive is None:  # WSGI servers detect that a browser has left when they send a comment.
            keepalive = 0.1 if kind == "gunicorn" else 15
        key = kind, keepalive, only_for
        if key not in self.started:
            self.started[key] = self.start(kind, keepalive)
        return self.started[key]

    def start(self, kind: str, keepalive: float) -> Address:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [word.format(port=port) for word in SERVERS[kind]]
        variables = environment(NATS_URL=self.url, PORT=str(port), KEEPALIVE=str(keepalive))
        process = subprocess.Popen([sys.executable, *command], cwd=self.directory, env=variables)
        self.processes.append(process)
        deadline = time.monotonic() + 6 * LIMIT  # To import the frameworks takes long on a machine that is busy.
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return "127.0.0.1", port
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def start(shared_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServers]:
    servers = WebServers(shared_server.url, tmp_path_factory.mktemp("programs"))
    yield servers
    servers.stop()


def get(address: Address, path: str) -> socket.socket:
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
    *((route, server) for route in ("plain", "gathered", "threads") for server in SERVERS if server != "gunicorn"),
]


@pytest.mark.parametrize(("route", "kind"), ROUTES)
def test_a_browser_that_leaves_stops_its_worker(worker: Worker, start: WebServers, route: str, kind: str) -> None:
    # Of "threads" some requests still wait for a thread at the end, which would disturb other tests.
    address = start(kind, only_for=route if route == "threads" else "")
    browsers = [get(address, f"/{route}/{number}") for number in range(45)]  # anyio has 40 threads
    until(lambda: len(worker.running) >= (40 if route == "threads" else 45))
    for browser in browsers:
        browser.close()
    until(lambda: worker.stopped >= worker.running)
    worker.waits = False
    with get(address, f"/{route}/last") as browser:  # The server still answers.
        read(browser, b"begun")


@pytest.mark.parametrize("route", ["events", "threads"])
def test_a_browser_that_leaves_during_a_send_stops_its_worker(
    worker: Worker, shared_server: Server, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """The request is cancelled while the generator of its body is suspended, and Starlette's exceptions refer to it."""
    monkeypatch.setenv("NATS_URL", shared_server.url)
    program: dict[str, Any] = {}
    exec(PROGRAMS["app"], program)
    app = program["app"]

    async def main() -> None:
        sending = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await sending.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if b"data:" in message.get("body", b""):
                sending.set()
                await asyncio.Event().wait()

        path = f"/{route}/tab"
        request = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        async with program["lifespan"](app):
            await app({**request, "headers": [], "asgi": {"version": "3.0"}}, receive, send)
            await asyncio.to_thread(until, lambda: worker.stopped == {"tab"})

    gc.disable()  # It would close the generator at some time.
    try:
        asyncio.run(asyncio.wait_for(main(), 2 * LIMIT))
    finally:
        gc.enable()
        if route == "threads":
            app.state.threads_conn.close()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_message_cannot_forge_an_event(worker: Worker, start: WebServers, kind: str) -> None:
    worker.message, worker.waits = FORGED, False
    with get(start(kind), "/events/tab") as browser:
        got = read(browser, b"event: end\ndata: \n\n")
    fields = [line.partition(b":")[0] for line in re.split(b"\r\n|\r|\n", got.partition(b"\r\n\r\n")[2])]
    assert fields.count(b"event") == 1, got
    lines = re.findall(rb"(?:^|\n)data: ?([^\r\n]*)", got)
    assert lines[:-1] == [b"one", b"", b"event: evil", b"data: x", b"", b"event: evil", b"", b"event: evil"]


@pytest.mark.parametrize("kind", SERVERS)
def test_comments_keep_a_silent_connection_open(worker: Worker, start: WebServers, kind: str) -> None:
    with get(start(kind, keepalive=0.05), "/events/tab") as browser:
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


def test_a_browser_that_vanishes_is_detected(worker: Worker, start: WebServers) -> None:
    with get(start("uvicorn", keepalive=0.3), "/events/tab") as browser:
        read(browser, b"begun")
        vanish(browser)
        until(lambda: worker.stopped == {"tab"})


def test_a_failed_stream_does_not_look_complete(worker: Worker, start: WebServers) -> None:
    with get(start("uvicorn"), "/events/tab") as browser:
        read(browser, b"begun")
        threading.Thread(target=worker.conn.close).start()
        read(browser, b"event: failure\ndata: ")
