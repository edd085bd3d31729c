"""Server-sent events: their text, SSEResponse without a server, and the iterator for WSGI.

test_frameworks.py and test_documented_hosts.py have them under real servers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import suppress
from typing import Any, Callable

import pytest
from conftest import LIMIT, until
from event_source import Received, normalised, parse
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nats_presence
from nats_presence import InvalidError, StreamStoppedError, aio, sse
from nats_presence.asgi import Event, SSEResponse

LINE_ENDS = [
    b"\n", b"\r", b"\r\n", b"\n\nevent: evil", b"a\n\nevent: evil\ndata: x\n\n", b"\r\revent: evil\r\r", b"\n\r\n\r",
    b"", b" ", b" two leading spaces", b":comment", b"data: x", b"id: 1\nretry: 1", b"end\n", b"\0", b"\xff\n\xe2\x82",
    b"\xef\xbb\xbfBOM", "Zeilenende\u2028\u2029\x85".encode(),
]  # fmt: skip


@pytest.mark.parametrize("name", ["", "token"])
@pytest.mark.parametrize("message", LINE_ENDS)
def test_a_message_stays_one_event(message: bytes, name: str) -> None:
    text = b":\n\n" + Event(b"before").encode() + Event(message, name).encode() + sse.END
    assert parse(text) == [("message", "before"), (name or "message", normalised(message)), ("end", "")]


def test_any_message_stays_one_event() -> None:
    random.seed(5)
    for _ in range(5000):
        message = b"".join(random.choices([b"\n", b"\r", b"data:", b"event: evil", b":", b" ", b"x"], k=9))
        assert parse(Event(message).encode() + sse.END) == [("message", normalised(message)), ("end", "")], message


def test_an_event_has_an_id() -> None:
    assert Event("text", "name", "7").encode() == b"event: name\nid: 7\ndata: text\n\n"


@pytest.mark.parametrize("text", ["a\nb", "a\rdata: x", "a\0"])
def test_a_name_or_an_id_with_a_line_end_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match=r"event 'a.*line end"):
        Event(b"", text).encode()
    with pytest.raises(InvalidError, match=r"id 'a.*line end"):
        Event(b"", id=text).encode()


@pytest.mark.parametrize("option", ["keepalive", "write_timeout"])
@pytest.mark.parametrize("value", [0, -1, "1", None, float("nan")])
def test_an_invalid_time_is_refused(option: str, value: Any) -> None:
    async def generate() -> AsyncIterator[str]:
        yield ""

    with pytest.raises(InvalidError, match=f"{option} .* seconds"):
        SSEResponse(generate(), **{option: value})


Message = dict[str, Any]
Body = Callable[[aio.Stream], Any]


class Client:
    """An ASGI server with one client: `receive` and `send` of a request, and what the client has got."""

    def __init__(self, reads: bool = True) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self.blocked, self.unblocked = asyncio.Event(), asyncio.Event()
        self.reads = reads
        self.requests = [{"type": "http.request", "body": b"ignored", "more_body": False}]

    async def receive(self) -> Message:
        if self.requests:
            return self.requests.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.reads and len(self.sent) > 2:
            self.blocked.set()
            await self.unblocked.wait()
        self.sent.append(message)

    @property
    def headers(self) -> dict[bytes, bytes]:
        assert [message["type"] for message in self.sent].count("http.response.start") == 1
        assert self.sent[0]["status"] == 200
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def events(self) -> list[Received]:
        return parse(self.body)

    @property
    def is_complete(self) -> bool:
        return self.sent[-1].get("more_body", False) is False

    async def call(self, app: Callable[..., Awaitable[None]], method: str = "GET") -> None:
        scope = {"type": "http", "method": method, "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
        await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, self.receive, self.send)


class Worker:
    """A worker for one test: it sends `messages`, then waits until it is stopped, or raises or returns."""

    def __init__(self, *messages: bytes, then: Callable[[], Any] | None = None) -> None:
        self.messages, self.then = messages, then
        self.started, self.stopped = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: nats_presence.Request, sender: aio.Sender) -> None:
        try:
            for message in self.messages:
                await sender.send(message)
            self.started.set()
            if self.then is not None:
                self.then()
                return
            await asyncio.Event().wait()
        finally:
            if sender.closed:
                self.stopped.set()


def finish() -> None:
    """The worker's stream ends."""


