"""A request through a Client that has left fails, so that it cannot bring the id back online."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Callable

import pytest
from conftest import LIMIT, run_python, until
from test_process import SETUP, finish

import nats_presence
from nats_presence import (
    Client,
    ClosedError,
    Connection,
    InvalidError,
    OfflineError,
    Request,
    Sender,
    Stream,
    StreamCancelledError,
    aio,
    client,
    is_client_online,
    mark_client_offline,
    online_count,
    session,
    watch,
)
from nats_presence._arguments import Payload


class Worker:
    """A worker in this process. Its handlers send one message and wait until their stream is stopped."""

    def __init__(self, url: str, lanes: bool) -> None:
        self.requests = 0
        self.conn = nats_presence.connect(url, lanes=lanes)
        self.conn.serve("answers", self.answer)

    def answer(self, request: Request, sender: Sender) -> None:
        self.requests += 1
        sender.send("first")
        until(lambda: sender.closed)

    def senders(self) -> int:
        return self.conn.stats()["senders"]


@pytest.fixture
def worker(url: str, lanes: bool) -> Iterator[Worker]:
    assert online_count() == 0
    worker = Worker(url, lanes)
    yield worker
    worker.conn.close()
    assert online_count() == 0


@pytest.fixture
def conn(url: str, lanes: bool) -> Iterator[Connection]:
    with nats_presence.connect(url, lanes=lanes) as conn:
        yield conn


def close(tab: Client) -> None:
    tab.close()


def mark(tab: Client) -> None:
    mark_client_offline(tab.client_id)


def in_a_thread(tab: Client) -> None:
    thread = threading.Thread(target=tab.close)
    thread.start()
    thread.join(LIMIT)


LEAVE = pytest.mark.parametrize("leave", [close, mark, in_a_thread])


def check_refused(tab: Client, conn: Connection, worker: Worker) -> None:
    requests = worker.requests
    with pytest.raises(OfflineError, match=f"client '{tab.client_id}' is offline: it was closed or marked offline"):
        tab.stream(conn, "answers")
    assert worker.requests == requests


@LEAVE
def test_a_late_request_does_not_bring_the_client_back(worker: Worker, conn: Connection, leave: Any) -> None:
    with client("tab") as tab:
        assert tab.online
        assert is_client_online("tab")
        stream = tab.stream(conn, "answers")
        assert next(stream) == b"first"
        leave(tab)
        assert not tab.online
        with pytest.raises(OfflineError):
            next(stream)
        check_refused(tab, conn, worker)
        assert not is_client_online("tab")
    check_refused(tab, conn, worker)
    until(lambda: worker.senders() == 0)


@LEAVE
def test_a_client_stays_offline_when_another_one_has_its_id(worker: Worker, conn: Connection, leave: Any) -> None:
    with client("tab") as tab:
        leave(tab)
        with client("tab") as other:
            assert not tab.online
            assert other.online
            check_refused(tab, conn, worker)
            tab.close()
            assert next(other.stream(conn, "answers")) == b"first"


class Leaving:
    """A connection of a client that leaves just before its request is made, or just after."""

    def __init__(self, conn: Connection, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.conn, self.before, self.after = conn, before, after

    def stream(self, subject: str, data: Payload = b"", **arguments: Any) -> Stream:
        self.before()
        stream = self.conn.stream(subject, data, **arguments)
        self.after()
        return stream


def stay() -> None:
    pass


@LEAVE
def test_a_client_that_leaves_before_its_request_is_made_does_not_come_back(
    worker: Worker, conn: Connection, leave: Any
) -> None:
    with watch() as events, client("tab") as tab:
        with pytest.raises(OfflineError):
            tab.stream(Leaving(conn, lambda: leave(tab), stay), "answers", only_online=False)
        with session("later"):
            seen = list(itertools.takewhile(lambda event: event.client_id == "tab", events))
        assert [event.online for event in seen] == [True, False]


@LEAVE
@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
def test_a_client_that_leaves_while_another_one_has_its_id_has_no_stream(
    worker: Worker, conn: Connection, lanes: bool, leave: Any, is_late: bool
) -> None:
    """On level 0 its worker goes on, because a worker there can be stopped only together with the other client's."""
    with client("tab") as tab, contextlib.ExitStack() as others:

        def replace() -> None:
            leave(tab)
            others.enter_context(client("tab"))

        leaving = Leaving(conn, stay, replace) if is_late else Leaving(conn, replace, stay)
        with pytest.raises(OfflineError) as caught:
            tab.stream(leaving, "answers")
        until(lambda: conn.stats()["streams"] == 0 and (worker.senders() == 0 or not lanes))
        assert is_client_online("tab")
        del caught  # It kept the stream.


def test_closing_one_of_two_clients_of_an_id_ends_its_streams_only(url: str) -> None:
    worker = Worker(url, lanes=True)
    with worker.conn, nats_presence.connect(url) as conn, client("tab") as first, client("tab") as second:
        streams = [tab.stream(conn, "answers") for tab in (first, second)]
        assert [next(stream) for stream in streams] == [b"first", b"first"]
        first.close()
        with pytest.raises(OfflineError, match="client 'tab' is offline: it was closed"):
            next(streams[0])
        until(lambda: worker.senders() == 1)
        assert second.online
        with pytest.raises(nats_presence.PresenceTimeoutError):
            streams[1].next(timeout=0.01)
        mark_client_offline("tab")
        with pytest.raises(OfflineError):
            next(streams[1])


