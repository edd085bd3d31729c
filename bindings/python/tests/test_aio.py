"""Workers and gateways with asyncio, over a real nats-server."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from typing import Any, Callable

import pytest
from conftest import LIMIT, Server, Stalled
from conftest import until as sync_until
from test_sync import AS_SENT, MIXED

import nats_presence
from nats_presence import (
    BusyError,
    ClosedError,
    ConnectionEvent,
    DisconnectedError,
    FullError,
    HandlerError,
    NoRespondersError,
    OfflineError,
    PresenceError,
    PresenceTimeoutError,
    RemoteError,
    Request,
    StreamCancelledError,
    aio,
    is_client_online,
    mark_client_offline,
    online_count,
)
from nats_presence._arguments import Payload
from nats_presence._loop import run_in_thread
from nats_presence.aio import Connection, Sender, Stream

Test = Callable[[Connection], Coroutine[Any, Any, None]]


@pytest.fixture
def run(url: str, lanes: bool) -> Callable[[Test], None]:
    """Runs a coroutine with a connection, and checks that it leaves no tasks and no clients behind."""

    def run(test: Test) -> None:
        async def main() -> None:
            async with aio.connect(url, name="test", lanes=lanes) as conn:
                await test(conn)
            assert not conn._tasks
            gc.collect()
            assert online_count() == 0

        asyncio.run(asyncio.wait_for(main(), 3 * LIMIT))

    return run


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), LIMIT)


async def received(stream: Stream) -> list[bytes]:
    return [message async for message in stream]


async def failure(stream: Stream) -> PresenceError:
    """Reads a stream to its end, and returns the error. Reading again then shows a normal end."""
    with pytest.raises(PresenceError) as caught:
        await received(stream)
    assert await received(stream) == []
    return caught.value


async def send_for_ever(request: Request, sender: Sender) -> None:
    while True:
        await sender.send("more")
        await asyncio.sleep(0.001)


def test_messages_arrive_in_order_and_complete(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        seen: list[tuple[Request, Sender]] = []

        async def handler(request: Request, sender: Sender) -> None:
            seen.append((request, sender))
            await sender.send("text Ü")
            await sender.send(memoryview(b"_view_")[1:-1])
            await sender.send_many([b"%d" % n for n in range(1000)])

        await conn.serve("answers.*", handler, queue="workers")

        stream = conn.stream("answers.one", "question", client_id="Ünï", headers={"X-Model": "small"})
        assert is_client_online("Ünï")
        assert await received(stream) == ["text Ü".encode(), b"view"] + [b"%d" % n for n in range(1000)]
        assert await received(stream) == []
        ((request, sender),) = seen
        assert (request.client_id, request.subject, request.data) == ("Ünï", "answers.one", b"question")
        assert request.header("X-Model") == "small"
        assert sender.send_count == 1002
        assert sender.closed
        with pytest.raises(ClosedError):
            await sender.send("late")
        assert await received(conn.stream("answers.two")) != []
        assert seen[1][0].client_id == ""

    run(test)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_send_many_sends_the_same_messages_as_send(
    run: Callable[[Test], None], kind: Callable[[list[Payload]], Any]
) -> None:
    async def test(conn: Connection) -> None:
        async def handler(request: Request, sender: Sender) -> None:
            for messages in (MIXED, [], AS_SENT):
                await sender.send_many(kind(messages))
            assert sender.send_count == 2 * len(MIXED)

        await conn.serve("answers", handler)

        assert await received(conn.stream("answers")) == AS_SENT * 2

    run(test)


def test_send_many_ignores_later_changes_of_the_list(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        async def handler(request: Request, sender: Sender) -> None:
            messages = [b"x" * 1000] * 3000
            sending = asyncio.ensure_future(sender.send_many(messages))
            await asyncio.sleep(0)
            assert 0 < sender.send_count < 3000
            messages.append(b"late")
            await sending

        await conn.serve("answers", handler)

        assert await received(conn.stream("answers")) == [b"x" * 1000] * 3000

    run(test)


def test_a_cancelled_send_has_not_sent(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        async def handler(request: Request, sender: Sender) -> None:
            for number in range(1000):
                task = asyncio.ensure_future(sender.send(b"%d" % number))
                await asyncio.sleep(0)
                if task.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    await sender.send(b"%d" % number)

        await conn.serve("answers", handler)

        assert await received(conn.stream("answers")) == [b"%d" % number for number in range(1000)]

    run(test)


def test_many_sends_yield_to_the_loop(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        turns = 0

        async def handler(request: Request, sender: Sender) -> None:
            nonlocal turns
            before = turns
            await sender.send_many([b"x"] * 50_000)
            for _ in range(5000):
                await sender.send(b"x")
            assert turns - before > 50

        await conn.serve("answers", handler)

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.create_task(turn())
        assert len(await received(conn.stream("answers"))) == 55_000
        turning.cancel()

    run(test)


def test_a_client_that_leaves_cancels_its_handler(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        outcome: asyncio.Queue[Any] = asyncio.Queue()

        async def handler(request: Request, sender: Sender) -> None:
            await sender.send("begun")
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError as cancelled:
                outcome.put_nowait(str(cancelled))
            try:
                await sender.send("more")
            except PresenceError as refused:
                outcome.put_nowait(refused)

        await conn.serve("answers", handler)

        stream = conn.stream("answers", client_id="tab")
        assert await stream.__anext__() == b"begun"
        mark_client_offline("tab")
        assert isinstance(await failure(stream), OfflineError)
        assert await outcome.get() == "client is offline"
        refused = await outcome.get()
        assert isinstance(refused, OfflineError)
        assert "'tab'" in refused.message

    run(test)


async def leave_the_loop(conn: Connection) -> None:
    async for message in conn.stream("answers", client_id="tab"):
        assert message == b"more"
        break


async def leave_the_block(conn: Connection) -> None:
    async with conn.stream("answers", client_id="tab") as stream:
        await stream.__anext__()
    assert isinstance(await failure(stream), StreamCancelledError)
    stream.cancel()


async def cancel_the_reader(conn: Connection) -> None:
    task = asyncio.create_task(received(conn.stream("answers", client_id="tab")))
    await until(lambda: conn.stats()["messages_in"] > 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [leave_the_loop, leave_the_block, cancel_the_reader])
def test_leaving_a_stream_stops_its_sender(run: Callable[[Test], None], lanes: bool, leave: Test) -> None:
    async def test(conn: Connection) -> None:
        stopped = asyncio.Event()

        async def handler(request: Request, sender: Sender) -> None:
            try:
                await send_for_ever(request, sender)
            finally:
                assert sender.status == (StreamCancelledError if lanes else OfflineError).status
                stopped.set()

        await conn.serve("answers", handler)

        await leave(conn)
        await asyncio.wait_for(stopped.wait(), LIMIT)
        await until(lambda: conn.stats()["senders"] == 0 == conn.stats()["streams"])

    run(test)


@pytest.mark.parametrize("send_errors", [False, True])
def test_a_handlers_exception_ends_the_stream_with_an_error(
    run: Callable[[Test], None], caplog: pytest.LogCaptureFixture, send_errors: bool
) -> None:
    async def test(conn: Connection) -> None:
        async def handler(request: Request, sender: Sender) -> None:
            await sender.send("part")
            raise ValueError("no such model: ü, password=hunter2")

        await conn.serve("answers", handler, send_errors=send_errors)

        stream = conn.stream("answers")
        assert await stream.__anext__() == b"part"
        error = await failure(stream)
        assert isinstance(error, RemoteError)
        assert error.message == ("no such model: ü, password=hunter2" if send_errors else "the handler failed")
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "hunter2" in caplog.text

    run(test)


def test_a_handler_sends_an_error_with_a_code(run: Callable[[Test], None], caplog: pytest.LogCaptureFixture) -> None:
    async def test(conn: Connection) -> None:
        async def as_generator(request: Request, sender: Sender) -> AsyncIterator[str]:
            yield "part"
            raise HandlerError("no such model: ü", code=2**31 - 1)

        async def by_sender(request: Request, sender: Sender) -> None:
            sender.error("no such model: ü", code=2**31 - 1)

        async def busy(request: Request, sender: Sender) -> None:
            raise HandlerError("server busy", code=7)

        handlers: list[tuple[str, Any, int, str, int]] = [
            ("generator", as_generator, RemoteError.status, "no such model: ü", 2**31 - 1),
            ("sender", by_sender, RemoteError.status, "no such model: ü", 2**31 - 1),
            ("busy", busy, BusyError.status, "server busy", 7),
        ]
        for subject, handler, status, message, code in handlers:
            await conn.serve(subject, handler)
            error = await failure(conn.stream(subject))
            assert (error.status, error.message, error.code) == (status, message, code)
        assert not caplog.records

    run(test)


def test_a_handler_that_cancels_itself_ends_its_stream(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        async def handler(request: Request, sender: Sender) -> None:
            raise asyncio.CancelledError

        await conn.serve("answers", handler)

        assert isinstance(await failure(conn.stream("answers")), RemoteError)

    run(test)


def test_a_detached_sender_answers_later_from_another_task(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        returned = asyncio.Event()
        tasks = []

        async def answer_later(sender: Sender) -> None:
            await returned.wait()
            await sender.send("late")
            sender.end()

        async def handler(request: Request, sender: Sender) -> None:
            sender.detach()
            tasks.append(asyncio.create_task(answer_later(sender)))

        await conn.serve("answers", handler)

        async def forget(request: Request, sender: Sender) -> None:
            sender.detach()

        await conn.serve("forgotten", forget)

        stream = conn.stream("answers")
        error = await failure(conn.stream("forgotten"))
        assert isinstance(error, RemoteError)
        assert "unfinished" in error.message
        returned.set()
        assert await received(stream) == [b"late"]
        await asyncio.gather(*tasks)

    run(test)


def test_no_responders_busy_and_timeout(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        assert isinstance(await failure(conn.stream("nobody")), NoRespondersError)
        stopped = asyncio.Event()

        async def handler(request: Request, sender: Sender) -> None:
            await sender.send("begun")
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.set()

        await conn.serve("answers", handler, max_streams=1)

        stream = conn.stream("answers", client_id="tab", timeout=0.2)
        assert await stream.__anext__() == b"begun"
        busy = await failure(conn.stream("answers"))
        assert isinstance(busy, (BusyError, RemoteError))
        assert "busy" in busy.message
        assert isinstance(await failure(stream), PresenceTimeoutError)
        await asyncio.wait_for(stopped.wait(), LIMIT)

    run(test)


@pytest.mark.parametrize("lanes", [False], indirect=True, ids=["level 0"])
def test_on_level_0_only_the_slow_readers_stream_ends(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        stopped = asyncio.Event()

        async def handler(request: Request, sender: Sender) -> None:
            try:
                await sender.send_many([b"x" * 1000] * 10)
                await asyncio.sleep(3600)
            finally:
                stopped.set()

        await conn.serve("answers", handler)

        slow = conn.stream("answers", client_id="slow", stream_buffer_bytes=5 * 1064)
        fast = conn.stream("answers", client_id="fast")
        assert [await fast.__anext__() for _ in range(10)] == [b"x" * 1000] * 10
        await asyncio.wait_for(stopped.wait(), LIMIT)
        assert [await slow.__anext__() for _ in range(5)] == [b"x" * 1000] * 5
        assert isinstance(await failure(slow), FullError)
        assert not fast._ended
        fast.cancel()

    run(test)


def test_reading_returns_credit(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        read = asyncio.Semaphore(5)

        async def handler(request: Request, sender: Sender) -> None:
            for _ in range(50):
                await read.acquire()
                await sender.send(b"x" * 1000)

        await conn.serve("answers", handler)

        count = 0
        async for _ in conn.stream("answers", stream_buffer_bytes=5 * 1064):
            count += 1
            read.release()
        assert count == 50

    run(test)


def test_send_waits_until_writable_without_blocking_the_loop(server: Server, lanes: bool) -> None:
    async def main() -> None:
        outcomes: dict[str, asyncio.Queue[str]] = {"stays": asyncio.Queue(), "leaves": asyncio.Queue()}
        # The worker of "leaves" sends without end: it is unknown how much the system buffers for a stopped server.
        begins = {"stays": (asyncio.Event(), range(100)), "leaves": (asyncio.Event(), itertools.count())}

        connecting = aio.connect(server.url, send_buffer_bytes=1 << 16, lanes=lanes)
        async with connecting as conn, aio.connect(server.url) as gateway:

            async def handler(request: Request, sender: Sender) -> None:
                await sender.send("begun")
                begin, numbers = begins[request.client_id]
                await begin.wait()
                try:
                    for _ in numbers:
                        await sender.send(b"x" * 50_000)
                except asyncio.CancelledError as cancelled:
                    outcomes[request.client_id].put_nowait(str(cancelled))
                    raise
                outcomes[request.client_id].put_nowait("done")

            await conn.serve("answers", handler)

            stream, leaver = (gateway.stream("answers", client_id=client) for client in begins)
            await stream.__anext__(), await leaver.__anext__()
            server.process.send_signal(signal.SIGSTOP)
            begins["leaves"][0].set()
            await until(Stalled(conn))
            assert outcomes["leaves"].empty()
            begins["stays"][0].set()
            mark_client_offline("leaves")
            assert await asyncio.wait_for(outcomes["leaves"].get(), LIMIT) == "client is offline"
            assert outcomes["stays"].empty()
            server.process.send_signal(signal.SIGCONT)
            assert sum(map(len, await received(stream))) == 100 * 50_000
            assert await outcomes["stays"].get() == "done"

    asyncio.run(main())


@pytest.mark.parametrize(("closes", "reads"), [("gateway", ClosedError), ("worker", RemoteError)])
def test_close_ends_every_stream_and_handler_once(
    url: str, lanes: bool, closes: str, reads: type[PresenceError]
) -> None:
    worker_gets: type[PresenceError] = (
        ClosedError if closes == "worker" else StreamCancelledError if lanes else OfflineError
    )

    async def main() -> None:
        ended: list[int] = []
        async with aio.connect(url, lanes=lanes) as worker, aio.connect(url, lanes=lanes) as gateway:

            async def handler(request: Request, sender: Sender) -> None:
                try:
                    await send_for_ever(request, sender)
                finally:
                    ended.append(sender.status)

            await worker.serve("answers", handler)

            streams = [gateway.stream("answers", client_id=f"client {n}") for n in range(5)]
            assert [await stream.__anext__() for stream in streams] == [b"more"] * 5
            readers = [asyncio.create_task(failure(stream)) for stream in streams]
            closing = gateway if closes == "gateway" else worker
            running = asyncio.create_task(closing.run())
            await asyncio.sleep(0)
            await closing.close()
            await asyncio.wait_for(running, LIMIT)
            assert [type(await reader) for reader in readers] == [reads] * 5
            await until(lambda: len(ended) == 5 and online_count() == 0)
        assert ended == [worker_gets.status] * 5

    asyncio.run(main())


@pytest.fixture
def fill_executor() -> Iterator[Callable[[], None]]:
    """Fills the default executor of the running loop with a call that blocks."""
    go = threading.Event()

    def fill() -> None:
        executor = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        executor.submit(go.wait)

    yield fill
    go.set()


def test_a_busy_executor_of_the_loop_delays_nothing(url: str, fill_executor: Callable[[], None]) -> None:
    async def main() -> None:
        fill_executor()
        async with aio.connect(url) as conn:
            await conn.listen_offline()

    asyncio.new_event_loop().run_until_complete(asyncio.wait_for(main(), LIMIT))


def test_a_cancelled_close_continues(server: Server) -> None:
    async def main() -> None:
        ended = []
        async with aio.connect(server.url) as conn:

            async def handler(request: Request, sender: Sender) -> None:
                try:
                    await sender.send("begun")
                    await asyncio.sleep(3600)
                finally:
                    await asyncio.sleep(0.5)
                    ended.append(sender.status)

            await conn.serve("answers", handler)

            stream = conn.stream("answers")
            assert await stream.__anext__() == b"begun"
            server.process.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(conn.close(), 0.1)
            finally:
                server.process.send_signal(signal.SIGCONT)
            await conn.close()
            assert ended in (
                [ClosedError.status],
                [StreamCancelledError.status],
            )  # The reader's end is on the same connection.
            assert isinstance(await failure(stream), ClosedError)

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_loop_that_ends_before_close_leaves_no_descriptors(url: str) -> None:
    async def main() -> object:
        connecting, watching = aio.connect(url), aio.watch()
        await connecting.__aenter__()
        await watching.__aenter__()
        return connecting, watching

    def run() -> None:
        loop = asyncio.new_event_loop()
        left = loop.run_until_complete(main())
        loop.close()
        del left
        gc.collect()

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.warns(ResourceWarning, match="not closed"):
        for _ in range(5):
            run()
    sync_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_use_after_close(url: str) -> None:
    async def main() -> None:
        async with aio.connect(url) as conn:

            async def handler(request: Request, sender: Sender) -> None:
                await sender.send("one")
                await asyncio.sleep(3600)

            await conn.serve("answers", handler)

            stream = conn.stream("answers")
            assert await stream.__anext__() == b"one"
            await conn.close()
        await conn.close()
        await conn.run()
        stream.cancel()
        assert isinstance(await failure(stream), ClosedError)
        conn.stop()
        with pytest.raises(ClosedError):
            conn.stats()
        with pytest.raises(ClosedError):
            conn.stream("answers")
        with pytest.raises(ClosedError):
            await conn.serve("answers", handler)
        with pytest.raises(ClosedError):
            await conn.listen_offline()

    asyncio.run(main())


def test_a_handler_can_close_the_connection(url: str) -> None:
    async def main() -> None:
        async with aio.connect(url) as conn:

            async def handler(request: Request, sender: Sender) -> None:
                await conn.close()

            await conn.serve("answers", handler)

            assert isinstance(await failure(conn.stream("answers")), ClosedError)
            await conn.run()

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_stop_lets_streams_finish(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        go = asyncio.Event()

        async def handler(request: Request, sender: Sender) -> None:
            await sender.send("begun")
            await go.wait()
            await sender.send("done")

        await conn.serve("answers", handler)

        stream = conn.stream("answers")
        assert await stream.__anext__() == b"begun"
        running = asyncio.create_task(conn.run())
        conn.stop()
        assert isinstance(await failure(conn.stream("answers")), (NoRespondersError, RemoteError))
        assert not running.done()
        go.set()
        assert await received(stream) == [b"done"]
        await asyncio.wait_for(running, LIMIT)

    run(test)


def test_a_service_started_after_stop_takes_no_requests(run: Callable[[Test], None]) -> None:
    async def test(conn: Connection) -> None:
        conn.stop()
        await conn.serve("answers", send_for_ever)
        assert isinstance(await failure(conn.stream("answers")), NoRespondersError)
        await conn.run()

    run(test)


def test_connection_events(server: Server) -> None:
    async def main() -> None:
        events: asyncio.Queue[ConnectionEvent] = asyncio.Queue()

        async def next_except_log() -> str:
            while (event := await asyncio.wait_for(events.get(), LIMIT)).kind == "log":
                pass
            return event.kind

        async with aio.connect(server.url, on_event=events.put_nowait) as conn:
            stream = conn.stream("nobody.answers.yet", retries=100000)
            server.stop()
            assert await next_except_log() == "disconnected"
            assert isinstance(await failure(stream), DisconnectedError)
            server.start()
            assert await next_except_log() == "connected"

    asyncio.run(main())


def test_an_exception_in_the_block_closes_the_connection(url: str) -> None:
    async def main() -> None:
        async with aio.connect(url) as conn:
            conn.stream("nobody")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(main())


def test_connecting_can_be_cancelled() -> None:
    async def main() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set()
            await reader.read()
            writer.close()
            await writer.wait_closed()
            left.set()

        accepted, left = asyncio.Event(), asyncio.Event()
        listener = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        connecting = aio.connect(f"nats://127.0.0.1:{port}", connect_timeout_ms=500)
        task = asyncio.create_task(connecting.__aenter__())
        await asyncio.wait_for(accepted.wait(), LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), LIMIT)
        listener.close()

    asyncio.run(main())


def test_sync_and_asyncio_in_one_process(url: str) -> None:
    outcome: Queue[Any] = Queue()

    async def main() -> None:
        async with aio.connect(url) as conn:

            async def handler(request: Request, sender: Sender) -> None:
                async for message in conn.stream("synchronous", request.data, client_id=request.client_id):
                    await sender.send(message.upper())

            await conn.serve("asynchronous", handler)

            await asyncio.to_thread(lambda: outcome.put(list(worker.stream("asynchronous", "abc", client_id="tab"))))

    with nats_presence.connect(url) as worker:
        worker.service("synchronous")(lambda request, sender: sender.send_many([request.data] * 3))
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        assert outcome.get(timeout=LIMIT) == [b"ABC"] * 3
        thread.join()


async def heartbeats() -> None:
    """Returns after some turns of the loop. While a call blocks the loop, there are none."""
    for _ in range(50):
        await asyncio.sleep(0.001)


@contextmanager
def suspended(server: Server) -> Iterator[None]:
    """Suspends nats-server during the block: what waits for its answer, waits for the timeout."""
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)  # Its threads run until then.
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_serving_does_not_block_the_loop(server: Server) -> None:
    async def main() -> None:
        async with aio.connect(server.url, ping_interval_ms=60_000) as conn:
            with suspended(server):
                serving = asyncio.create_task(conn.serve("served", send_for_ever))
                given_up = asyncio.create_task(conn.serve("given.up", send_for_ever))
                await heartbeats()
                assert not serving.done()
                given_up.cancel()
            await serving
            async with conn.stream("served") as stream:
                assert await stream.next() == b"more"
            await until(lambda: len(conn._services) == 1 and len(conn._handlers) == 1)
            assert isinstance(await failure(conn.stream("given.up")), NoRespondersError)

    asyncio.run(asyncio.wait_for(main(), 2 * LIMIT))


def test_no_call_blocks_the_loop(server: Server) -> None:
    """While nats-server is suspended, calls that wait for it take 2 s. The loop runs meanwhile."""

    async def connect() -> None:
        async with aio.connect(server.url, connect_timeout_ms=2000):
            pass

    async def main() -> None:
        connecting = [aio.connect(server.url, ping_interval_ms=60_000, connect_timeout_ms=2000) for _ in range(2)]
        async with connecting[0] as conn, connecting[1] as closing, aio.watch() as watch:
            dropped = await run_in_thread(Connection, server.url, {})
            senders: list[Sender] = []

            async def detaches(request: Request, sender: Sender) -> None:
                sender.detach()
                await sender.send("more")
                senders.append(sender)

            await conn.serve("answers", send_for_ever)
            await conn.serve("detached", detaches)
            streams = [conn.stream(subject) for subject in ("answers", "answers", "answers", "detached", "detached")]
            for stream in streams:
                assert await stream.next() == b"more"
            await until(lambda: len(senders) == 2)
            with suspended(server):
                calls = [connect(), conn.serve("others", send_for_ever), conn.listen_offline(), closing.close(2)]
                waiting = [asyncio.create_task(call) for call in calls]
                await heartbeats()
                conn.stream("answers").cancel()
                full = asyncio.create_task(senders[0].send_many([b"x" * 1000] * 10_000))
                senders.pop().end()
                nats_presence.mark_client_online("tab")
                mark_client_offline("tab")
                async with nats_presence.session("tab"):
                    pass
                assert await watch.__anext__() == nats_presence.PresenceEvent("tab", True)
                with pytest.warns(ResourceWarning, match="not closed"):
                    del dropped
                streams.pop().cancel()
                await streams.pop().aclose()
                streams.clear()
                conn.stop()
                await heartbeats()
                assert not any(task.done() for task in waiting)
                full.cancel()
                outcomes = [type(outcome) for outcome in await asyncio.gather(*waiting, return_exceptions=True)]
                senders.clear()
        assert outcomes == [PresenceTimeoutError, PresenceTimeoutError, PresenceTimeoutError, PresenceTimeoutError]

    asyncio.run(asyncio.wait_for(main(), 2 * LIMIT))


def test_a_service_that_the_server_does_not_confirm_is_not_kept(server: Server) -> None:
    async def main() -> None:
        async with aio.connect(server.url, ping_interval_ms=60_000, connect_timeout_ms=1000) as conn:
            await conn.serve("answers", send_for_ever)
            with suspended(server), pytest.raises(PresenceTimeoutError):
                await conn.serve("others", send_for_ever)
            assert len(conn._services) == len(conn._handlers) == 1
            async with conn.stream("answers") as stream:
                assert await stream.next() == b"more"
            assert isinstance(await failure(conn.stream("others")), NoRespondersError)

    asyncio.run(asyncio.wait_for(main(), 2 * LIMIT))


def test_use_in_another_loop_is_refused(url: str) -> None:
    """Waiting in another loop would never end. The error names the loop."""

    async def refused(call: Callable[[], Any]) -> None:
        with pytest.raises(RuntimeError, match="belongs to the loop") as caught:
            result = call()
            await result
        assert "_UnixSelectorEventLoop" in str(caught.value)

    async def main() -> None:
        async with aio.connect(url) as conn, aio.watch() as watch:
            senders: asyncio.Queue[Sender] = asyncio.Queue()

            async def handler(request: Request, sender: Sender) -> None:
                sender.detach()
                senders.put_nowait(sender)

            await conn.serve("answers", handler)

            stream = conn.stream("answers", stream_buffer_bytes=1000)
            sender = await senders.get()

            async def elsewhere() -> None:
                for call in (
                    lambda: conn.stream("answers", timeout=0.1),
                    lambda: conn.serve("answers", handler),
                    stream.__anext__,
                    stream.next,
                    lambda: stream.next(timeout=0.1),
                    lambda: sender.send_many([b"x" * 1000] * 100),
                    watch.__anext__,
                    conn.listen_offline,
                    conn.run,
                    conn.stop,
                    conn.close,
                ):
                    await refused(call)

            await asyncio.to_thread(asyncio.run, elsewhere())
            with pytest.raises(RuntimeError, match="a thread without a loop"):
                await asyncio.to_thread(conn.stream, "answers")
            assert conn.stats()["streams"] == 1
            sender.end()
            while await stream.next():
                pass

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_connection_can_be_used_between_two_runs_of_its_loop(url: str) -> None:
    loop = asyncio.new_event_loop()
    connecting = aio.connect(url)
    conn = loop.run_until_complete(connecting.__aenter__())

    async def handler(request: Request, sender: Sender) -> None:
        await sender.send("one")

    loop.run_until_complete(conn.serve("answers", handler))
    stream = conn.stream("answers")
    assert loop.run_until_complete(received(stream)) == [b"one"]
    loop.run_until_complete(connecting.__aexit__(None, None, None))
    loop.close()


def test_a_failed_close_at_the_end_of_the_block_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with aio.connect(server.url) as conn:
            server.stop()
            await until(lambda: not conn.stats()["connected"])

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    with pytest.raises(KeyError, match="mine"):
        server.start()
        with nats_presence.connect(server.url) as conn:
            server.stop()
            sync_until(lambda: not conn.stats()["connected"])
            raise KeyError("mine")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    server.start()
    conn = nats_presence.connect(server.url)
    server.stop()
    sync_until(lambda: not conn.stats()["connected"])
    with pytest.raises(DisconnectedError):
        conn.close()