def run(url: str, worker: Worker, test: Callable[[aio.Connection], Awaitable[None]]) -> None:
    async def main() -> None:
        async with aio.connect(url) as conn:
            await conn.serve("answers", worker, send_errors=True)
            await test(conn)

    asyncio.run(asyncio.wait_for(main(), 2 * LIMIT))


def test_sends_the_messages_and_the_end(url: str) -> None:
    async def test(conn: aio.Connection) -> None:
        client = Client()
        await client.call(SSEResponse(conn.stream("answers"), headers={"X-Own": "1", "cache-control": "no-cache"}))
        assert client.events == [("message", "one"), ("message", "a\n\nevent: evil"), ("end", "")]
        assert client.is_complete
        assert client.headers == {
            b"content-type": b"text/event-stream",
            b"cache-control": b"no-cache",
            b"x-accel-buffering": b"no",
            b"x-own": b"1",
        }

    run(url, Worker(b"one", b"a\r\revent: evil", then=finish), test)


def test_messages_that_have_arrived_are_sent_at_once(url: str) -> None:
    worker = Worker(*(b"%d" % number for number in range(1000)), then=finish)

    async def test(conn: aio.Connection) -> None:
        client = Client()
        stream = conn.stream("answers")
        await worker.started.wait()
        await client.call(SSEResponse(stream))
        assert client.events == [*(("message", str(number)) for number in range(1000)), ("end", "")]
        assert len(client.sent) < 200

    run(url, worker, test)


def test_a_failure_is_an_event_and_the_answer_does_not_look_complete(url: str) -> None:
    def fail() -> None:
        raise ValueError("out of\n\nevent: end\ndata: memory")

    async def test(conn: aio.Connection) -> None:
        client = Client()
        await client.call(SSEResponse(conn.stream("answers")))
        assert client.events == [("message", "one"), ("failure", "the worker ended the stream with an error")]
        client = Client()
        await client.call(SSEResponse(conn.stream("answers"), failure_text=str))
        assert client.events == [("message", "one"), ("failure", "out of\n\nevent: end\ndata: memory")]
        client = Client()
        await client.call(SSEResponse(conn.stream("unserved")))
        assert [event.name for event in client.events] == ["failure"]

    run(url, Worker(b"one", then=fail), test)


def test_the_timeout_of_the_stream_is_a_failure(url: str) -> None:
    async def test(conn: aio.Connection) -> None:
        client = Client()
        await client.call(SSEResponse(conn.stream("answers", timeout=0.2), keepalive=0.05))
        assert [event.name for event in client.events] == ["failure"]
        assert sse.COMMENT in client.body

    run(url, Worker(), test)


Respond = Callable[[], SSEResponse]


def alone(respond: Respond) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond()(scope, receive, send)

    return app


def in_starlette(respond: Respond) -> Any:
    async def endpoint(request: Request) -> Response:
        return respond()

    return Starlette(routes=[Route("/", endpoint)])


def in_fastapi(respond: Respond) -> Any:
    app = FastAPI()

    @app.get("/")
    async def endpoint() -> SSEResponse:
        return respond()

    return app


