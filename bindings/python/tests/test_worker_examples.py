"""Runs the examples of workers: a token generator, a server with the API of OpenAI, and a subprocess."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT, PACKAGE, Server, until
from test_examples import line, started

import nats_presence
from nats_presence import RemoteError

EXAMPLES = PACKAGE / "examples"
PI = "3141592653589793238462643383279502884197169399375105820974944592"


@pytest.fixture
def url(shared_server: Server) -> str:
    return shared_server.url


@pytest.fixture
def gateway(url: str) -> Iterator[nats_presence.Connection]:
    with nats_presence.connect(url) as conn:
        yield conn


def test_token_worker_sends_all_tokens(url: str, gateway: nats_presence.Connection) -> None:
    with started(EXAMPLES / "token_worker.py", NATS_URL=url, TOKENS=str(len(PI))) as worker:
        assert line(worker) == "serving answers"
        assert b"".join(gateway.stream("answers", client_id="a")).decode() == PI
        assert line(worker) == f"a: {len(PI)} of {len(PI)} tokens"


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_token_worker_stops_when_the_client_leaves(url: str, gateway: nats_presence.Connection, executor: str) -> None:
    env = {"NATS_URL": url, "EXECUTOR": executor, "TOKENS": "100000000"}
    with started(EXAMPLES / "token_worker.py", **env) as worker:
        assert line(worker) == "serving answers"
        streams = {name: gateway.stream("answers", client_id=name) for name in "bc"}
        assert [next(stream) for stream in streams.values()] == [b"3", b"3"]
        streams["b"].cancel()
        assert line(worker).startswith("b: ")
        rest = [next(streams["c"]) for _ in PI[1:]]  # The other client's tokens go on.
        assert b"".join(rest).decode() == PI[1:]
        streams["c"].cancel()
        assert line(worker).startswith("c: ")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(LIMIT) == 0


def test_token_worker_that_is_killed_leaves_no_processes(url: str, gateway: nats_presence.Connection) -> None:
    env = {"NATS_URL": url, "EXECUTOR": "processes", "TOKENS": "100000000"}
    with started(EXAMPLES / "token_worker.py", **env) as worker:
        assert line(worker) == "serving answers"
        next(gateway.stream("answers"))
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        assert children
        worker.kill()
        until(lambda: not any(is_running(int(pid)) for pid in children))


class Upstream:
    """A server with the API of OpenAI. It answers with `parts`, and then waits for the end of the connection."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.status = b"200 OK"
        self.breaks_off = False
        self.requests: list[tuple[bytes, Any]] = []
        self.running = self.aborted = 0
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self.run, args=[ready], daemon=True).start()
        ready.wait()

    def run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        self.loop.run_forever()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            parts = self.parts
            waits = b"[DONE]" not in b"".join(parts) and not self.breaks_off
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
            self.requests.append((head, json.loads(await reader.readexactly(length))))
            writer.write(b"HTTP/1.1 %b\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" % self.status)
            for part in parts:  # Each in a packet of its own.
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
            if waits:
                self.running += 1
                await reader.read()
                self.aborted += 1
        writer.close()

    def close(self) -> None:
        """Returns when no connection is left."""
        until(lambda: self.aborted == self.running)
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


def piece(text: str | None) -> bytes:
    event = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


@pytest.fixture(scope="module")
def openai_worker(shared_server: Server, upstream: Upstream) -> Iterator[subprocess.Popen[str]]:
    env = {"NATS_URL": shared_server.url, "SUBJECT": "completions"}
    env |= {"OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": "key", "MODEL": "small"}
    with started(EXAMPLES / "openai_worker.py", **env) as worker:
        assert line(worker) == "serving completions"
        yield worker


def test_openai_worker_forwards_the_answer(
    openai_worker: subprocess.Popen[str], upstream: Upstream, gateway: nats_presence.Connection
) -> None:
    body = b'data: {"choices": [{"delta": {"role": "assistant"}}]}\r\n\r\n: comment\n\n' + piece("one") + piece(None)
    body += piece(" l\u00efne\u2028\u2029\x85 \n\n") + b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'
    for size in (len(body), 7):
        upstream.parts = [body[at : at + size] for at in range(0, len(body), size)]
        pieces = [message.decode() for message in gateway.stream("completions", "Why?", client_id="a")]
        assert pieces == ["one", " l\u00efne\u2028\u2029\x85 \n\n"]
        assert line(openai_worker) == "a: 2 pieces"
    head, request = upstream.requests[0]
    assert head.startswith(b"POST /v1/chat/completions ")
    assert b"authorization: bearer key" in head.lower()
    assert request == {"model": "small", "stream": True, "messages": [{"role": "user", "content": "Why?"}]}