def test_closing_a_client_ends_its_streams_in_spite_of_a_mark_or_a_grace(url: str) -> None:
    """Both keep the id online; the worker of this connection of the client stops all the same."""
    worker = Worker(url, lanes=True)
    with worker.conn, nats_presence.connect(url, session_grace_ms=60_000) as conn:
        try:
            with client("tab") as tab:
                stream = tab.stream(conn, "answers")
                assert next(stream) == b"first"
            with pytest.raises(OfflineError):
                next(stream)
            assert is_client_online("tab")
            until(lambda: worker.senders() == 0)
        finally:
            nats_presence.connect(url, session_grace_ms=0).close()
            mark_client_offline("tab")


def test_a_stream_that_the_caller_cancels_is_cancelled(worker: Worker, conn: Connection) -> None:
    with client("tab") as tab:
        with tab.stream(conn, "answers") as stream:
            assert next(stream) == b"first"
        with pytest.raises(StreamCancelledError):
            next(stream)
        assert next(tab.stream(conn, "answers", headers={"a": "b"}, timeout=LIMIT)) == b"first"


def test_a_request_on_a_closed_connection_leaves_the_client_online(worker: Worker, url: str, lanes: bool) -> None:
    with client("tab") as tab:
        with nats_presence.connect(url, lanes=lanes) as conn:
            stream = tab.stream(conn, "answers")
            assert next(stream) == b"first"
        for request in (lambda: next(stream), lambda: tab.stream(conn, "answers")):
            with pytest.raises(ClosedError):
                request()
        assert tab.online
        with nats_presence.connect(url, lanes=lanes) as conn:
            assert next(tab.stream(conn, "answers")) == b"first"
    # The client decides: after it has left, the error is the same whether or not the connection is closed.
    with pytest.raises(OfflineError):
        tab.stream(conn, "answers")


def test_requests_of_many_threads_that_race_with_the_end_leave_nothing(worker: Worker, conn: Connection) -> None:
    def request(tab: Client) -> None:
        kept = []
        with pytest.raises(OfflineError):
            while True:
                kept.append(tab.stream(conn, "nobody"))
        for stream in kept:  # However its end raced with "no responders", none goes on.
            with pytest.raises((OfflineError, nats_presence.NoRespondersError, StreamCancelledError)):
                next(stream)

    for number in range(30):
        tab = client("race")
        threads = [threading.Thread(target=request, args=(tab,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        leave = (close, mark)[number % 2]
        leave(tab)
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert not is_client_online("race")
        del tab
    until(lambda: conn.stats()["streams"] == 0)


def test_a_stream_keeps_its_client_and_a_dropped_client_is_closed(worker: Worker, conn: Connection) -> None:
    gc.disable()
    try:
        stream = client("tab").stream(conn, "answers")
        assert next(stream) == b"first"
        assert is_client_online("tab")
        del stream
        assert not is_client_online("tab")
        until(lambda: worker.senders() == 0)
    finally:
        gc.enable()


@pytest.mark.parametrize("client_id", [None, 7, "x" * 1025, "a\nb"])
def test_an_invalid_id_is_refused(client_id: Any) -> None:
    with pytest.raises(InvalidError, match="client id"):
        client(client_id)


def test_the_empty_id_is_online_until_it_is_closed(worker: Worker, conn: Connection) -> None:
    with client("") as nobody:
        mark_client_offline("")
        stream = nobody.stream(conn, "answers")
        assert next(stream) == b"first"
    with pytest.raises(OfflineError):
        next(stream)
    with pytest.raises(OfflineError):
        nobody.stream(conn, "answers")


def test_a_client_from_before_a_fork_is_offline_in_the_child(url: str) -> None:
    code = """
tab = nats_presence.client("tab")
if os.fork() == 0:
    with nats_presence.connect(url) as conn:
        assert not tab.online
        try:
            tab.stream(conn, "answers")
        except nats_presence.OfflineError:
            tab.close()
            os._exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
assert tab.online
"""
    assert finish(run_python(SETUP + code, url)) == (0, "", "")


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, LIMIT))


@LEAVE
def test_a_late_request_in_asyncio(worker: Worker, url: str, lanes: bool, leave: Any) -> None:
    async def main() -> None:
        async with aio.connect(url, lanes=lanes) as conn, client("tab") as tab:
            stream = tab.stream(conn, "answers")
            assert await stream.next() == b"first"
            reader = asyncio.create_task(stream.next())
            await asyncio.sleep(0)
            leave(tab)
            with pytest.raises(OfflineError):
                await reader
            with client("tab") as other:
                with pytest.raises(OfflineError):
                    tab.stream(conn, "answers")
                tab.close()
                async with other.stream(conn, "answers") as stream:
                    assert await stream.next() == b"first"

    run(main())


def test_one_of_two_clients_in_asyncio(url: str) -> None:
    worker = Worker(url, lanes=True)

    async def main() -> None:
        async with aio.connect(url) as conn:
            with session("tab"):
                async with client("tab") as tab:
                    stream = tab.stream(conn, "answers")
                    assert await stream.next() == b"first"
                with pytest.raises(OfflineError, match="it was closed"):
                    await stream.next()
                assert is_client_online("tab")
            with pytest.raises(OfflineError):
                tab.stream(conn, "answers")
        with client("tab") as tab, pytest.raises(ClosedError):
            tab.stream(conn, "answers")

    with worker.conn:
        run(main())
