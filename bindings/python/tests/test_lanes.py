"""Streams on lanes: slow readers slow their workers down, streams are cancelled one by one, messages survive a lost
connection, and dead peers are detected."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Coroutine, Iterator
from queue import Queue
from typing import Any, Callable

import pytest
from conftest import LIMIT, Server, environment, until, waits

import nats_presence
from nats_presence import (
    ClosedError,
    Connection,
    ConnectionEvent,
    PeerGoneError,
    PresenceError,
    Request,
    Sender,
    Stream,
    StreamCancelledError,
    aio,
    is_client_online,
    online_count,
)

WINDOW = 1 << 16


@pytest.fixture
def conn(url: str) -> Iterator[Connection]:
    with nats_presence.connect(url, name="test") as conn:
        yield conn
    gc.collect()
    assert online_count() == 0


def run(url: str, test: Callable[[aio.Connection], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with aio.connect(url, name="test") as conn:
            await test(conn)
        gc.collect()
        assert online_count() == 0

    asyncio.run(asyncio.wait_for(main(), 6 * LIMIT))


async def until_aio(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), LIMIT)


async def received(stream: aio.Stream) -> list[bytes]:
    return [message async for message in stream]


class Stalled:
    """A condition: a client's sender has sent something, and then nothing for 0.1 s."""

    def __init__(self, senders: dict[str, Any], client: str) -> None:
        self.senders, self.client, self.seen, self.since = senders, client, 0, 0.0

    def __call__(self) -> bool:
        sender, now = self.senders.get(self.client), time.monotonic()
        count = sender.send_count if sender else 0
        if count != self.seen:
            self.seen, self.since = count, now
        return count > 0 and now - self.since > 0.1


def test_stats_count_lanes(url: str) -> None:
    cases: list[tuple[dict[str, Any], int]] = [({}, 1), ({"lanes": False}, 0)]
    for options, lanes in cases:
        with nats_presence.connect(url) as worker, nats_presence.connect(url, **options) as gateway:
            worker.service("answers")(lambda request, sender: sender.send("one"))
            assert list(gateway.stream("answers")) == [b"one"]
            assert gateway.stats()["lanes"] == worker.stats()["lanes"] == lanes


# Slow readers ---------------------------------------------------------------------------------------------------------


SIZES = [0, 1, 1000, 2 * WINDOW]