@pytest.mark.parametrize("first", [[], [piece("one")]], ids=["before the first piece", "after it"])
def test_openai_worker_aborts_the_request_when_the_client_leaves(
    openai_worker: subprocess.Popen[str], upstream: Upstream, gateway: nats_presence.Connection, first: list[bytes]
) -> None:
    upstream.status, upstream.parts, upstream.breaks_off = b"200 OK", first, False
    upstream.running = upstream.aborted = 0
    streams = [gateway.stream("completions", client_id=name) for name in "ab"]
    until(lambda: upstream.running == 2)
    for stream in streams[: len(first) * 2]:
        assert next(stream) == b"one"
    streams[0].cancel()
    until(lambda: upstream.aborted == 1)
    assert line(openai_worker) == f"a: {len(first)} pieces"
    streams[1].cancel()
    until(lambda: upstream.aborted == 2)
    line(openai_worker)


@pytest.mark.parametrize(
    ("status", "parts", "text"),
    [
        (b"503 Busy", [b"a secret"], "the model's server answered with status 503"),
        (b"200 OK", [piece("one")], "the model's server ended its answer too early"),
        (b"200 OK", [b"data: no JSON\n"], "the answer of the model's server is broken: JSONDecodeError"),
        (b"200 OK", [b'data: {"error": "a secret"}\n'], "the answer of the model's server is broken: KeyError"),
        (b"200 OK", [b"data: 7\n"], "the answer of the model's server is broken: TypeError"),
    ],
)
def test_openai_worker_reports_an_incomplete_answer(
    openai_worker: subprocess.Popen[str],
    upstream: Upstream,
    gateway: nats_presence.Connection,
    status: bytes,
    parts: list[bytes],
    text: str,
) -> None:
    upstream.status, upstream.parts, upstream.breaks_off = status, parts, True
    with pytest.raises(RemoteError) as caught:
        list(gateway.stream("completions", client_id="a"))
    assert caught.value.message == text
    line(openai_worker)


def test_openai_worker_without_a_server(url: str, gateway: nats_presence.Connection) -> None:
    with started(EXAMPLES / "openai_worker.py", NATS_URL=url, OPENAI_BASE_URL="http://127.0.0.1:1/v1") as worker:
        assert line(worker) == "serving answers"
        with pytest.raises(RemoteError, match="the answer of the model's server is broken: ConnectError"):
            list(gateway.stream("answers", client_id="a"))


@pytest.fixture
def subprocess_worker(url: str) -> Any:
    return lambda command: started(EXAMPLES / "subprocess_worker.py", NATS_URL=url, COMMAND=command, GRACE="0.3")


def test_subprocess_worker_sends_the_output(gateway: nats_presence.Connection, subprocess_worker: Any) -> None:
    with subprocess_worker("tr a-z A-Z") as worker:
        assert line(worker) == "serving answers"
        question = b"many words " * 50_000
        assert b"".join(gateway.stream("answers", question, client_id="a")) == question.upper()
        assert line(worker) == "a: the program ended with status 0"


def test_subprocess_worker_reports_a_failure(gateway: nats_presence.Connection, subprocess_worker: Any) -> None:
    with subprocess_worker("sh -c 'echo one; exit 3'") as worker:
        assert line(worker) == "serving answers"
        stream = gateway.stream("answers", b"x" * 500_000, client_id="a")  # More than a pipe takes.
        assert next(stream) == b"one\n"
        with pytest.raises(RemoteError, match="the program failed with status 3"):
            next(stream)
        assert line(worker) == "a: the program ended with status 3"


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


PROGRAM = """
import os, signal, subprocess, sys, time
kind, is_child = sys.argv[1], len(sys.argv) == 3
print(os.getpid(), flush=True)
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not is_child:
    subprocess.Popen([sys.executable, *sys.argv, "child"])
while kind == "flood" and is_child:
    print("x" * 1000)
time.sleep(1000)
"""


@pytest.mark.parametrize("kind", ["silent", "flood", "deaf"])
def test_subprocess_worker_ends_all_processes_when_the_client_leaves(
    gateway: nats_presence.Connection, subprocess_worker: Any, tmp_path: Path, kind: str
) -> None:
    """A program and its child, which send their process ids first."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with subprocess_worker(f"{sys.executable} {tmp_path}/program.py {kind}") as worker:
        assert line(worker) == "serving answers"
        stream, text = gateway.stream("answers", client_id="a"), b""
        while len(pids := re.findall(rb"^(\d+)$", text, re.MULTILINE)) < 2:
            text += next(stream)
        assert all(map(is_running, map(int, pids)))
        stream.cancel()
        assert line(worker) == f"a: the program ended with status {-9 if kind == 'deaf' else -15}"
        until(lambda: not any(map(is_running, map(int, pids))))
