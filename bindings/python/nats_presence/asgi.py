"""Server-sent events for ASGI servers and frameworks: Starlette, FastAPI, uvicorn, hypercorn.

    @app.get("/events/{client}")
    async def events(client: str) -> SSEResponse:
        return SSEResponse(app.state.conn.stream("answers", client_id=client))

The module needs none of them. If Starlette is installed, SSEResponse is one of its responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Callable, Union

from . import sse
from ._arguments import Payload, check_seconds
from .aio import Stream
from .errors import InvalidError, PresenceError
from .sse import Event

try:
    from starlette.responses import Response
except ImportError:

    class Response:  # type: ignore[no-redef]
        """In place of Starlette's class, of which SSEResponse needs nothing. FastAPI asks for it."""


__all__ = ["Event", "SSEResponse"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Source = Union[Stream, AsyncIterator[Union[Payload, Event]]]

MAX_CHUNK = 1 << 16
"""So many bytes of messages that have already arrived are sent at once."""


class SSEResponse(Response):
    """An ASGI response that sends the messages of a stream as server-sent events.

    `source` is a stream, or an asynchronous generator of messages or of `Event`s. The response ends with the event
    `end`, or with the event `failure` if the source raises a PresenceError; see nats_presence.sse. `failure_text`
    returns the data of that event; with `str` the client gets the whole message of the exception. Another exception
    of a generator is raised to the server, after a `failure` that does not show its text.

    When the client leaves, the stream is cancelled, or the generator closed, at once: also while a message is being
    sent to the client, and behind middleware. The same happens if the task of the response is cancelled, and if the
    client has accepted no data for `write_timeout` seconds or a little more.
    Every `keepalive` seconds the response sends a comment, so that proxies do not close the connection and the server
    detects a client that has vanished. `headers` replaces or adds headers.
    """

    def __init__(
        self,
        source: Source,
        *,
        keepalive: float = sse.KEEPALIVE,
        write_timeout: float = 30.0,
        failure_text: sse.FailureText = sse.failure_text,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._keepalive = _check_positive("keepalive", keepalive)
        self._write_timeout = _check_positive("write_timeout", write_timeout)
        self._failure_text = failure_text
        self._has_begun = False
        self.status_code = 200
        self.background = None  # Starlette and FastAPI set it.
        fields = {name.lower(): value for name, value in {**sse.HEADERS, **(headers or {})}.items()}
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            with suppress(_ClientGoneError):
                body = _Body(send)
                if scope.get("method") == "HEAD":
                    await body.start(self.raw_headers)
                    await body.send(b"", more=False)
                else:
                    await self._send_events_until_disconnect(receive, body)
        finally:
            if not self._has_begun:
                await _close(self._source)
        if self.background is not None:
            await self.background()

    async def _send_events_until_disconnect(self, receive: Receive, body: _Body) -> None:
        sending = asyncio.create_task(self._send_events(body))
        tasks = [
            sending,
            asyncio.create_task(_wait_for_disconnect(receive)),
            asyncio.create_task(self._send_comments(body)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if isinstance(self._source, Stream):
                self._source.cancel()  # Before its task, which may be sending.
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            task.result()

    async def _send_events(self, body: _Body) -> None:
        self._has_begun = True
        source = self._source
        try:
            await body.start(self.raw_headers)
            async for item in source:
                parts = [_encode(item)]
                size = len(parts[0])
                while isinstance(source, Stream) and source._messages and size < MAX_CHUNK:
                    parts.append(_encode(await source.__anext__()))
                    size += len(parts[-1])
                await body.send(b"".join(parts))
            last, failure = sse.END, None
        except _ClientGoneError:
            return
        except PresenceError as why:
            last, failure = sse.failure_event(self._failure_text(why)), None
        except Exception as why:
            last, failure = sse.failure_event("the stream failed"), why
        finally:
            await _close(source)
        with suppress(_ClientGoneError):
            await body.send(last)
            await body.send(b"", more=False)
        if failure is not None:
            raise failure

    async def _send_comments(self, body: _Body) -> None:
        """Returns when the client accepts no data: a comment waits until what is being sent before it is sent."""
        while True:
            await asyncio.sleep(min(self._keepalive, self._write_timeout))
            comment = asyncio.create_task(body.send(sse.COMMENT))
            try:
                # Not asyncio.wait_for(), which before Python 3.12 can lose that this task is cancelled.
                done, _ = await asyncio.wait([comment], timeout=self._write_timeout)
                if not done:
                    return
                comment.result()
            except _ClientGoneError:
                return
            finally:
                comment.cancel()


class _ClientGoneError(Exception):
    """The server cannot send to the client any more."""


class _Body:
    """Sends a response. The parts of its body may come from several tasks."""

    def __init__(self, send: Send) -> None:
        self._asgi_send = send
        self._lock = asyncio.Lock()

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        async with self._lock:
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            # A server or a proxy may keep the headers until something follows.
            await self._send({"type": "http.response.body", "body": b":\n\n", "more_body": True})

    async def send(self, data: bytes, more: bool = True) -> None:
        async with self._lock:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send(self, message: Message) -> None:
        try:
            await self._asgi_send(message)
        except OSError as why:
            raise _ClientGoneError from why


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_positive(name: str, value: float) -> float:
    if not check_seconds(name, value):
        raise InvalidError(f"{name} {value!r:.80}: must be more than 0 seconds")
    return float(value)


def _encode(item: Payload | Event) -> bytes:
    return (item if isinstance(item, Event) else Event(item)).encode()


async def _close(source: Source) -> None:
    """Cancels a stream, or closes a generator that is suspended at its `yield`."""
    if (aclose := getattr(source, "aclose", None)) is not None:
        await aclose()