def numbered(size: int) -> list[bytes]:
    """Returns messages for ten windows, at least ten."""
    count = max(10, 10 * WINDOW // (size + 64))
    return [(b"%d" % number).ljust(size, b".")[:size] for number in range(count)]


def max_unread(size: int) -> int:
    """Returns how many messages can be sent before one is read. The last one may exceed the window."""
    return WINDOW // (size + 64) + 1


@pytest.mark.parametrize("how", ["send", "send_many"])
@pytest.mark.parametrize("size", SIZES)
def test_a_slow_reader_slows_only_its_own_worker(conn: Connection, size: int, how: str) -> None:
    senders: dict[str, Sender] = {}
    messages = numbered(size)

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        senders[request.client_id] = sender
        if how == "send_many":
            sender.send_many(messages)
        else:
            for message in messages:
                sender.send(message)

    slow = conn.stream("answers", client_id="slow", stream_buffer_bytes=WINDOW)
    until(Stalled(senders, "slow"))
    assert senders["slow"].send_count <= max_unread(size)
    fast = conn.stream("answers", client_id="fast", stream_buffer_bytes=WINDOW)
    assert list(fast) == messages
    assert senders["slow"].send_count <= max_unread(size)
    first = next(slow)
    assert [first, *slow] == messages


@pytest.mark.parametrize("how", ["send", "send_many"])
@pytest.mark.parametrize("size", SIZES)
def test_a_slow_reader_slows_only_its_own_worker_in_asyncio(url: str, size: int, how: str) -> None:
    """All streams of a connection share a queue here, and messages are taken from it before they are read."""
    senders: dict[str, aio.Sender] = {}
    messages = numbered(size)

    async def test(conn: aio.Connection) -> None:
        async def handler(request: Request, sender: aio.Sender) -> None:
            senders[request.client_id] = sender
            if how == "send_many":
                await sender.send_many(messages)
            else:
                for message in messages:
                    await sender.send(message)

        await conn.serve("answers", handler)

        slow = conn.stream("answers", client_id="slow", stream_buffer_bytes=WINDOW)
        await until_aio(Stalled(senders, "slow"))
        assert senders["slow"].send_count <= max_unread(size)
        fast = conn.stream("answers", client_id="fast", stream_buffer_bytes=WINDOW)
        assert await received(fast) == messages
        assert senders["slow"].send_count <= max_unread(size)
        assert len(slow._messages) <= max_unread(size)
        first = await slow.__anext__()
        assert [first, *await received(slow)] == messages

    run(url, test)


def test_a_reader_that_never_catches_up_gets_all_messages(url: str) -> None:
    """Its buffer is never empty, but it returns credit all the same."""

    async def test(conn: aio.Connection) -> None:
        messages = [b"%d" % number for number in range(20_000)]

        async def handler(request: Request, sender: aio.Sender) -> None:
            await sender.send_many(messages)

        await conn.serve("answers", handler)

        stream = conn.stream("answers", stream_buffer_bytes=WINDOW)
        got = []
        async for message in stream:
            got.append(message)
            if len(got) % 50 == 0:
                await asyncio.sleep(0)
        assert got == messages

    run(url, test)


# Waiting until writable -----------------------------------------------------------------------------------------------


def test_a_waiting_send_can_be_cancelled_or_ended(url: str) -> None:
    async def test(conn: aio.Connection) -> None:
        senders: asyncio.Queue[aio.Sender] = asyncio.Queue()

        async def handler(request: Request, sender: aio.Sender) -> None:
            sender.detach()
            senders.put_nowait(sender)

        await conn.serve("answers", handler)

        stream = conn.stream("answers", stream_buffer_bytes=WINDOW)
        sender = await senders.get()

        async def send(mark: bytes) -> None:
            while True:
                await sender.send(mark * 1000)

        def waits(task: asyncio.Task[None]) -> bool:
            return bool(sender._state_changed._waiters) and not task.done()

        one, two = (asyncio.create_task(send(mark)) for mark in (b"1", b"2"))
        await until_aio(lambda: len(sender._state_changed._waiters) == 2)
        sent = sender.send_count
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert sender.send_count == sent
        await stream.__anext__()  # Takes all messages that have arrived, which returns credit.
        while sender.send_count <= 10 * sent:
            await stream.__anext__()
        assert not two.done()
        await until_aio(lambda: waits(two))
        sent = sender.send_count
        sender.end()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(two, LIMIT)
        rest = await received(stream)
        assert len(rest) < sent == sender.send_count

    run(url, test)


def test_waiting_sends_and_reads_release_the_gil(conn: Connection) -> None:
    senders: dict[str, Sender] = {}

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        senders[request.client_id] = sender
        while True:
            sender.send(b"x" * 1000)

    conn.service("silent")(lambda request, sender: until(lambda: sender.closed))
    slow, silent = conn.stream("answers", client_id="slow", stream_buffer_bytes=WINDOW), conn.stream("silent")
    outcome: Queue[PresenceError] = Queue()

    def read() -> None:
        try:
            next(silent)
        except PresenceError as ended:
            outcome.put(ended)

    reader = threading.Thread(target=read)
    reader.start()
    until(Stalled(senders, "slow"))
    until(lambda: waits(silent))
    began = time.monotonic()
    for _ in range(500):
        time.sleep(0)
    assert time.monotonic() - began < 1, "a waiting call keeps the GIL"
    silent.cancel()
    slow.cancel()
    assert isinstance(outcome.get(timeout=LIMIT), StreamCancelledError)
    reader.join()


# Only one stream stops ------------------------------------------------------------------------------------------------


def cancel(stream: Stream) -> None:
    stream.cancel()


def leave(stream: Stream) -> None:
    with stream:
        pass


@pytest.mark.parametrize("end", [cancel, leave, None], ids=["cancel", "leave", "drop"])
def test_cancelling_a_stream_stops_only_its_sender(conn: Connection, end: Callable[[Stream], None] | None) -> None:
    stopped: Queue[tuple[bytes, PresenceError]] = Queue()
    go = threading.Event()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        try:
            while not go.is_set():
                sender.send("more")
                time.sleep(0.001)
            sender.send("last")
        except PresenceError as refused:
            stopped.put((request.data, refused))

    streams = {data: conn.stream("answers", data, client_id="tab") for data in (b"one", b"two", b"three")}
    assert [next(stream) for stream in streams.values()] == [b"more"] * 3
    if end:
        end(streams[b"two"])
    del streams[b"two"]
    data, refused = stopped.get(timeout=LIMIT)
    assert data == b"two"
    assert isinstance(refused, StreamCancelledError)
    assert is_client_online("tab")
    go.set()
    for stream in streams.values():
        assert list(stream)[-1] == b"last"
    assert stopped.empty()
    assert conn.stats()["offline_out"] == 0


def test_a_timeout_stops_only_its_sender(conn: Connection) -> None:
    stopped: Queue[tuple[bytes, PresenceError]] = Queue()

    @conn.service("answers")
    def handler(request: Request, sender: Sender) -> None:
        try:
            while True:
                sender.send("more")
                time.sleep(0.001)
        except PresenceError as refused:
            stopped.put((request.data, refused))

    stays = conn.stream("answers", b"stays", client_id="tab")
    with pytest.raises(nats_presence.PresenceTimeoutError):
        list(conn.stream("answers", b"is late", client_id="tab", timeout=0.1))
    data, refused = stopped.get(timeout=LIMIT)
    assert data == b"is late"
    assert isinstance(refused, StreamCancelledError)
    assert [next(stays) for _ in range(3)] == [b"more"] * 3
    assert stopped.empty()


def test_a_reader_that_leaves_cancels_only_its_handler(url: str) -> None:
    async def test(conn: aio.Connection) -> None:
        stopped: list[tuple[bytes, int]] = []

        async def handler(request: Request, sender: aio.Sender) -> None:
            try:
                while True:
                    await sender.send("more")
                    await asyncio.sleep(0.001)
            finally:
                stopped.append((request.data, sender.status))

        await conn.serve("answers", handler)

        stays = conn.stream("answers", b"stays", client_id="tab")
        async for _ in conn.stream("answers", b"leaves", client_id="tab"):
            break
        await until_aio(lambda: stopped)
        assert stopped == [(b"leaves", StreamCancelledError.status)]
        for _ in range(3):
            assert await stays.__anext__() == b"more"
        assert len(stopped) == 1

    run(url, test)


# The connection is lost -----------------------------------------------------------------------------------------------


def setting(gone: threading.Event | asyncio.Event) -> Callable[[ConnectionEvent], None]:
    def on_event(event: ConnectionEvent) -> None:
        if event.kind == "disconnected":
            gone.set()

    return on_event


def test_messages_sent_while_disconnected_arrive_later(server: Server) -> None:
    go, gone = threading.Event(), threading.Event()
    messages = [b"%d" % number for number in range(1000)]
    with nats_presence.connect(server.url, on_event=setting(gone)) as conn:

        @conn.service("answers")
        def handler(request: Request, sender: Sender) -> None:
            sender.send("begun")
            go.wait(LIMIT)
            for message in messages:
                sender.send(message)
            sender.send_many(messages)

        stream = conn.stream("answers", client_id="tab")
        assert next(stream) == b"begun"
        server.stop()
        assert gone.wait(LIMIT)
        go.set()
        until(lambda: conn.stats()["bytes_waiting"] > 2 * sum(map(len, messages)))
        server.start()
        assert list(stream) == messages * 2
        assert conn.stats()["connects"] == 2


def test_a_full_send_buffer_waits_for_the_connection_in_asyncio(server: Server) -> None:
    async def main() -> None:
        gone, go = asyncio.Event(), asyncio.Event()
        connecting = aio.connect(server.url, on_event=setting(gone), send_buffer_bytes=WINDOW)
        senders: dict[str, aio.Sender] = {}
        messages = [b"%d" % number for number in range(20_000)]
        async with connecting as conn:

            async def handler(request: Request, sender: aio.Sender) -> None:
                senders[request.client_id] = sender
                await sender.send("begun")
                await go.wait()
                await sender.send_many(messages)

            await conn.serve("answers", handler)

            stream = conn.stream("answers", client_id="tab")
            assert await stream.__anext__() == b"begun"
            server.stop()
            await asyncio.wait_for(gone.wait(), LIMIT)
            go.set()
            await until_aio(lambda: senders["tab"]._state_changed._waiters)
            assert 1 < senders["tab"].send_count < len(messages)
            await asyncio.to_thread(server.start)
            assert await received(stream) == messages

    asyncio.run(asyncio.wait_for(main(), 3 * LIMIT))


# Two processes --------------------------------------------------------------------------------------------------------


class Peer:
    """A Python process that reads and writes lines."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


SETUP = """
import asyncio, hashlib, os, sys, threading, time
import nats_presence
from nats_presence import aio
url = sys.argv[1]
"""
ENDLESS_WORKER = """
conn = nats_presence.connect(url, heartbeat_ms=300, peer_grace_ms=0)
@conn.service("answers")
def handler(request, sender):
    try:
        while True:
            sender.send("more")
            time.sleep(0.01)
    except nats_presence.PresenceError as refused:
        print(type(refused).__name__, flush=True)
print("ready", flush=True)
conn.run()
"""
ENDLESS_GATEWAY = """
conn = nats_presence.connect(url, heartbeat_ms=300, peer_grace_ms=0)
stream = conn.stream("answers", client_id="tab")
next(stream)
print("ready", flush=True)
try:
    for message in stream:
        pass
except nats_presence.PresenceError as ended:
    print(type(ended).__name__, flush=True)
"""
DEATHS = {"killed": (signal.SIGKILL, 0.0), "stopped": (signal.SIGSTOP, 0.6)}
SIDES = ["sync", "asyncio"]


def die(peer: Peer, death: str, wait_until_detected: Callable[[], object]) -> None:
    """Kills or stops the peer, and checks that this is detected neither too early nor too late.

    A peer that was only stopped has to detect it as well.
    """
    sent, at_least = DEATHS[death]
    began = time.monotonic()
    peer.process.send_signal(sent)
    wait_until_detected()
    # Three heartbeats of 0.3 s without an answer. The first may have begun earlier.
    assert at_least <= time.monotonic() - began < LIMIT
    if sent == signal.SIGSTOP:
        peer.process.send_signal(signal.SIGCONT)
        assert peer.read() == "PeerGoneError"


def in_a_loop(url: str, test: Callable[[aio.Connection], Awaitable[None]]) -> None:
    async def main() -> None:
        async with aio.connect(url, heartbeat_ms=300, peer_grace_ms=0) as conn:
            await asyncio.wait_for(test(conn), 3 * LIMIT)

    asyncio.run(main())


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("side", SIDES)
def test_a_worker_that_dies_ends_its_streams(url: str, side: str, death: str) -> None:
    with Peer(SETUP + ENDLESS_WORKER, url) as worker:
        assert worker.read() == "ready"

        def read(stream: Stream) -> None:
            with pytest.raises(PeerGoneError):
                list(stream)

        async def read_in_a_loop(conn: aio.Connection) -> None:
            stream = conn.stream("answers", client_id="tab")
            assert await stream.__anext__() == b"more"
            reader = asyncio.create_task(received(stream))
            dying = asyncio.to_thread(die, worker, death, lambda: until(reader.done))
            await dying
            with pytest.raises(PeerGoneError):
                await reader

        if side == "asyncio":
            in_a_loop(url, read_in_a_loop)
        else:
            with nats_presence.connect(url, heartbeat_ms=300, peer_grace_ms=0) as conn:
                stream = conn.stream("answers", client_id="tab")
                assert next(stream) == b"more"
                die(worker, death, lambda: read(stream))
        assert online_count() == 0


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("side", SIDES)
def test_a_gateway_that_dies_stops_its_senders(url: str, side: str, death: str) -> None:
    stopped: Queue[int] = Queue()

    def answer(request: Request, sender: Sender) -> None:
        try:
            while True:
                sender.send("more")
                time.sleep(0.01)
        except PeerGoneError:
            stopped.put(sender.status)

    async def answer_in_a_loop(request: Request, sender: aio.Sender) -> None:
        try:
            while True:
                await sender.send("more")
                await asyncio.sleep(0.01)
        finally:  # The task is cancelled, or send() has raised before.
            stopped.put(sender.status)

    def dies() -> None:
        with Peer(SETUP + ENDLESS_GATEWAY, url) as gateway:
            assert gateway.read() == "ready"
            assert is_client_online("tab")
            die(gateway, death, lambda: until(lambda: not stopped.empty()))
        assert stopped.get() == PeerGoneError.status
        assert stopped.empty()
        until(lambda: online_count() == 0)

    async def serve(conn: aio.Connection) -> None:
        await conn.serve("answers", answer_in_a_loop)
        await asyncio.to_thread(dies)

    if side == "asyncio":
        in_a_loop(url, serve)
    else:
        with nats_presence.connect(url, heartbeat_ms=300, peer_grace_ms=0) as conn:
            conn.service("answers")(answer)
            dies()


COMMON = """
STREAMS = 200
FAST = dict(reconnect_min_ms=10, reconnect_max_ms=100)
def message(number):
    return number.to_bytes(8, "little") + os.urandom(number % 64)
class Check:
    "The messages of a stream, to compare them at both ends."
    def __init__(self):
        self.digest, self.count, self.last = hashlib.sha256(), 0, None
    def sent(self):
        data = message(self.count)
        self.add(data)
        return data
    def add(self, data):
        self.digest.update(data)
        self.count += 1
    def end(self):
        return b"last" + self.count.to_bytes(8, "little") + self.digest.digest()
    def got(self, data):
        if self.last is not None:
            raise AssertionError("a message after the last")
        if data.startswith(b"last") and len(data) == 44:
            self.last = data
        elif int.from_bytes(data[:8], "little") != self.count:
            raise AssertionError(f"message {int.from_bytes(data[:8], 'little')} where {self.count} was due")
        else:
            self.add(data)
    def is_complete(self):
        return self.last == self.end()
def say(*words):
    print(*words, flush=True)
def rounds():
    "Yields how many times the connection has to be made next; ends with a line that is not a number."
    while (line := sys.stdin.readline().strip()).isdigit():
        yield int(line)
def reconnected(conn, connects):
    while conn.stats()["connects"] < connects:
        time.sleep(0.005)
"""
WORKERS = {
    "sync": """
conn, enough = nats_presence.connect(url, **FAST), threading.Event()
@conn.service("answers", threads=STREAMS)
def handler(request, sender):
    check = Check()
    while not enough.wait(0.05):
        for _ in range(10):
            sender.send(check.sent())
    sender.send(check.end())
say("ready")
for connects in rounds():
    reconnected(conn, connects)
    say("ok")
enough.set()
conn.stop()
conn.run()
say(conn.stats()["connects"])
conn.close()
""",
    "asyncio": """
async def main():
    async with aio.connect(url, **FAST) as conn:
        enough = asyncio.Event()
        async def handler(request, sender):
            check = Check()
            while not enough.is_set():
                await sender.send_many([check.sent() for _ in range(10)])
                await asyncio.sleep(0.05)
            await sender.send(check.end())
        await conn.serve("answers", handler)
        def follow_rounds():
            for connects in rounds():
                reconnected(conn, connects)
                say("ok")
        say("ready")
        await asyncio.to_thread(follow_rounds)
        enough.set()
        conn.stop()
        await conn.run()
        say(conn.stats()["connects"])
asyncio.run(main())
""",
}
GATEWAYS = {
    "sync": """
conn, checks, failures = nats_presence.connect(url, **FAST), [Check() for _ in range(STREAMS)], []
def read(number):
    try:
        for data in conn.stream("answers", client_id=f"client {number}"):
            checks[number].got(data)
    except Exception as failure:
        failures.append(f"{number}: {failure!r}")
readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(STREAMS)]
for reader in readers:
    reader.start()
