"""Workers and gateways with threads, over a real nats-server."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any, Callable

import pytest
from conftest import LIMIT, Server, Stalled, until, waits

import nats_presence
from nats_presence import (
    BusyError,
    ClosedError,
    Connection,
    ConnectionEvent,
    DisconnectedError,
    FullError,
    HandlerError,
    InvalidError,
    NoRespondersError,
    OfflineError,
    PresenceError,
    PresenceTimeoutError,
    RemoteError,
    Request,
    Sender,
    Stream,
    StreamCancelledError,
    is_client_online,
    mark_client_offline,
    online_count,
)
from nats_presence._arguments import Payload


@pytest.fixture
def conn(url: str, lanes: bool) -> Iterator[Connection]:
    with nats_presence.connect(url, name="test", lanes=lanes) as conn:
        yield conn
    gc.collect()
    assert online_count() == 0


def send_until_refused(sender: Sender, outcome: Queue[Any]) -> None:
    try:
        while True:
            sender.send("more")
            time.sleep(0.001)
    except PresenceError as refused:
        outcome.put((refused, sender))


def failure(stream: Stream) -> PresenceError:
    """Reads a stream to its end, and returns the error. Reading again then shows a normal end."""
    with pytest.raises(PresenceError) as caught:
        list(stream)
    assert list(stream) == []
    return caught.value


def test_messages_arrive_in_order_and_complete(conn: Connection) -> None:
    seen: Queue[Request] = Queue()
    senders: Queue[Sender] = Queue()
    go = threading.Event()

    @conn.service("answers.*", queue="workers")
    def handler(request: Request, sender: Sender) -> None:
        seen.put(request)
        senders.put(sender)
        assert not sender.closed
        assert sender.status == 0
        assert go.wait(LIMIT)
        sender.send("text Ü")
        sender.send(b"bytes \0\xff")
        sender.send(bytearray(b"array"))
        sender.send(memoryview(b"_view_")[1:-1])
        sender.send(b"")
        sender.send_many([b"%d" % n for n in range(1000)])
        assert sender.send_count == 1005

    stream = conn.stream("answers.one", "question", client_id="Ünï", headers={"X-Model": "small"})
    assert is_client_online("Ünï")
    go.set()
    first = ["text Ü".encode(), b"bytes \0\xff", b"array", b"view", b""]
    assert list(stream) == first + [b"%d" % n for n in range(1000)]
    assert list(stream) == []
    request, sender = seen.get(), senders.get()
    assert (request.client_id, request.subject, request.data) == ("Ünï", "answers.one", b"question")
    assert (request.header("X-Model"), request.header("Connect-ID"), request.header("X-None")) == ("small", "Ünï", None)
    assert sender.client_id == "Ünï"
    assert sender.closed
    assert sender.status == ClosedError.status
    sender.end()
    with pytest.raises(ClosedError):
        sender.send("late")
    with pytest.raises(ClosedError):
        sender.error("late")
    assert not is_client_online("Ünï")


MIXED: list[Payload] = [
    *[b"%d" % number for number in range(3000)],
    b"x" * 300_000,
    "text Ü",
    b"",
    bytearray(b"array"),
    memoryview(b"_view_")[1:-1],
    memoryview(b"12345678").cast("I"),
    b"y" * 1_000_000,
    *[b"z" * 1000] * 1000,
]
AS_SENT: list[Payload] = [message.encode() if isinstance(message, str) else bytes(message) for message in MIXED]


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_send_many_sends_the_same_messages_as_send(conn: Connection, kind: Callable[[list[Payload]], Any]) -> None:
    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        for messages in (MIXED, [], AS_SENT):
            sender.send_many(kind(messages))
        assert sender.send_count == 2 * len(MIXED)

    assert list(conn.stream("answers")) == AS_SENT * 2


def test_send_many_sends_each_message_of_an_iterator_at_once(conn: Connection) -> None:
    read = threading.Semaphore(0)

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        def think() -> Iterator[bytes]:
            for number in range(3):
                yield b"%d" % number
                assert read.acquire(timeout=LIMIT)

        sender.send_many(think())

    stream = conn.stream("answers")
    for number in range(3):
        assert next(stream) == b"%d" % number
        read.release()
    assert list(stream) == []


def test_send_many_stops_when_the_client_leaves(conn: Connection) -> None:
    outcome: Queue[Any] = Queue()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        try:
            sender.send_many([b"x" * 1000] * 1_000_000)
        except PresenceError as refused:
            outcome.put((refused, sender.send_count))

    stream = conn.stream("answers", client_id="tab")
    next(stream)
    mark_client_offline("tab")
    refused, sent = outcome.get(timeout=LIMIT)
    assert isinstance(refused, OfflineError)
    assert 0 < sent < 1_000_000


def test_a_request_without_a_client(conn: Connection) -> None:
    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        sender.send(repr(request.client_id))

    assert list(conn.stream("answers")) == [b"''"]


def test_a_client_that_leaves_stops_its_sender(conn: Connection) -> None:
    outcome: Queue[Any] = Queue()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        send_until_refused(sender, outcome)
        sender.send("once more")

    stream = conn.stream("answers", client_id="tab")
    assert next(stream) == b"more"
    mark_client_offline("tab")
    assert isinstance(failure(stream), OfflineError)
    refused, sender = outcome.get(timeout=LIMIT)
    assert isinstance(refused, OfflineError)
    assert "'tab'" in refused.message
    assert sender.closed
    assert sender.status == OfflineError.status
    # A new session with the same id does not make the old sender usable again.
    with nats_presence.session("tab"), pytest.raises(OfflineError):
        sender.send("more")
    for call in (sender.end, lambda: sender.error("why")):
        with pytest.raises(OfflineError):
            call()


def leave_the_loop(conn: Connection) -> None:
    for message in conn.stream("answers", client_id="tab"):
        assert message == b"more"
        break


def leave_the_block(conn: Connection) -> None:
    with conn.stream("answers", client_id="tab") as stream:
        next(stream)
    assert isinstance(failure(stream), StreamCancelledError)
    stream.cancel()


def cancel_from_another_thread(conn: Connection) -> None:
    stream = conn.stream("answers", client_id="tab")
    next(stream)
    canceller = threading.Timer(0.05, stream.cancel)
    canceller.start()
    assert isinstance(failure(stream), StreamCancelledError)
    canceller.join()


@pytest.mark.parametrize("leave", [leave_the_loop, leave_the_block, cancel_from_another_thread])
def test_leaving_a_stream_stops_its_sender(conn: Connection, lanes: bool, leave: Callable[[Connection], None]) -> None:
    outcome: Queue[Any] = Queue()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        send_until_refused(sender, outcome)

    leave(conn)
    refused, _ = outcome.get(timeout=LIMIT)
    assert isinstance(refused, StreamCancelledError if lanes else OfflineError)
    until(lambda: conn.stats()["senders"] == 0 == conn.stats()["streams"])


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(4)


@pytest.mark.parametrize("send_errors", [False, True])
@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (ValueError("no such model: ü"), "no such model: ü"),
        (KeyError(), "KeyError"),
        (SystemExit(3), "3"),
        (UnprintableError(), "UnprintableError"),
    ],
)
def test_a_handlers_exception_ends_the_stream_with_an_error(
    conn: Connection, raised: BaseException, text: str, send_errors: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @conn.service("answers", threads=1, send_errors=send_errors)
    def handler(request: Request, sender: Sender) -> None:
        sender.send("part")
        raise raised

    for _ in range(2):  # The second time shows that the only thread still runs.
        stream = conn.stream("answers", client_id="tab")
        assert next(stream) == b"part"
        error = failure(stream)
        assert isinstance(error, RemoteError)
        assert error.message == (text if send_errors else "the handler failed")
    until(lambda: len(caplog.records) == 2)
    assert caplog.records[0].name == "nats_presence"
    assert caplog.records[0].levelno == logging.ERROR


@pytest.mark.parametrize("send_errors", [False, True])
def test_a_handler_sends_an_error_with_a_code(
    conn: Connection, send_errors: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def as_generator(request: Request, sender: Sender) -> Iterator[str]:
        yield "part"
        raise HandlerError("no such model: ü", code=404)

    def by_sender(request: Request, sender: Sender) -> None:
        with pytest.raises(InvalidError, match="code 2147483648: must be an int from 0 to 2147483647"):
            sender.error("x", code=2**31)
        sender.send("part")
        sender.error("no such model: ü", code=404)

    def without_code(request: Request, sender: Sender) -> None:
        sender.send("part")
        raise HandlerError("no such model: \udcfc")

    def wrong_code(request: Request, sender: Sender) -> None:
        sender.send("part")
        raise HandlerError("no such model: ü", code=-1)

    def upstream(request: Request, sender: Sender) -> None:
        sender.send("part")
        failed = RemoteError("no such model: ü")
        failed.code = 404
        raise failed

    handlers: list[tuple[str, Any, str, int]] = [
        ("generator", as_generator, "no such model: ü", 404),
        ("sender", by_sender, "no such model: ü", 404),
        ("none", without_code, "no such model: ?", 0),
    ]
    for subject, handler, message, code in handlers:
        conn.serve(subject, handler, send_errors=send_errors)
        error = failure(conn.stream(subject))
        assert isinstance(error, RemoteError)
        assert (error.message, error.code, str(error)) == (message, code, message)
    until(lambda: conn.stats()["senders"] == 0)
    assert not caplog.records
    # What is not meant for the reader is treated as any exception.
    for subject, handler in [("wrong", wrong_code), ("upstream", upstream)]:
        conn.serve(subject, handler)
        error = failure(conn.stream(subject))
        assert isinstance(error, RemoteError)
        assert (error.message, error.code) == ("the handler failed", 0)
    until(lambda: len(caplog.records) == 2)


def test_only_the_streams_own_end_is_not_logged(conn: Connection, caplog: pytest.LogCaptureFixture) -> None:
    @conn.service("answers", threads=1)
    def handler(request: Request, sender: Sender) -> None:
        sender.send("begun")
        until(lambda: sender.closed)
        if request.data:
            raise RemoteError(request.data.decode())
        sender.send("late")

    for question in ("", "of another stream", ""):
        stream = conn.stream("answers", question, client_id="tab")
        assert next(stream) == b"begun"
        mark_client_offline("tab")
        assert isinstance(failure(stream), OfflineError)
    until(lambda: conn.stats()["senders"] == 0)
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["of another stream"]


def test_a_client_that_leaves_while_it_waits_for_a_thread_is_not_served(conn: Connection) -> None:
    go = threading.Event()
    served: Queue[str] = Queue()

    @conn.service("answers", threads=1, max_streams=3)
    def handler(request: Request, sender: Sender) -> None:
        served.put(request.client_id)
        go.wait(LIMIT)

    streams = [conn.stream("answers", client_id=client) for client in ("first", "leaves", "last")]
    until(lambda: conn.stats()["senders"] == 3)
    mark_client_offline("leaves")
    go.set()
    assert [list(streams[0]), list(streams[2])] == [[], []]
    assert isinstance(failure(streams[1]), OfflineError)
    assert [served.get_nowait(), served.get_nowait(), served.empty()] == ["first", "last", True]


def test_an_error_ends_the_stream_once(conn: Connection) -> None:
    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        sender.error("first")
        with pytest.raises(ClosedError):
            sender.error("second")
        sender.end()

    assert failure(conn.stream("answers")).message == "first"


def test_a_detached_sender_answers_later_from_another_thread(conn: Connection) -> None:
    returned = threading.Event()

    def answer_later(sender: Sender) -> None:
        assert returned.wait(LIMIT)
        sender.send("late")
        sender.end()

    @conn.service("answers", threads=1, max_streams=3)
    def handler(request: Request, sender: Sender) -> None:
        sender.detach()
        threading.Thread(target=answer_later, args=(sender,)).start()

    @conn.service("forgotten")
    def forget(request: Request, sender: Sender) -> None:
        sender.detach()

    streams = [conn.stream("answers") for _ in range(3)]
    until(lambda: conn.stats()["senders"] == 3)
    returned.set()
    assert [list(stream) for stream in streams] == [[b"late"]] * 3
    error = failure(conn.stream("forgotten"))
    assert isinstance(error, RemoteError)
    assert "unfinished" in error.message


def test_no_responders(conn: Connection) -> None:
    error = failure(conn.stream("nobody.here", client_id="tab"))
    assert isinstance(error, NoRespondersError)
    assert "nobody.here" in error.message


def test_a_service_takes_as_many_streams_as_it_has_threads(conn: Connection) -> None:
    go = threading.Event()

    @conn.service("answers", threads=2)
    def handler(request: Request, sender: Sender) -> None:
        sender.send("begun")
        go.wait(LIMIT)

    streams = [conn.stream("answers") for _ in range(2)]
    assert [next(stream) for stream in streams] == [b"begun"] * 2
    assert isinstance(failure(conn.stream("answers")), (BusyError, RemoteError))
    go.set()
    assert [list(stream) for stream in streams] == [[], []]


def test_a_request_is_retried_until_the_service_is_free(conn: Connection) -> None:
    go = threading.Event()

    @conn.service("answers", max_streams=1)
    def handler(request: Request, sender: Sender) -> None:
        sender.send("begun")
        go.wait(LIMIT)

    first = conn.stream("answers")
    assert next(first) == b"begun"
    error = failure(conn.stream("answers"))
    assert isinstance(error, (BusyError, RemoteError))
    assert "busy" in error.message
    retrying = conn.stream("answers", retries=1000, retry_delay_ms=10)
    until(lambda: conn.stats()["requests_busy"] >= 3)
    go.set()
    assert list(first) == []
    assert list(retrying) == [b"begun"]


def test_a_timeout_ends_the_stream_and_stops_the_worker(conn: Connection) -> None:
    stopped = threading.Event()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        until(lambda: sender.closed)
        stopped.set()

    began = time.monotonic()
    error = failure(conn.stream("answers", client_id="tab", timeout=0.2))
    assert isinstance(error, PresenceTimeoutError)
    assert isinstance(error, TimeoutError)
    assert 0.2 <= time.monotonic() - began < LIMIT
    assert stopped.wait(LIMIT)


def test_eight_threads_send_while_another_ends(conn: Connection) -> None:
    sent: Queue[int] = Queue()

    def send(sender: Sender) -> None:
        count = 0
        with pytest.raises(ClosedError):
            while True:
                sender.send(b"x")
                assert sender.status in (0, ClosedError.status)
                count += 1
        sent.put(count)

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        threads = [threading.Thread(target=send, args=(sender,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: sender.send_count > 500)
        sender.end()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # With the default the thread that ends the stream would have to wait for long.
    try:
        for _ in range(5):
            received = len(list(conn.stream("answers")))
            assert received == sum(sent.get(timeout=LIMIT) for _ in range(8)) >= 500
    finally:
        sys.setswitchinterval(before)


def test_a_second_reading_thread_gets_busy(conn: Connection) -> None:
    go = threading.Event()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        go.wait(LIMIT)
        sender.send("one")

    stream = conn.stream("answers")
    got: Queue[list[bytes]] = Queue()
    reader = threading.Thread(target=lambda: got.put(list(stream)))
    reader.start()
    until(lambda: waits(stream))
    with pytest.raises(BusyError):
        next(stream)
    go.set()
    assert got.get(timeout=LIMIT) == [b"one"]
    reader.join()


@pytest.mark.parametrize("lanes", [False], indirect=True, ids=["level 0"])
def test_on_level_0_only_the_slow_readers_stream_ends(conn: Connection) -> None:
    done = threading.Event()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        sender.send_many([b"x" * 1000] * 10)
        done.wait(LIMIT)

    slow = conn.stream("answers", client_id="slow", stream_buffer_bytes=5 * 1064)
    fast = conn.stream("answers", client_id="fast")
    assert [next(fast) for _ in range(10)] == [b"x" * 1000] * 10
    until(lambda: conn.stats()["streams"] == 1)
    assert [next(slow) for _ in range(5)] == [b"x" * 1000] * 5
    assert isinstance(failure(slow), FullError)
    done.set()
    assert list(fast) == []


def test_send_blocks_until_writable_or_offline(server: Server, lanes: bool) -> None:
    outcomes: dict[str, Queue[Any]] = {"stays": Queue(), "leaves": Queue()}
    # The worker of "leaves" sends without end: it is unknown how much the system buffers for a stopped server.
    begins = {"stays": (threading.Event(), range(100)), "leaves": (threading.Event(), itertools.count())}
    with nats_presence.connect(server.url, send_buffer_bytes=1 << 16, lanes=lanes) as conn:

        @conn.service("answers")
        def handler(request: Request, sender: Sender) -> None:
            sender.send("begun")
            begin, numbers = begins[request.client_id]
            begin.wait(LIMIT)
            try:
                for _ in numbers:
                    sender.send(b"x" * 50_000)
                outcomes[request.client_id].put(None)
            except PresenceError as refused:
                outcomes[request.client_id].put(refused)

        with nats_presence.connect(server.url) as gateway:
            stream, leaver = (gateway.stream("answers", client_id=client) for client in begins)
            next(stream), next(leaver)
            server.process.send_signal(signal.SIGSTOP)
            begins["leaves"][0].set()
            until(Stalled(conn))
            assert outcomes["leaves"].empty()
            begins["stays"][0].set()
            mark_client_offline("leaves")
            assert isinstance(outcomes["leaves"].get(timeout=LIMIT), OfflineError)
            assert outcomes["stays"].empty()
            server.process.send_signal(signal.SIGCONT)
            assert sum(map(len, stream)) == 100 * 50_000
            assert outcomes["stays"].get(timeout=LIMIT) is None


@pytest.mark.parametrize(("closes", "reads"), [("gateway", ClosedError), ("worker", RemoteError)])
def test_close_ends_every_stream_and_handler_once(
    url: str, lanes: bool, closes: str, reads: type[PresenceError]
) -> None:
    worker_gets: type[PresenceError] = (
        ClosedError if closes == "worker" else StreamCancelledError if lanes else OfflineError
    )
    outcome: Queue[Any] = Queue()
    with nats_presence.connect(url, lanes=lanes) as worker, nats_presence.connect(url, lanes=lanes) as gateway:

        @worker.service("answers", threads=4, max_streams=5)
        def handler(request: Request, sender: Sender) -> None:
            # The last request may still get a thread at the moment when the others end.
            send_until_refused(sender, Queue() if request.client_id == "waits" else outcome)

        streams = [gateway.stream("answers", client_id=f"client {n}") for n in range(4)]
        assert [next(stream) for stream in streams] == [b"more"] * 4
        waiting = gateway.stream("answers", client_id="waits", timeout=LIMIT)
        until(lambda: worker.stats()["requests"] == 5)
        closing = gateway if closes == "gateway" else worker
        running = threading.Thread(target=closing.run)
        running.start()
        closing.close()
        running.join(LIMIT)
        assert not running.is_alive()
        assert [type(failure(stream)) for stream in [*streams, waiting]] == [reads] * 5
        assert [type(outcome.get(timeout=LIMIT)[0]) for _ in streams] == [worker_gets] * 4
        until(lambda: online_count() == 0)
    assert outcome.empty()


def test_use_after_close(url: str) -> None:
    with nats_presence.connect(url) as conn:
        conn.service("answers")(lambda request, sender: sender.send("one"))
        stream = conn.stream("answers")
        assert next(stream) == b"one"
    conn.close()
    conn.run()
    stream.cancel()
    calls: list[Callable[[], object]] = [
        conn.stats,
        conn.listen_offline,
        lambda: conn.stream("answers"),
        lambda: conn.service("answers")(lambda request, sender: None),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    conn.stop()


def test_a_handler_can_close_the_connection(url: str) -> None:
    closed = threading.Event()
    conn = nats_presence.connect(url)

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        conn.close()
        closed.set()

    assert isinstance(failure(conn.stream("answers")), ClosedError)
    assert closed.wait(LIMIT)


def test_stop_lets_streams_finish(conn: Connection) -> None:
    go = threading.Event()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        sender.send("begun")
        go.wait(LIMIT)
        sender.send("done")

    stream = conn.stream("answers")
    assert next(stream) == b"begun"
    running = threading.Thread(target=conn.run)
    running.start()
    conn.stop()
    assert isinstance(failure(conn.stream("answers")), (NoRespondersError, RemoteError))
    assert running.is_alive()
    go.set()
    assert list(stream) == [b"done"]
    running.join(LIMIT)
    assert not running.is_alive()


def test_a_connection_that_is_dropped_is_closed(url: str) -> None:
    conn = nats_presence.connect(url)
    stream = conn.stream("nobody")
    with pytest.warns(ResourceWarning, match="not closed"):
        del conn, stream
        gc.collect()


def test_streams_survive_their_connection_object(url: str) -> None:
    with nats_presence.connect(url, peer_grace_ms=0) as worker:  # Its close waits until the gateway is gone.
        worker.service("answers")(lambda request, sender: sender.send_many(["a", "b"]))
        with pytest.warns(ResourceWarning):
            assert list(nats_presence.connect(url).stream("answers")) == [b"a", b"b"]
            gc.collect()


def test_connection_events(server: Server) -> None:
    events: Queue[ConnectionEvent] = Queue()

    def on_event(event: ConnectionEvent) -> None:
        events.put(event)
        raise ValueError("is logged")

    def next_except_log() -> str:
        while (event := events.get(timeout=LIMIT)).kind == "log":
            pass
        return event.kind

    with nats_presence.connect(server.url, on_event=on_event) as conn:
        conn.service("answers")(lambda request, sender: sender.send("again"))
        host, port = server.url.removeprefix("nats://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"CONNECT {}\r\nPUB answers 2\r\nhi\r\nPING\r\n")
            log = events.get(timeout=LIMIT)
        assert log.kind == "log"
        assert "no reply subject" in log.text
        stream = conn.stream("nobody.answers.yet", retries=100000)
        server.stop()
        assert next_except_log() == "disconnected"
        assert isinstance(failure(stream), DisconnectedError)
        with pytest.raises(DisconnectedError):
            conn.stream("answers")
        server.start()
        assert next_except_log() == "connected"
        assert conn.stats()["connects"] == 2
        assert list(conn.stream("answers", retries=100)) == [b"again"]


def test_offline_announcements_of_other_processes(url: str) -> None:
    host, port = url.removeprefix("nats://").split(":")
    with nats_presence.connect(url) as conn, socket.create_connection((host, int(port))) as raw:
        conn.listen_offline()
        conn.listen_offline()
        with nats_presence.session("tab"):
            raw.sendall(b"CONNECT {}\r\nPUB client.offline 3\r\ntab\r\nPING\r\n")
            until(lambda: not is_client_online("tab"))
        assert conn.stats()["offline_in"] == 1


def test_session_grace_delays_offline(url: str) -> None:
    with nats_presence.connect(url, session_grace_ms=100):
        try:
            began = time.monotonic()
            with nats_presence.session("tab"):
                pass
            assert is_client_online("tab")
            until(lambda: not is_client_online("tab"))
            assert time.monotonic() - began >= 0.1
        finally:
            nats_presence.connect(url, session_grace_ms=0).close()


def test_on_event_is_called_again_after_it_raised(server: Server) -> None:
    events: Queue[str] = Queue()

    def on_event(event: ConnectionEvent) -> None:
        events.put(event.kind)
        raise SystemExit(3)

    with nats_presence.connect(server.url, on_event=on_event):
        server.stop()
        assert events.get(timeout=LIMIT) == "disconnected"
        server.start()
        assert events.get(timeout=LIMIT) == "connected"


def service_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nats_presence ")]


def test_a_service_whose_threads_cannot_start_is_not_served(
    conn: Connection, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_two(thread: threading.Thread) -> None:
        if len(service_threads()) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    until(lambda: not service_threads())
    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError):
        conn.service("answers")(lambda request, sender: None)
    until(lambda: not service_threads())
    assert isinstance(failure(conn.stream("answers")), NoRespondersError)
    conn.service("answers", threads=2)(lambda request, sender: sender.send("served"))
    assert list(conn.stream("answers")) == [b"served"]
    sockets = open_sockets()
    with pytest.raises(RuntimeError):
        nats_presence.connect(url, on_event=print)
    until(lambda: open_sockets() == sockets)


def test_a_service_started_after_stop_takes_no_requests(conn: Connection) -> None:
    conn.stop()
    conn.service("answers")(lambda request, sender: None)
    assert isinstance(failure(conn.stream("answers")), NoRespondersError)
    conn.run()


def open_sockets() -> int:
    found = 0
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += "socket" in os.readlink(file)
    return found


class Interrupt(Exception):
    """Raised by the signal handler."""


Interrupted = Callable[[Callable[[], object]], None]


@pytest.fixture
def interrupted(server: Server) -> Iterator[Interrupted]:
    """Calls a function that waits for the stopped server, and lets a signal handler raise meanwhile."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    def is_stopped() -> bool:
        tasks = Path(f"/proc/{server.process.pid}/task").glob("*/stat")
        return all(task.read_text().rsplit(")", 1)[1].split()[0] == "T" for task in tasks)

    def call(function: Callable[[], object]) -> None:
        server.process.send_signal(signal.SIGSTOP)
        until(is_stopped)  # On a busy machine a part of its threads still runs when the signal was sent.
        later = [
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)),
            threading.Timer(0.4, server.process.send_signal, (signal.SIGCONT,)),
        ]
        for timer in later:
            timer.start()
        with pytest.raises(Interrupt):
            function()
        for timer in later:
            timer.join()

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield call
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_serve_leaves_no_service(conn: Connection, interrupted: Interrupted) -> None:
    interrupted(lambda: conn.service("answers")(lambda request, sender: None))
    assert isinstance(failure(conn.stream("answers", timeout=LIMIT)), NoRespondersError)
    until(lambda: not service_threads())


def test_an_interrupted_close_leaves_nothing_open(url: str, interrupted: Interrupted) -> None:
    conn = nats_presence.connect(url, on_event=print)
    conn.service("answers")(lambda request, sender: None)
    mark_client_offline("tab")
    interrupted(conn.close)
    until(lambda: not service_threads())
    conn.close()
    with pytest.raises(ClosedError):
        conn.stats()


def test_an_interrupted_connect_leaves_nothing_open(url: str, interrupted: Interrupted) -> None:
    gc.collect()
    sockets = open_sockets()
    interrupted(lambda: nats_presence.connect(url))
    until(lambda: open_sockets() == sockets)
