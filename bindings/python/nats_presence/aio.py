"""The asyncio side: one queue for each connection, whose file descriptor the event loop watches.

Everything here belongs to the thread of the loop in which connect() was entered. Only marks, sessions and what only
reads a sender (status, closed, send_count) may be used from other threads.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from ctypes import string_at
from typing import Callable

from . import _ffi
from ._arguments import Option, Payload, payload
from ._ffi import Event, lib
from ._shared import (
    BaseConnection,
    BaseSender,
    OnEvent,
    Request,
    connection_event,
    decode,
    drain_ms,
    new_queue,
    notify,
    request_options,
)
from .errors import PresenceError, check, error, status_text

BATCH = 256
BURST = 64
STREAM_BUFFER = 64 << 20
MESSAGE_OVERHEAD = 64


class Sender(BaseSender):
    __doc__ = BaseSender.__doc__

    def __init__(self, handle: int, client_id: str) -> None:
        super().__init__(handle, client_id)
        self._changed = asyncio.Event()
        self._burst = 0
        self._task: asyncio.Task[None] | None = None

    async def send(self, data: Payload) -> None:
        """Sends one message; text as UTF-8. Waits while there is no room, and yields to the loop now and then.

        Raises Offline as soon as the client has left, and Closed or Disconnected when the stream is over otherwise.
        After TooLarge, Reserved and Invalid the stream goes on.
        """
        raw = payload(data)
        while True:
            status = lib.presence_sender_send(self._handle, raw, len(raw))
            if status != _ffi.FULL or self.closed:
                break
            self._changed.clear()
            await self._changed.wait()
        self._check(status, len(raw))
        self._burst = (self._burst + 1) % BURST
        if self._burst == 0:
            await asyncio.sleep(0)

    async def send_many(self, messages: Iterable[Payload]) -> None:
        """Sends one message after the other, up to the first that fails; `send_count` tells how far it came."""
        for data in messages:
            await self.send(data)

    def _on_stopped(self, status: int) -> None:
        self._changed.set()
        if self._task is not None:
            self._task.cancel(status_text(status))

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._task = None


Handler = Callable[[Request, Sender], Awaitable[object]]


class Stream:
    """The messages of one stream, as an asynchronous iterator of bytes.

    It ends when the worker ends it; otherwise by an exception: Remote (the worker's error), NoResponders, Timeout,
    Offline, Full (the reader was too slow), Disconnected, Closed, Cancelled.
    Leaving the `async with`, or dropping it, cancels it.
    """

    _handle: int | None = None

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._messages: deque[bytes] = deque()
        self._room = STREAM_BUFFER
        self._arrived = asyncio.Event()
        self._ended = False
        self._failure: PresenceError | None = None

    def __del__(self) -> None:
        lib.presence_stream_free(self._handle)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._ended:
                failure, self._failure = self._failure, None
                raise failure or StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        data = self._messages.popleft()
        self._room += len(data) + MESSAGE_OVERHEAD
        return data

    def cancel(self) -> None:
        """Ends the stream, for its reader with Cancelled, and tells the worker that the client has left.

        But while another stream, a session or a mark keeps the client online here, the worker is not told. Once the
        stream has ended this has no effect.
        """
        lib.presence_stream_cancel(self._handle)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()

    def _on_event(self, event: Event) -> None:
        if self._ended:
            return
        if event.kind == _ffi.EVENT_DATA:
            data = string_at(event.data or 0, event.data_len)
            self._room -= len(data) + MESSAGE_OVERHEAD
            if self._room >= 0:
                self._messages.append(data)
                self._arrived.set()
            else:
                self.cancel()
                self._end(error(_ffi.FULL, "the stream's reader was too slow: stream_buffer_bytes wait for it"))
        elif event.kind == _ffi.EVENT_END:
            self._end(None)
        elif event.kind == _ffi.EVENT_ERROR:
            self._end(error(event.status, decode(event.data, event.data_len)))

    def _end(self, failure: PresenceError | None) -> None:
        if not self._ended:
            self._ended, self._failure = True, failure
            self._arrived.set()


class Connection(BaseConnection):
    """A connection to nats-server, made by connect(), for one event loop."""

    _queue: int | None = None

    def _start(self, on_event: OnEvent | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._tags = itertools.count(1)
        self._handlers: dict[int, Handler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._senders: weakref.WeakValueDictionary[int, Sender] = weakref.WeakValueDictionary()
        self._streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self._stopped = asyncio.Event()
        self._events = (Event * BATCH)()
        self._queue = new_queue()
        self._fd: int = lib.presence_queue_fd(self._queue)
        check(min(self._fd, 0), "the queue's file descriptor")
        if on_event is not None:
            self._watch(self._queue)
        self._loop.add_reader(self._fd, self._drain)

    async def listen_offline(self) -> None:
        """Applies the offline announcements of other processes in this one. Serving does it too. Raises Closed."""
        self.stats()
        await asyncio.to_thread(self._listen_offline)

    def service(self, subject: str, *, queue: str = "", max_streams: int = 0) -> Callable[[Handler], Handler]:
        """Decorates `async def handler(request, sender)`, which serves the subject from now on, in a task per request.

        Requests are spread over all processes that serve the subject in the same `queue` group; "" is no group. At most
        `max_streams` streams (0: 10,000) run at once: a request beyond is answered with "server busy".
        The stream ends when the handler returns (see Sender.detach), with an error when it raises. When the client
        leaves, or the stream is over otherwise, the handler's task is cancelled; the message of the CancelledError says
        why. What it still sends raises Offline (or Closed, Disconnected).
        Decorating waits for a round trip to the server, in the loop's thread. Raises Invalid, Closed, Timeout.
        """

        def decorate(handler: Handler) -> Handler:
            tag = next(self._tags)
            self._handlers[tag] = handler
            try:
                self._serve(self._live_queue(), subject, queue, max_streams, tag)
            except PresenceError:
                del self._handlers[tag]
                raise
            return handler

        return decorate

    def stream(
        self,
        subject: str,
        data: Payload = b"",
        *,
        client_id: str = "",
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Option,
    ) -> Stream:
        """Requests a stream for a client, who is online here as long as it runs. Does not wait for the worker.

        `timeout`: seconds from request to end, else Timeout. `options`: retries, retry_delay_ms, stream_buffer_bytes
        (see presence_config_set in the C header). Raises Invalid, TooLarge, Full, Disconnected, Closed.
        """
        tag, stream = next(self._tags), Stream(self)
        settings = request_options(timeout, headers, options)
        self._streams[tag] = stream
        stream._handle = self._request(self._live_queue(), subject, data, client_id, settings, tag)
        stream._room = int(options.get("stream_buffer_bytes") or STREAM_BUFFER)
        return stream

    def stop(self) -> None:
        """Takes no more requests. Streams that run go on; run() returns when their handlers have."""
        self._stop_services()
        self._stopped.set()

    async def run(self) -> None:
        """Waits until close(), or until stop() and the return of all handlers."""
        self._is_closed()  # Raises Forked.
        await self._stopped.wait()
        while self._drain():
            pass
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, drain: float | None = 5.0) -> None:
        """Closes it: senders and streams that still run end with Closed, and the other ends are told.

        Then it waits, at most `drain` seconds (None: without limit), until the server has all that was sent before and
        the handlers, whose tasks are cancelled, have returned. Raises Timeout or Disconnected when the server may not
        have it all; the connection is closed all the same. Once more has no effect.
        """
        limit = drain_ms(drain)
        if self._is_closed():
            return
        deadline = time.monotonic() + limit / 1000
        try:
            status = await asyncio.to_thread(self._close_now, limit)
        finally:
            self._detach()
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=None if limit < 0 else max(0.0, deadline - time.monotonic()))
        if status != _ffi.CLOSED:
            check(status, "closing the connection")

    def _live_queue(self) -> int:
        if self._queue is None:
            raise error(_ffi.CLOSED, "connection: already ended")
        return self._queue

    def _drain(self) -> bool:
        """Dispatches what waits in the queue, up to a batch; whether there was any."""
        if self._queue is None:
            return False
        count = lib.presence_queue_wait(self._queue, self._events, BATCH, 0)
        for event in self._events[: max(count, 0)]:
            self._dispatch(event)
        return bool(count > 0)

    def _dispatch(self, event: Event) -> None:
        kind = event.kind
        if kind in (_ffi.EVENT_DATA, _ffi.EVENT_END, _ffi.EVENT_ERROR):
            stream = self._streams.get(event.tag)
            if stream is not None:
                stream._on_event(event)
        elif kind == _ffi.EVENT_REQUEST:
            sender = Sender(event.sender, decode(event.client, event.client_len))
            handler = self._handlers.get(event.tag)
            if handler is None:
                return  # Serving failed after all: the sender, dropped, ends its stream.
            self._senders[event.sender] = sender
            task = self._loop.create_task(self._answer(handler, Request(sender, event), sender))
            sender._task = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(sender._on_done)
        elif kind in (_ffi.EVENT_STOPPED, _ffi.EVENT_WRITABLE):
            known = self._senders.get(event.sender)
            if known is not None and kind == _ffi.EVENT_STOPPED:
                known._on_stopped(event.status)
            elif known is not None:
                known._changed.set()
        elif self._on_event is not None:
            what = connection_event(event)
            if what is not None:
                notify(self._on_event, what)

    @staticmethod
    async def _answer(handler: Handler, request: Request, sender: Sender) -> None:
        try:
            await handler(request, sender)
            sender._returned()
        except Exception as failure:
            sender._failed(failure)

    def _detach(self) -> None:
        """Takes the last events, and leaves the loop."""
        while self._drain():
            pass
        if self._queue is not None:
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
            lib.presence_queue_free(self._queue)
            self._queue = None
        for stream in list(self._streams.values()):
            stream._end(error(_ffi.CLOSED, "the connection was closed"))
        for sender in list(self._senders.values()):
            sender._changed.set()
        self._stopped.set()


@asynccontextmanager
async def connect(url: str, *, on_event: OnEvent | None = None, **options: Option) -> AsyncIterator[Connection]:
    """Connects to nats-server: `async with connect(url) as conn`. It is closed, as by close(), when the block is left.

    `url`: one or several with commas between; user and password, or a token, may stand in it.
    `on_event`: called with each ConnectionEvent, in the loop.
    `options`: as presence_config_set in the C header lists them, for example name, token, tls_ca_file,
    connect_timeout_ms, session_grace_ms; None leaves one at its default.
    Raises Invalid (URL, options), Disconnected (cannot be reached, or refuses us), Timeout, Forked.
    """
    conn = await asyncio.to_thread(Connection, url, options)  # Cancelled meanwhile, it is dropped, and so closed.
    try:
        conn._start(on_event)
        yield conn
    except BaseException:
        with suppress(PresenceError):
            await conn.close()
        raise
    await conn.close()