def behind_middleware(respond: Respond) -> Any:
    async def dispatch(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    async def dispatch_with_body(request: Request, call_next: Any) -> Response:
        await request.body()
        return await dispatch(request, call_next)

    return BaseHTTPMiddleware(BaseHTTPMiddleware(in_starlette(respond), dispatch), dispatch_with_body)


apps = pytest.mark.parametrize("make_app", [alone, in_starlette, in_fastapi, behind_middleware])


async def generate(conn: aio.Connection, closed: asyncio.Event) -> AsyncIterator[bytes | Event]:
    try:
        async with conn.stream("answers") as stream:
            async for message in stream:
                yield message
                yield Event(message, "again")
    finally:
        closed.set()


@apps
@pytest.mark.parametrize("generator", [False, True], ids=["stream", "generator"])
@pytest.mark.parametrize("sends", [False, True], ids=["silent", "sending"])
def test_a_client_that_leaves_stops_its_worker(url: str, make_app: Any, generator: bool, sends: bool) -> None:
    """Also while a message is being sent to it, when the client reads nothing."""
    worker = Worker(*[b"x" * 50_000] * (100 if sends else 1))

    async def test(conn: aio.Connection) -> None:
        client, closed = Client(reads=not sends), asyncio.Event()

        def respond() -> SSEResponse:
            # The response, and with it the stream, outlives the request.
            responses.append(SSEResponse(generate(conn, closed) if generator else conn.stream("answers")))
            return responses[-1]

        responses: list[SSEResponse] = []
        task = asyncio.create_task(client.call(make_app(respond)))
        await (client.blocked if sends else worker.started).wait()
        assert not worker.stopped.is_set()
        client.left.set()
        await worker.stopped.wait()
        assert not generator or closed.is_set()
        client.unblocked.set()
        await task
        assert {"end", "failure"}.isdisjoint(event.name for event in client.events)

    run(url, worker, test)


@apps
@pytest.mark.parametrize("sends", [False, True], ids=["silent", "sending"])
def test_a_cancelled_response_stops_its_worker(url: str, make_app: Any, sends: bool) -> None:
    """As a server cancels it that shuts down."""
    worker = Worker(*[b"x" * 50_000] * (100 if sends else 1))

    async def test(conn: aio.Connection) -> None:
        client = Client(reads=not sends)
        responses = [SSEResponse(conn.stream("answers"))]
        task = asyncio.create_task(client.call(make_app(lambda: responses[0])))
        await (client.blocked if sends else worker.started).wait()
        task.cancel()
        await worker.stopped.wait()
        client.unblocked.set()
        with suppress(asyncio.CancelledError):
            await task

    run(url, worker, test)


def test_a_client_that_reads_nothing_stops_its_worker(url: str) -> None:
    worker = Worker(*[b"x" * 50_000] * 100)

    async def test(conn: aio.Connection) -> None:
        client = Client(reads=False)  # It does not leave either.
        await client.call(SSEResponse(conn.stream("answers"), write_timeout=0.1))
        await worker.stopped.wait()

    run(url, worker, test)


def test_a_server_that_raises_in_send_stops_the_worker(url: str) -> None:
    worker = Worker(*[b"x"] * 10)

    async def test(conn: aio.Connection) -> None:
        class Gone(Client):
            async def send(self, message: Any) -> None:
                raise ConnectionResetError

        response = SSEResponse(conn.stream("answers"))
        await Gone().call(response)
        await worker.stopped.wait()

    run(url, worker, test)


def test_a_response_to_head_stops_its_worker(url: str) -> None:
    worker = Worker(b"one")

    async def test(conn: aio.Connection) -> None:
        client, response = Client(), SSEResponse(conn.stream("answers"))
        await worker.started.wait()
        await client.call(response, "HEAD")
        assert b"content-type" in client.headers
        assert client.is_complete
        await worker.stopped.wait()

    run(url, worker, test)


def test_an_exception_of_a_generator_reaches_the_server_but_not_the_client() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "one"
        raise KeyError("secret")

    async def main() -> None:
        client = Client()
        with pytest.raises(KeyError):
            await client.call(SSEResponse(generate()))
        assert client.events == [("message", "one"), ("failure", "the stream failed")]

    asyncio.run(main())


def test_the_end_is_noticed_while_comments_are_sent() -> None:
    """Some of many streams end just as a comment has been sent. asyncio.wait_for() can lose a cancellation then."""

    async def generate() -> AsyncIterator[str]:
        yield "one"
        await asyncio.sleep(0.04)

    async def main() -> None:
        clients = [Client() for _ in range(200)]
        await asyncio.gather(*(client.call(SSEResponse(generate(), keepalive=0.01)) for client in clients))
        assert all(client.events == [("message", "one"), ("end", "")] for client in clients)

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_comments_are_sent_while_the_stream_is_silent() -> None:
    async def generate() -> AsyncIterator[str]:
        while client.body.count(sse.COMMENT) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        yield "one"

    async def main() -> None:
        await client.call(SSEResponse(generate(), keepalive=0.01))
        assert client.events == [("message", "one"), ("end", "")]

    client = Client()
    asyncio.run(main())


def test_the_background_task_runs_after_the_response() -> None:
    async def main() -> None:
        client, calls = Client(), []

        async def generate() -> AsyncIterator[str]:
            yield "one"

        async def background() -> None:
            calls.append(client.is_complete)

        response = SSEResponse(generate())
        response.background = background  # type: ignore[assignment]
        await client.call(response)
        assert calls == [True]

    asyncio.run(main())


def test_the_module_does_not_need_starlette(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    from nats_presence import asgi

    async def generate() -> AsyncIterator[str]:
        yield "one"

    monkeypatch.setitem(sys.modules, "starlette.responses", None)
    try:
        bare = importlib.reload(asgi).SSEResponse
        assert bare.__mro__[1].__module__ == "nats_presence.asgi"
        client = Client()
        asyncio.run(client.call(bare(generate())))
        assert client.events == [("message", "one"), ("end", "")]
    finally:
        monkeypatch.undo()
        importlib.reload(asgi)


@pytest.fixture
def conn(url: str) -> Iterator[nats_presence.Connection]:
    with nats_presence.connect(url) as conn:
        yield conn


def test_wsgi_events(conn: nats_presence.Connection) -> None:
    conn.serve("answers", lambda request, sender: sender.send_many([b"one", b"a\n\nevent: evil"]))
    assert parse(b"".join(sse.events(conn.stream("answers")))) == [
        ("message", "one"), ("message", "a\n\nevent: evil"), ("end", ""),
    ]  # fmt: skip


def test_wsgi_events_of_a_stream_that_fails(conn: nats_presence.Connection) -> None:
    def fail(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        sender.send(b"one")
        sender.error("no\rmemory")

    conn.serve("answers", fail)
    events = parse(b"".join(sse.events(conn.stream("answers"))))
    assert events == [("message", "one"), ("failure", "the worker ended the stream with an error")]
    events = parse(b"".join(sse.events(conn.stream("answers"), failure_text=str)))
    assert events == [("message", "one"), ("failure", "no\nmemory")]
    assert [event.name for event in parse(b"".join(sse.events(conn.stream("unserved"))))] == ["failure"]


def test_wsgi_comments_and_the_timeout_of_the_stream(conn: nats_presence.Connection) -> None:
    conn.serve("answers", lambda request, sender: sender.detach() or kept.append(sender))  # type: ignore[func-returns-value]
    kept: list[nats_presence.Sender] = []
    body = list(sse.events(conn.stream("answers", timeout=0.3), keepalive=0.05))
    assert body[0] == sse.COMMENT
    assert [event.name for event in parse(b"".join(body))] == ["failure"]
    until(lambda: kept[0].closed)


def test_a_closed_wsgi_iterator_stops_its_worker(conn: nats_presence.Connection) -> None:
    senders: list[nats_presence.Sender] = []

    def answer(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        senders.append(sender)
        sender.detach()
        sender.send("one")

    conn.serve("answers", answer)
    body = sse.events(conn.stream("answers"))
    assert next(body) == b"data: one\n\n"
    body.close()  # type: ignore[attr-defined]
    until(lambda: senders[0].closed)
    with pytest.raises(StreamStoppedError):
        senders[0].send("two")
