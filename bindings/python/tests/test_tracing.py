"""Spans of OpenTelemetry, and the header traceparent."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import LIMIT, run_python, until
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import nats_presence
from nats_presence import InvalidError, NoRespondersError, RemoteError, _tracing, aio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traces:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")

    def get(self, kind: SpanKind, count: int = 1) -> list[ReadableSpan]:
        """Waits until so many spans of a kind have ended, and returns them."""
        until(lambda: len(self.now(kind)) >= count)
        return self.now(kind)

    def now(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is kind]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    traces = Traces()
    monkeypatch.setattr(_tracing, "_tracer", lambda: traces.tracer)
    return traces


def events(span: ReadableSpan) -> list[tuple[Any, ...]]:
    return [(event.name, *(event.attributes or {}).values()) for event in span.events]


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def id_of(span: Any) -> int:
    identity: int = span.get_span_context().span_id
    return identity


class Peers:
    """A worker and a gateway, with threads or with asyncio. The worker's stream ends as the request's payload says."""

    def __init__(self, traces: Traces) -> None:
        self.traces = traces
        self.headers: list[str | None] = []
        self.stopped = threading.Event()
        self.kept: list[Any] = []

    def begin(self, request: nats_presence.Request) -> None:
        self.headers = [request.header(name) for name in ("traceparent", "tracestate", "baggage")]
        with self.traces.tracer.start_as_current_span("work"):
            pass

    def finish(self, request: nats_presence.Request, sender: nats_presence.Sender | aio.Sender) -> None:
        if request.data == b"raise":
            raise ValueError("a secret")
        if request.data == b"error":
            sender.error("a secret")
        if request.data == b"detach":
            sender.detach()
            self.kept.append(sender)


class Threads(Peers):
    @contextmanager
    def run(self, url: str, lanes: bool) -> Iterator[None]:
        def answer(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
            self.begin(request)
            sender.send("one")
            while request.data == b"wait":
                sender.send("more")
                self.stopped.wait(0.005)
            self.finish(request, sender)

        with nats_presence.connect(url, lanes=lanes) as worker, nats_presence.connect(url, lanes=lanes) as self.conn:
            worker.serve("answers.*", answer)
            yield

    def read(self, how: str, count: int = 100, subject: str = "answers.any", **options: Any) -> list[bytes]:
        """Reads a stream to its end, or leaves it after `count` messages."""
        messages = []
        with self.conn.stream(subject, how, client_id="me", **options) as stream:
            for message in stream:
                messages.append(message)
                if len(messages) == count:
                    break
        return messages

    def drop(self) -> None:
        next(self.conn.stream("answers.any", "wait", client_id="me"))

    def end_detached(self) -> None:
        self.kept.pop().end()


class Asyncio(Peers):
    @contextmanager
    def run(self, url: str, lanes: bool) -> Iterator[None]:
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.done = asyncio.Event()
        thread = threading.Thread(target=self.loop.run_until_complete, args=[self.main(url, lanes)])
        thread.start()
        assert self.ready.wait(LIMIT)
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(self.done.set)
            thread.join()
            self.loop.close()

    async def main(self, url: str, lanes: bool) -> None:
        async def answer(request: nats_presence.Request, sender: aio.Sender) -> AsyncIterator[str]:
            self.begin(request)
            yield "one"
            if request.data == b"wait":
                await asyncio.Event().wait()
            self.finish(request, sender)

        async with aio.connect(url, lanes=lanes) as worker, aio.connect(url, lanes=lanes) as self.conn:
            await worker.serve("answers.*", answer)
            self.ready.set()
            await self.done.wait()

    def call(self, coroutine: Any) -> Any:
        # The context of this thread is that of the task, as it is in a program.
        here = context.get_current()

        async def run() -> Any:
            context.attach(here)
            return await coroutine

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(LIMIT)

    def read(self, how: str, count: int = 100, subject: str = "answers.any", **options: Any) -> list[bytes]:
        async def read() -> list[bytes]:
            messages = []
            async with self.conn.stream(subject, how, client_id="me", **options) as stream:
                async for message in stream:
                    messages.append(message)
                    if len(messages) == count:
                        break
            return messages

        messages: list[bytes] = self.call(read())
        return messages

    def drop(self) -> None:
        async def drop() -> None:
            await self.conn.stream("answers.any", "wait", client_id="me").next()

        self.call(drop())

    def end_detached(self) -> None:
        async def end() -> None:
            self.kept.pop().end()

        self.call(end())


@pytest.fixture(params=[Threads, Asyncio])
def peers(request: pytest.FixtureRequest, traces: Traces, url: str, lanes: bool) -> Iterator[Any]:
    peers = request.param(traces)
    with peers.run(url, lanes):
        yield peers


def test_one_span_at_each_end_of_a_stream(peers: Any, traces: Traces) -> None:
    with traces.tracer.start_as_current_span("outer") as outer:
        assert peers.read("") == [b"one"]
    (client,), (server,) = traces.get(SpanKind.CLIENT), traces.get(SpanKind.SERVER)
    work = next(span for span in traces.now(SpanKind.INTERNAL) if span.name == "work")
    assert (parent_of(client), parent_of(server), parent_of(work)) == (id_of(outer), id_of(client), id_of(server))
    assert (client.name, server.name) == ("answers.any", "answers.*")
    both = {"rpc.system.name": "nats_presence", "rpc.response.status_code": "OK"}
    assert client.attributes == {**both, "rpc.method": "answers.any"}
    assert server.attributes == {**both, "rpc.method": "answers.*", "rpc.method_original": "answers.any"}
    assert events(client) == [("first message",)]
    assert events(server) == [("accepted",), ("first message",)]
    assert client.status.status_code is server.status.status_code is StatusCode.UNSET


def test_a_traceparent_of_the_caller_passes_untouched(peers: Any, traces: Traces) -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=1,b=2"}
    assert peers.read("", headers=headers) == [b"one"]
    assert peers.headers == [TRACEPARENT, "a=1,b=2", None]
    (server,) = traces.get(SpanKind.SERVER)
    assert f"{parent_of(server):016x}" == "b7ad6b7169203331"
    assert server.context is not None
    assert f"{server.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert not traces.now(SpanKind.CLIENT)


def test_a_header_as_go_writes_it_is_read(peers: Any, traces: Traces) -> None:
    assert peers.read("", headers={"traceparent": "", "Traceparent": TRACEPARENT}) == [b"one"]
    (server,) = traces.get(SpanKind.SERVER)
    assert f"{parent_of(server):016x}" == "b7ad6b7169203331"


def test_baggage_goes_along(peers: Any, traces: Traces) -> None:
    value = "x" * 4000
    token = context.attach(baggage.set_baggage("tenant", value))
    try:
        assert peers.read("") == [b"one"]
    finally:
        context.detach(token)
    assert peers.headers[2] == f"tenant={value}"


def test_a_client_that_leaves_is_no_error(peers: Any, traces: Traces) -> None:
    assert peers.read("wait", count=1) == [b"one"]
    (client,), (server,) = traces.get(SpanKind.CLIENT), traces.get(SpanKind.SERVER)
    assert events(client) == [("first message",), ("stopped", "cancelled")]
    accepted, first, (stopped, *reason) = events(server)
    assert (accepted, first, stopped) == (("accepted",), ("first message",), "stopped")
    assert reason in (["cancelled"], ["client is offline"])  # On a lane, and on level 0.
    assert (client.attributes or {})["rpc.response.status_code"] == "CANCELLED"
    assert (server.attributes or {})["rpc.response.status_code"] in ("CANCELLED", "OFFLINE")
    assert client.status.status_code is server.status.status_code is StatusCode.UNSET


def test_a_dropped_stream_ends_its_span(peers: Any, traces: Traces) -> None:
    peers.drop()
    gc.collect()
    (client,) = traces.get(SpanKind.CLIENT)
    assert events(client)[-1] == ("stopped", "cancelled")
    traces.get(SpanKind.SERVER)


@pytest.mark.parametrize(("how", "kind"), [("raise", "ValueError"), ("error", "REMOTE")])
def test_a_failure_is_an_error_and_its_text_stays_secret(peers: Any, traces: Traces, how: str, kind: str) -> None:
    with pytest.raises(RemoteError):
        peers.read(how)
    (client,), (server,) = traces.get(SpanKind.CLIENT), traces.get(SpanKind.SERVER)
    for span, error_type in ((client, "REMOTE"), (server, kind)):
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == error_type
        assert "secret" not in span.to_json()


def test_a_request_without_a_worker_is_an_error(peers: Any, traces: Traces) -> None:
    with pytest.raises(NoRespondersError):
        peers.read("", subject="unserved")
    (client,) = traces.get(SpanKind.CLIENT)
    assert (client.attributes or {})["error.type"] == "NO_RESPONDERS"
    assert events(client) == []


def test_a_refused_request_ends_its_span(peers: Any, traces: Traces) -> None:
    with pytest.raises(InvalidError):
        peers.read("", retries=-1)
    (client,) = traces.get(SpanKind.CLIENT)
    assert (client.attributes or {})["error.type"] == "INVALID"


def test_the_span_of_a_detached_sender_ends_with_the_stream(peers: Any, traces: Traces) -> None:
    assert peers.read("detach", count=1) == [b"one"]
    traces.get(SpanKind.CLIENT)
    until(lambda: peers.kept and peers.kept[0].closed)
    assert not traces.now(SpanKind.SERVER)
    with pytest.raises(nats_presence.StreamStoppedError):
        peers.end_detached()
    assert events(traces.get(SpanKind.SERVER)[0])[-1][0] == "stopped"


class Sending:
    """What a handler does with its sender, with threads or asyncio."""

    def __init__(self, sender: Any) -> None:
        self.sender = sender

    async def call(self, name: str, *arguments: Any) -> None:
        result = getattr(self.sender, name)(*arguments)
        if asyncio.iscoroutine(result):
            await result


@pytest.mark.parametrize("how", ["send", "list", "iterable", "too large first"])
@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "asyncio"])
def test_the_first_message_is_recorded_once(url: str, traces: Traces, how: str, is_async: bool) -> None:
    kinds: list[type] = []

    async def answer(request: nats_presence.Request, sender: Any) -> None:
        sending = Sending(sender)
        kinds.append(type(sender))
        if how == "too large first":
            with pytest.raises(nats_presence.TooLargeError):
                await sending.call("send", b"x" * (2 << 20))
        if how in ("list", "iterable"):
            await sending.call("send_many", [b"1", b"2"] if how == "list" else iter([b"1", b"2"]))
        else:
            await sending.call("send", b"1")
            await sending.call("send", b"2")
        kinds.append(type(sender))

    def answer_in_thread(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        asyncio.run(answer(request, sender))

    async def main() -> None:
        async with aio.connect(url) as conn:
            await conn.serve("answers", answer)
            assert [message async for message in conn.stream("answers")] == [b"1", b"2"]

    if is_async:
        asyncio.run(main())
    else:
        with nats_presence.connect(url) as conn:
            conn.serve("answers", answer_in_thread)
            assert list(conn.stream("answers")) == [b"1", b"2"]
    (server,) = traces.get(SpanKind.SERVER)
    assert events(server) == [("accepted",), ("first message",)]
    assert kinds[0] is not kinds[1] is (aio.Sender if is_async else nats_presence.Sender)


SPANS = """
import sys, nats_presence
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

