"""Clients leave an HTTP server: measures whether and how soon their workers stop.

    leave.py [CLIENTS [SERVER [FORM [SUBJECT]]]]     default: 500 clients, every server, every form, every worker

The servers run asgi_app.py in a process of their own. The worker runs here; its handler is cancelled to stop it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from conftest import LIMIT, Server, environment  # noqa: E402

from nats_presence import Request, aio  # noqa: E402

SERVERS = {
    "uvicorn": ["uvicorn", "--port", "{port}", "--log-level", "error", "asgi_app:app"],
    "hypercorn": ["hypercorn", "--bind", "127.0.0.1:{port}", "--log-level", "error", "asgi_app:app"],
    "granian": ["granian", "--interface", "asgi", "--port", "{port}", "--log-level", "error", "asgi_app:app"],
}
FORMS = ["response", "bare", "loop", "block", "closing", "expression", "sse-bare", "sse"]
SUBJECTS = ["silent", "chatty", "flood"]
"""The worker sends one message, one every 5 ms, or so many that the server has to wait until its clients read."""


class Outcome(NamedTuple):
    """How the workers of the clients stopped."""

    stopped: int
    seconds: list[float]
    """For each worker that stopped, how long it went on after its client had left; sorted."""

    def at(self, part: float) -> float:
        return self.seconds[min(int(len(self.seconds) * part), len(self.seconds) - 1)] if self.seconds else float("nan")


@contextmanager
def started(server: str, url: str) -> Iterator[int]:
    """Starts a server, and yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [word.format(port=port) for word in SERVERS[server]]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=HERE,
        env=environment(NATS_URL=url),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 6 * LIMIT  # To import the frameworks takes long on a machine that is busy.
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, f"{server} exited"
            assert time.monotonic() < deadline, f"{server} does not listen on its port"
            time.sleep(0.02)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # The process group includes the server's worker processes.
        process.wait()


async def leave(conn: aio.Connection, port: int, form: str, subject: str, clients: int, timeout: float) -> Outcome:
    """Lets clients connect, read their first message, and leave."""
    stopped: dict[str, float] = {}
    pause = {"silent": 3600, "chatty": 0.005, "flood": 0}[subject]
    filling = "data: " + "x" * 50_000 + "\n\n" if subject == "flood" else ""

    async def answer(request: Request, sender: aio.Sender) -> None:
        try:
            while True:
                await sender.send("data: more\n\n" + filling)
                await asyncio.sleep(pause)
        finally:
            stopped[request.client_id] = time.monotonic()

    name = f"{subject}-{port}-{form}"
    await conn.serve(name, answer, max_streams=100_000)
    left: dict[str, float] = {}

    async def come(number: int) -> asyncio.StreamWriter:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(f"GET /{form}/{name}/{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"more"), LIMIT)
        if subject == "flood":
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        return writer

    writers: list[asyncio.StreamWriter] = []
    for start in range(0, clients, 50):
        writers += await asyncio.gather(*map(come, range(start, min(start + 50, clients))))
    if subject == "flood":
        await asyncio.sleep(0.5)  # Until the buffers of the systems are full; their sizes are unknown.
    for number, writer in enumerate(writers):
        if number % 2:  # A reset instead of a FIN.
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        left[str(number)] = time.monotonic()
        writer.transport.abort()
        if number % 2:
            await asyncio.sleep(0.002)
    deadline = time.monotonic() + timeout
    while len(stopped) < clients and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return Outcome(len(stopped), sorted(at - left[number] for number, at in stopped.items()))


def trial(
    url: str, server: str, cases: Iterable[tuple[str, str]], clients: int, timeout: float = 5
) -> Iterator[tuple[str, str, Outcome]]:
    """Runs each case, a form and a subject, with clients of its own on the same server."""

    async def run(form: str, subject: str) -> Outcome:
        async with aio.connect(url) as conn:
            return await leave(conn, port, form, subject, clients, timeout)

    with started(server, url) as port:
        for form, subject in cases:
            yield form, subject, asyncio.run(run(form, subject))


def main(clients: str = "500", server: str = "", form: str = "", subject: str = "") -> None:
    cases = list(itertools.product([form] if form else FORMS, [subject] if subject else SUBJECTS))
    with tempfile.TemporaryDirectory() as directory:
        nats = Server(Path(directory))
        try:
            for one in [server] if server else SERVERS:
                for kind, worker, outcome in trial(nats.url, one, cases, int(clients)):
                    print(
                        f"{one:10} {kind:11} {worker:7} {outcome.stopped:4} of {clients} stopped,"
                        f" p50 {outcome.at(0.5) * 1000:6.1f} ms, p99 {outcome.at(0.99) * 1000:6.1f} ms",
                        flush=True,
                    )
        finally:
            nats.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
