"""However a reader leaves a stream, its worker stops at once, without the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Callable

import anyio
import pytest
from conftest import LIMIT, run_python, until
from test_aio import failure
from test_process import SETUP, finish, ready

import nats_presence
from nats_presence import BusyError, ClosedError, PresenceTimeoutError, RemoteError, StreamCancelledError, aio

Reader = Callable[[aio.Connection], Coroutine[Any, Any, object]]


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Worker:
    """A worker that sends one message and waits until its stream is stopped."""

    def __init__(self, url: str, lanes: bool = True) -> None:
        self.begun, self.stopped = threading.Event(), threading.Event()
        self.go = threading.Event()
        self.conn = nats_presence.connect(url, lanes=lanes)
        self.conn.service("answers")(self.answer)

    def answer(self, request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        sender.send("first")
        self.begun.set()
        while not sender.closed and not self.go.wait(0.002):
            pass
        if self.go.is_set():
            sender.send("second")
        else:
            self.stopped.set()

    async def wait(self, event: threading.Event) -> None:
        while not event.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.fixture
def worker(url: str, lanes: bool) -> Iterator[Worker]:
    worker = Worker(url, lanes)
    yield worker
    worker.conn.close()


def run(url: str, lanes: bool, main: Reader) -> None:
    async def with_connection() -> None:
        async with aio.connect(url, lanes=lanes) as conn:
            await main(conn)

    asyncio.run(asyncio.wait_for(with_connection(), LIMIT))


async def plain_loop(conn: aio.Connection) -> None:
    async for _ in conn.stream("answers", client_id="tab"):
        pass


async def of_a_name(conn: aio.Connection) -> None:
    stream = conn.stream("answers", client_id="tab")
    async for _ in stream:
        pass


async def of_a_generator(conn: aio.Connection) -> None:
    async def messages() -> AsyncIterator[bytes]:
        async for message in conn.stream("answers", client_id="tab"):
            yield message

    async for _ in messages():
        pass


async def of_an_expression(conn: aio.Connection) -> None:
    async for _ in (message.decode() async for message in conn.stream("answers", client_id="tab")):
        pass


async def by_next(conn: aio.Connection) -> None:
    stream = conn.stream("answers", client_id="tab")
    while await stream.next() is not None:
        pass


async def by_next_with_a_timeout(conn: aio.Connection) -> None:
    stream = conn.stream("answers", client_id="tab")
    while await stream.next(timeout=3600) is not None:
        pass


async def between_two_messages(conn: aio.Connection) -> None:
    """The generator is suspended and never closed, so that it leaves neither its block nor its loop."""

    async def messages() -> AsyncIterator[bytes]:
        async with conn.stream("answers", client_id="tab") as stream:
            async for message in stream:
                yield message

    suspended = messages()
    kept.append(suspended)
    # The task has waited for the worker before. Now it waits for something else than the stream.
    async for _ in suspended:
        await asyncio.sleep(3600)


async def without_waiting(conn: aio.Connection) -> None:
    """A message is always there, so that the task never waits for the stream."""
    stream = conn.stream("answers", client_id="tab")
    while not stream._messages:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    kept.append(stream)
    async for _ in stream:
        await asyncio.sleep(3600)


READERS: list[Reader] = [
    plain_loop, of_a_name, of_a_generator, of_an_expression, by_next, by_next_with_a_timeout, without_waiting,
    between_two_messages,
]  # fmt: skip
kept: list[object] = []
"""Objects that keep frames and their variables alive: generators, and exceptions as frameworks and notebooks do."""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    kept.clear()


@pytest.mark.parametrize("reader", READERS)
def test_cancelling_the_reading_task_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: Reader) -> None:
    async def main(conn: aio.Connection) -> None:
        task = asyncio.create_task(reader(conn))
        kept.append(task)
        await worker.wait(worker.begun)
        await asyncio.sleep(0.02)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError as cancelled:
            kept.append(cancelled)
        await worker.wait(worker.stopped)

    run(url, lanes, main)


@pytest.mark.parametrize("reader", READERS)
def test_cancelling_a_gathered_task_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: Reader) -> None:
    async def main(conn: aio.Connection) -> None:
        task = asyncio.create_task(reader(conn))
        gathering = asyncio.gather(task, asyncio.sleep(0), return_exceptions=True)
        await worker.wait(worker.begun)
        await asyncio.sleep(0.02)
        task.cancel()
        kept.append(await gathering)
        await worker.wait(worker.stopped)

    run(url, lanes, main)


@pytest.mark.parametrize("reader", READERS[:-2])
def test_a_wait_for_timeout_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: Reader) -> None:
    async def main(conn: aio.Connection) -> None:
        try:
            await asyncio.wait_for(reader(conn), 0.2)
        except asyncio.TimeoutError:
            await worker.wait(worker.stopped)

    run(url, lanes, main)


@pytest.mark.parametrize("reader", READERS[:-2])
def test_a_cancelled_scope_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: Reader) -> None:
    async def main(conn: aio.Connection) -> None:
        try:
            with anyio.fail_after(0.2):
                await reader(conn)
        except TimeoutError:
            await worker.wait(worker.stopped)

    run(url, lanes, main)


@pytest.mark.parametrize("reader", READERS)
def test_a_cancelled_task_group_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: Reader) -> None:
    async def main(conn: aio.Connection) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(reader, conn)
            await worker.wait(worker.begun)
            await asyncio.sleep(0.02)
            group.cancel_scope.cancel()
        await worker.wait(worker.stopped)

    run(url, lanes, main)


@pytest.mark.parametrize("reader", READERS[:-2])
def test_closing_the_reading_coroutine_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: Reader) -> None:
    """A loop that ends with pending tasks does so."""

    async def main(conn: aio.Connection) -> None:
        coroutine = reader(conn)
        waits_for = coroutine.send(None)
        await worker.wait(worker.begun)
        coroutine.close()
        kept.append(waits_for)
        await worker.wait(worker.stopped)

    run(url, lanes, main)


@pytest.mark.parametrize("leave", [contextlib.aclosing, lambda stream: stream])
def test_leaving_the_block_stops_the_worker(
    worker: Worker, url: str, lanes: bool, leave: Callable[[aio.Stream], Any]
) -> None:
    async def main(conn: aio.Connection) -> None:
        async with leave(conn.stream("answers", client_id="tab")) as stream:
            kept.append(stream)
            async for message in stream:
                assert message == b"first"
                break
        await worker.wait(worker.stopped)
        assert isinstance(await failure(stream), StreamCancelledError)
        with pytest.raises(ClosedError):
            await stream.next()

    run(url, lanes, main)


def test_cancelling_a_former_reader_does_not_cancel_the_stream(worker: Worker, url: str, lanes: bool) -> None:
    """Neither a task that passed the stream on and is then cancelled, nor one that has returned, cancels it."""

    async def main(conn: aio.Connection) -> None:
        stream = conn.stream("answers", client_id="tab")

        async def begin() -> None:
            assert await stream.next() == b"first"
            await asyncio.sleep(3600)

        async def wait_a_little() -> None:
            with pytest.raises(PresenceTimeoutError):
                await stream.next(timeout=0.01)

        beginner = asyncio.create_task(begin())
        await worker.wait(worker.begun)
        await asyncio.sleep(0.02)
        await asyncio.create_task(wait_a_little())
        beginner.cancel()
        await asyncio.wait([beginner])
        worker.go.set()
        assert [message async for message in stream] == [b"second"]

    run(url, lanes, main)


def test_next_can_be_called_again_after_its_timeout(worker: Worker, url: str, lanes: bool) -> None:
    async def main(conn: aio.Connection) -> None:
        stream = conn.stream("answers", client_id="tab")
        assert await stream.next(timeout=LIMIT) == b"first"
        for timeout in (0, 0.01, 0.05):
            with pytest.raises(TimeoutError, match="goes on"):
                await stream.next(timeout)
        assert not worker.stopped.is_set()
        worker.go.set()
        assert await stream.next(LIMIT) == b"second"
        assert await stream.next(LIMIT) is None
        assert await stream.next() is None

    run(url, lanes, main)


def test_next_raises_closed_after_the_stream_failed(worker: Worker, url: str, lanes: bool) -> None:
    async def main(conn: aio.Connection) -> None:
        stream = conn.stream("answers", client_id="tab", timeout=0.2)
        assert await stream.next() == b"first"
        with pytest.raises(PresenceTimeoutError):  # The timeout of the stream, not of next().
            await stream.next(LIMIT)
        with pytest.raises(ClosedError):
            await stream.next(LIMIT)

    run(url, lanes, main)


def test_a_second_reading_task_gets_busy(worker: Worker, url: str, lanes: bool) -> None:
    async def main(conn: aio.Connection) -> None:
        stream = conn.stream("answers", client_id="tab")
        assert await stream.next() == b"first"
        reader = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        for reading in (stream.next(), stream.__anext__(), stream.next(0.01)):
            with pytest.raises(BusyError):
                await reading
        worker.go.set()
        assert await reader == b"second"
        assert await stream.next() is None

    run(url, lanes, main)


def test_the_waiting_task_gets_the_end(url: str) -> None:
    """The end wakes the waiting task. Another task that reads before the first one runs does not take the end."""

    async def main(conn: aio.Connection) -> None:
        async def fail(request: nats_presence.Request, sender: aio.Sender) -> None:
            sender.error("why")

        await conn.serve("fails", fail)

        stream = conn.stream("fails")
        reader = asyncio.create_task(stream.__anext__())
        while not stream._ended:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if not reader.done():
            with pytest.raises(BusyError):
                await stream.__anext__()
        with pytest.raises(RemoteError, match="why"):
            await reader

    run(url, True, main)


SYNC_READERS = {
    "loop": "for message in conn.stream('answers', client_id='tab'): pass",
    "list": "list(conn.stream('answers', client_id='tab'))",
    "expression": "sum(len(m) for m in conn.stream('answers', client_id='tab'))",
    "next": "next(itertools.islice(conn.stream('answers', client_id='tab'), 1, None))",
    "block": """
        with conn.stream('answers', client_id='tab') as stream:
            for message in stream: pass""",
    "closing": """
        with contextlib.closing(conn.stream('answers', client_id='tab')) as stream:
            for message in stream: pass""",
}


@pytest.mark.parametrize("reader", SYNC_READERS.values(), ids=SYNC_READERS)
def test_an_interrupted_read_stops_the_worker(worker: Worker, url: str, lanes: bool, reader: str) -> None:
    """As in a notebook, which keeps the exception of its last cell.

    The interrupt arrives while the reader waits. Between two messages it could leave the stream in a frame of an
    expression.
    """
    code = f"""