for connects in rounds():
    reconnected(conn, connects)
    before = [check.count for check in checks]
    while not failures and any(check.count == count for check, count in zip(checks, before)):
        time.sleep(0.01)
    say(*failures or ["ok"])
for reader in readers:
    reader.join()
say(*failures or ["ok"])
say(sum(check.is_complete() for check in checks))
say(conn.stats()["connects"])
conn.close()
""",
    "asyncio": """
async def main():
    checks, failures = [Check() for _ in range(STREAMS)], []
    async def read(conn, number):
        try:
            async for data in conn.stream("answers", client_id=f"client {number}"):
                checks[number].got(data)
        except Exception as failure:
            failures.append(f"{number}: {failure!r}")
    async with aio.connect(url, **FAST) as conn:
        readers = [asyncio.create_task(read(conn, number)) for number in range(STREAMS)]
        def follow_rounds():
            for connects in rounds():
                reconnected(conn, connects)
                before = [check.count for check in checks]
                while not failures and any(check.count == count for check, count in zip(checks, before)):
                    time.sleep(0.01)
                say(*failures or ["ok"])
        await asyncio.to_thread(follow_rounds)
        await asyncio.gather(*readers)
        say(*failures or ["ok"])
        say(sum(check.is_complete() for check in checks))
        say(conn.stats()["connects"])
asyncio.run(main())
""",
}


@pytest.mark.parametrize("side", SIDES)
def test_twenty_restarts_under_200_streams(server: Server, side: str) -> None:
    """Every message arrives, in order, once."""
    code = SETUP + COMMON
    with Peer(code + WORKERS[side], server.url) as worker:
        assert worker.read() == "ready"
        with Peer(code + GATEWAYS[side], server.url) as gateway:

            def check_all_streams_continue(connects: int) -> None:
                for peer in (worker, gateway):
                    peer.write(f"{connects}")
                    assert peer.read() == "ok"

            check_all_streams_continue(1)
            for restarts in range(1, 21):
                server.stop()
                server.start()
                check_all_streams_continue(1 + restarts)
            worker.write("enough")
            gateway.write("enough")
            assert gateway.read() == "ok"
            assert gateway.read() == "200"
            assert [int(gateway.read()), int(worker.read())] == [21, 21]
            assert [worker.process.wait(LIMIT), gateway.process.wait(LIMIT)] == [0, 0]
