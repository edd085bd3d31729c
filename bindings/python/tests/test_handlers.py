"""Which handlers a service takes. A handler that cannot work must not look like one that ended its stream normally."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, Callable

import pytest
from conftest import LIMIT

import nats_presence
from nats_presence import Connection, InvalidError, RemoteError, aio
from nats_presence._arguments import Payload


@pytest.fixture
def conn(url: str, lanes: bool) -> Iterator[Connection]:
    with nats_presence.connect(url, lanes=lanes) as conn:
        yield conn


def run(url: str, main: Callable[[aio.Connection], Awaitable[object]]) -> None:
    async def with_connection() -> None:
        async with aio.connect(url) as conn:
            await main(conn)

    asyncio.run(asyncio.wait_for(with_connection(), LIMIT))


async def coroutine(request: object, sender: object) -> None:
    pass


async def async_generator(request: object, sender: object) -> AsyncIterator[Payload]:
    yield "never"


def generator(request: object, sender: object) -> Iterator[Payload]:
    yield "never"


def variants(handler: Callable[..., Any]) -> list[Any]:
    class Callable_:
        __call__ = staticmethod(handler)

    class Holder:
        def method(self, request: object, sender: object) -> object:
            raise NotImplementedError

    return [handler, functools.partial(handler), Callable_()]


@pytest.mark.parametrize("handler", [*variants(coroutine), *variants(async_generator)])
def test_threads_refuse_async_handlers(conn: Connection, handler: Any) -> None:
    with pytest.raises(TypeError, match=r"aio\.connect") as caught:
        conn.service("answers")(handler)
    assert isinstance(caught.value, InvalidError)
    assert isinstance(failure(conn, "answers"), nats_presence.NoRespondersError)


@pytest.mark.parametrize("handler", variants(generator))
def test_asyncio_refuses_generators_without_async(url: str, handler: Any) -> None:
    async def main(conn: aio.Connection) -> None:
        with pytest.raises(TypeError, match="async def"):
            await conn.serve("answers", handler)

    run(url, main)


@pytest.mark.parametrize("handler", [None, 7, "handler", [coroutine]])
def test_handlers_must_be_callable(conn: Connection, url: str, handler: Any) -> None:
    with pytest.raises(TypeError, match="must be callable"):
        conn.service("answers")(handler)
    with pytest.raises(TypeError, match="must be callable"):
        conn.serve("answers", handler)

    async def main(conn: aio.Connection) -> None:
        with pytest.raises(TypeError, match="must be callable"):
            await conn.serve("answers", handler)

    run(url, main)


def test_a_decorator_without_parentheses_is_refused(conn: Connection) -> None:
    with pytest.raises(TypeError, match=r'@conn\.service\("subject"\)'):

        @conn.service  # type: ignore[arg-type]
        def handler(request: object, sender: object) -> None:
            pass


@pytest.mark.parametrize("subject", [None, 7, b"bytes", "a\0b", len])
def test_an_invalid_subject_is_refused(conn: Connection, url: str, subject: Any) -> None:
    with pytest.raises(InvalidError, match="subject"):
        conn.service(subject)  # Before it decorates.
    with pytest.raises(InvalidError, match="subject"):
        conn.serve(subject, lambda request, sender: None)

    async def main(conn: aio.Connection) -> None:
        with pytest.raises(InvalidError, match="subject"):
            await conn.serve(subject, coroutine)

    run(url, main)


def failure(conn: Connection, subject: str) -> nats_presence.PresenceError:
    with pytest.raises(nats_presence.PresenceError) as caught:
        list(conn.stream(subject, timeout=LIMIT))
    return caught.value


RETURNED: dict[str, Callable[[Any, Any], object]] = {
    "coroutine": lambda request, sender: coroutine(request, sender),
    "async generator": lambda request, sender: async_generator(request, sender),
    "text": lambda request, sender: "answer",
    "bytes": lambda request, sender: b"answer",
    "list": lambda request, sender: ["answer"],
}


@pytest.mark.parametrize("handler", RETURNED.values(), ids=RETURNED)
@pytest.mark.filterwarnings("error")
def test_a_result_of_a_threaded_handler_is_not_dropped_silently(
    conn: Connection, handler: Callable[[Any, Any], object], caplog: pytest.LogCaptureFixture
) -> None:
    conn.service("answers")(handler)
    assert isinstance(failure(conn, "answers"), RemoteError)
    conn.close()
    assert "the handler returned a" in caplog.text


async def returns_text(request: object, sender: object) -> str:
    return "answer"


@pytest.mark.parametrize("handler", [*RETURNED.values(), returns_text], ids=[*RETURNED, "coroutine that returns text"])
def test_a_result_of_an_asyncio_handler_is_not_dropped_silently(
    url: str, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(conn: aio.Connection) -> None:
        await conn.serve("answers", handler)
        if handler is RETURNED["coroutine"]:
            assert [message async for message in conn.stream("answers")] == []
        elif handler is RETURNED["async generator"]:
            assert [message async for message in conn.stream("answers")] == [b"never"]
        else:
            with pytest.raises(RemoteError):
                await conn.stream("answers").next()
            assert "the handler returned a" in caplog.text

    run(url, main)


def test_a_generator_as_a_handler(conn: Connection) -> None:
    ended = []

    @conn.service("answers")
    def count(request: nats_presence.Request, sender: nats_presence.Sender) -> Iterator[Payload]:
        try:
            for number in range(int(request.data)):
                yield str(number)
            if request.client_id:
                raise ValueError("in the middle")
        finally:
            ended.append(request.client_id)

    conn.service("forwards")(lambda request, sender: conn.stream("answers", request.data))
    for subject in ("answers", "forwards"):
        assert list(conn.stream(subject, "1000")) == [b"%d" % number for number in range(1000)]
        assert list(conn.stream(subject, "0")) == []
    stream = conn.stream("answers", "1", client_id="tab")
    assert next(stream) == b"0"
    with pytest.raises(RemoteError, match="the handler failed"):
        next(stream)
    assert ended == ["", "", "", "", "tab"]


def test_a_generator_is_closed_when_its_client_leaves(conn: Connection, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []

    @conn.service("answers", threads=1)
    def for_ever(request: nats_presence.Request, sender: nats_presence.Sender) -> Iterator[Payload]:
        try:
            while True:
                yield "more"
        finally:
            ended.append(sender.status)

    for count in (1, 2):  # The second time shows that the only thread is free again.
        with conn.stream("answers", client_id="tab", retries=1000, retry_delay_ms=10) as stream:
            assert next(stream) == b"more"
        while len(ended) < count:
            pass
    assert all(ended)
    assert not caplog.records


def test_an_async_generator_as_a_handler(url: str, caplog: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Queue[str]()

    async def main(conn: aio.Connection) -> None:
        async def count(request: nats_presence.Request, sender: aio.Sender) -> AsyncIterator[Payload]:
            try:
                for number in range(int(request.data)):
                    yield str(number)
                if request.client_id:
                    await asyncio.sleep(3600)
            finally:
                ended.put_nowait(request.client_id)

        await conn.serve("answers", count)
        await conn.serve("forwards", lambda request, sender: conn.stream("answers", request.data))
        for subject in ("answers", "forwards"):
            for many in (1000, 0):
                stream = conn.stream(subject, str(many))
                assert [message async for message in stream] == [b"%d" % number for number in range(many)]
                assert await ended.get() == ""
        for many in (1, 10_000_000):  # The client leaves while the generator waits, and while it is suspended.
            async with conn.stream("answers", str(many), client_id="tab") as stream:
                assert await stream.next() == b"0"
            assert await ended.get() == "tab"

    run(url, main)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_ended_stream_no_longer_counts_towards_max_streams(conn: Connection, url: str) -> None:
    conn.service("answers", threads=1)(lambda request, sender: sender.send("answer"))
    for _ in range(500):
        assert list(conn.stream("answers")) == [b"answer"]