import contextlib, gc, itertools
gc.disable()

def interrupt(number, frame):
    if "nats_presence" in frame.f_code.co_filename and frame.f_code.co_name == "wait":
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, 0.001)

signal.signal(signal.SIGALRM, interrupt)
signal.signal(signal.SIGINT, interrupt)
with nats_presence.connect(url, lanes={lanes}) as conn:
    try:
        print("ready", flush=True)
        {reader}
    except KeyboardInterrupt as interrupt:
        sys.last_value = interrupt
    input()
"""
    process = ready(run_python(SETUP + code, url, stdin=subprocess.PIPE))
    assert worker.begun.wait(LIMIT)
    process.send_signal(signal.SIGINT)
    assert worker.stopped.wait(LIMIT)
    assert process.stdin is not None
    process.stdin.write("\n")
    assert finish(process) == (0, "", "")


def test_an_exception_in_the_loop_stops_the_worker(worker: Worker, url: str, lanes: bool) -> None:
    with nats_presence.connect(url, lanes=lanes) as conn:
        try:
            for _ in conn.stream("answers", client_id="tab"):
                raise ValueError("the caller's")
        except ValueError as error:
            kept.append(error)
        assert worker.stopped.wait(LIMIT)


def test_next_in_a_thread_can_be_called_again_after_its_timeout(worker: Worker, url: str, lanes: bool) -> None:
    with nats_presence.connect(url, lanes=lanes) as conn:
        stream = conn.stream("answers", client_id="tab")
        assert stream.next(timeout=LIMIT) == b"first"
        for timeout in (0, 0.01, 0.25):
            with pytest.raises(TimeoutError, match="goes on"):
                stream.next(timeout)
        worker.go.set()
        assert stream.next(LIMIT) == b"second"
        assert stream.next(LIMIT) is None
        assert stream.next() is None
        failed = conn.stream("nobody")
        with pytest.raises(nats_presence.NoRespondersError):
            failed.next()
        with pytest.raises(ClosedError):
            failed.next()


def test_a_wsgi_server_closes_the_stream(worker: Worker, url: str, lanes: bool) -> None:
    """WSGI servers call close() when the client has left. This is wsgiref, on which others are based."""
    from wsgiref.handlers import SimpleHandler

    class Gone(SimpleHandler):
        def _write(self, data: bytes) -> None:
            raise BrokenPipeError

        def log_exception(self, exc_info: Any) -> None:
            kept.append(exc_info)

    with nats_presence.connect(url, lanes=lanes) as conn:
        stream = conn.stream("answers", client_id="tab")

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            return stream

        Gone(sys.stdin.buffer, sys.stdout.buffer, sys.stderr, {}).run(app)
        until(worker.stopped.is_set)