with nats_presence.connect(sys.argv[1]) as conn:
    conn.serve("answers", lambda request, sender: sender.send(str(request.header("traceparent"))))
    list(conn.stream("answers"))  # Before there is a provider.
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    print(*conn.stream("answers"))
print(sorted(span.kind.name for span in exporter.get_finished_spans()))
scope = exporter.get_finished_spans()[0].instrumentation_scope
print(scope.name, scope.version == nats_presence.__version__)
"""

NOT_IMPORTED = """
import sys, nats_presence

with nats_presence.connect(sys.argv[1]) as conn:
    conn.serve("answers", lambda request, sender: sender.send(str(request.header("traceparent"))))
    print(*conn.stream("answers"), *conn.stream("answers", headers={"traceparent": "mine"}))
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_the_provider_of_the_program_gets_the_spans(url: str) -> None:
    out, errors = run_python(SPANS, url).communicate(timeout=LIMIT)
    header, kinds, scope = out.splitlines()
    assert header.startswith("b'00-"), errors
    assert (kinds, scope) == ("['CLIENT', 'SERVER']", "nats_presence True")


@pytest.mark.parametrize("missing", ["", "import sys; sys.modules['opentelemetry'] = None\n"])
def test_opentelemetry_is_not_needed_and_not_imported(url: str, missing: str) -> None:
    out, errors = run_python(missing + NOT_IMPORTED, url).communicate(timeout=LIMIT)
    loaded = "['opentelemetry']" if missing else "[]"
    assert out.splitlines() == ["b'None' b'mine'", loaded], errors
