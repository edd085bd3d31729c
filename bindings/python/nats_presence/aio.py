"""The API for asyncio. Each connection has one queue, whose file descriptor the event loop watches.

An object belongs to the event loop in which it was made, and may be used in that loop only. Only marks, sessions, the
properties of a sender (status, closed, send_count), and what a client does without a connection may be used from other
threads.

No call blocks the loop. These functions of the library wait for nats-server, and run in a thread of their own:
presence_connect, presence_listen_offline, presence_serve, and presence_close with a drain timeout. The others return
after at most the time for which one of the library's threads holds a lock:
- presence_service_stop and presence_service_free wait until the library has handled the message that it is handling.
- presence_queue_free waits for threads that wait on the queue. There are none: the loop only polls it.
- presence_close without a drain timeout, for a connection that was dropped, waits for nothing.
- presence_sender_send never waits. When it returns PRESENCE_FULL, send() waits for the WRITABLE event.
- All others only change memory and queue what is to be sent, among them presence_request and those that end, cancel or
  free a sender, a stream or a session. presence_mark_offline takes time in proportion to the streams of the client.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from ctypes import c_void_p
from functools import partial
from typing import Callable, Union

from . import _ffi, _tracing
from ._arguments import Option, Payload, check_seconds, encode_payload
from ._batches import MessageBatches
from ._events import MEMORY, Event, EventBatch, new_queue, queue_fd
from ._ffi import FAST_MAX_BYTES, SIZE_ARGUMENTS, fast_send, fast_stream_consumed, lib
from ._handlers import check_async_handler, check_handler_result
from ._loop import OwnerLoop, run_in_thread, start_in_thread, wrap_future
from ._shared import (
    BaseConnection,
    BaseSender,
    BaseStream,
    OnEvent,
    PresenceEvent,
    Request,
    call_on_event,
    drain_ms,
    request_options,
    to_connection_event,
    to_presence_events,
)
from .errors import BusyError, PresenceError, PresenceTimeoutError, check, error, status_text

BATCH = 1024
SENDS_PER_YIELD = 256
MAX_WINDOW = 4 << 20
DEFAULT_WINDOW = 256 << 10


class Sender(BaseSender):
    __doc__ = BaseSender.__doc__

    def __init__(self, conn: Connection, handle: int, client_id: str) -> None:
        super().__init__(handle, client_id)
        self._conn = conn
        self._state_changed = asyncio.Event()
        self._sends_since_yield = 0
        self._task: asyncio.Task[None] | None = None

    async def send(self, data: Payload) -> None:
        """Sends one message; a str as UTF-8. Waits while its reader or nats-server is too slow to take more.

        Also yields to the event loop from time to time.
        Raises OfflineError once the client has left; StreamCancelledError (the reader cancelled the stream),
        PeerGoneError, ClosedError or DisconnectedError if the stream has ended otherwise. After TooLargeError,
        ReservedError and InvalidError the stream goes on. If the task is cancelled while it waits here, the message was
        not sent.
        """
        self._sends_since_yield += 1
        if self._sends_since_yield == SENDS_PER_YIELD:
            self._sends_since_yield = 0
            await asyncio.sleep(0)  # Before the send: a task that is cancelled here has not sent.
        if (
            type(data) is not bytes
            or len(data) > FAST_MAX_BYTES
            or fast_send(self._handle_argument, data, SIZE_ARGUMENTS[len(data)]) != _ffi.OK
        ):
            await self._send(encode_payload(data))

    async def send_many(self, messages: Iterable[Payload]) -> None:
        """Sends messages in order, up to the first that fails. `send_count` has the number of those that were sent.

        A list or tuple is checked first (InvalidError), and costs a fraction of the same number of calls of send().
        From any other iterable, each message is sent as soon as the iterable yields it.
        """
        if not isinstance(messages, (list, tuple)):
            for data in messages:
                await self.send(data)
            return
        batches = MessageBatches(messages)
        while batches:
            if not batches.send(self._handle_argument):
                await self._send(batches.pop())  # Waits until it is writable, or raises the reason.
            await asyncio.sleep(0)

    async def _send_each(self, messages: AsyncIterator[Payload]) -> None:
        """Sends what a handler yields. If a message cannot be sent, closes the generator, so that its clean-up runs."""
        try:
            async for data in messages:
                await self.send(data)
        finally:
            if (aclose := getattr(messages, "aclose", None)) is not None:
                await aclose()

    async def _send(self, raw: bytes) -> None:
        while (status := lib.presence_sender_send(self._handle, raw, len(raw))) == _ffi.FULL:
            self._conn._check_loop()
            # This thread also dispatches the events that set it, so none of them is lost between the two lines.
            self._state_changed.clear()
            await self._state_changed.wait()
        self._check_sent(status, len(raw))

    def _check_end(self, status: int, failure: PresenceError | None = None) -> None:
        self._state_changed.set()
        super()._check_end(status, failure)

    def _on_stopped(self, status: int) -> None:
        self._state_changed.set()
        if self._span is not None:
            self._span.on_stopped(status)
        if self._task is not None:
            self._task.cancel(status_text(status))

    def _trace(self, span: _tracing.StreamSpan) -> None:
        super()._trace(span)
        self.__class__ = _TracedSender

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._span is not None and not self._detached:  # The task was cancelled, or the span has ended.
            self._span.end(error(self.status or _ffi.CLOSED, ""))


class _TracedSender(Sender):
    """A sender whose span waits for the first message. After that it is a Sender, whose sends cost nothing more.

    Another task may change the class during a call: so no call depends on it.
    """

    async def send(self, data: Payload) -> None:
        await Sender.send(self, data)
        self._on_first_message(Sender)

    async def send_many(self, messages: Iterable[Payload]) -> None:
        try:
            await Sender.send_many(self, messages)
        finally:
            if self.send_count:
                self._on_first_message(Sender)


Handler = Callable[[Request, Sender], Union[Awaitable[object], AsyncIterator[Payload]]]
Sink = Callable[[bytes], None]


class Stream(BaseStream):
    """The messages of one stream, as an asynchronous iterator of bytes.

    The iterator ends when the worker ends the stream. Otherwise it raises RemoteError (the worker sent an error),
    NoRespondersError, BusyError (the worker takes no more streams), PresenceTimeoutError, OfflineError, PeerGoneError,
    FullError (the reader was too slow), DisconnectedError, ClosedError or StreamCancelledError.
    A slow reader slows its worker down. On level 0, where that is not possible, its stream ends with FullError.
    Leaving the `async with` block, aclose(), and dropping the last reference cancel the stream. So does cancelling the
    task that waits for a message: to go on after a timeout use next(), not asyncio.wait_for(). One task at a time may
    wait for a message; another one gets BusyError.
    """

    def __init__(self, conn: Connection, tag: int) -> None:
        self._conn = conn
        self._tag = tag
        self._messages: deque[bytes] = deque()
        self._consumed = 0
        """Bytes that were read since credit was last returned."""
        self._credit_threshold = 0
        """How many such bytes are returned at once."""
        self._returns_credit_on_wait = False
        self._arrived = asyncio.Event()
        self._is_waiting = False
        self._reader_tags: set[int] | None = None
        """The tags of all streams of the task that reads this one: that read its first message, or last waited."""

    def __del__(self) -> None:
        self._conn._streams.pop(self._tag, None)
        if self._reader_tags is not None:
            self._reader_tags.discard(self._tag)
        self._cancel_span()
        lib.presence_stream_free(self._handle)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        if self._reader_tags is None:
            self._set_reader()
        while not self._messages:
            if self._is_waiting:
                raise BusyError("another task is waiting for the next message of this stream")
            if self._ended:
                self._raise_end(StopAsyncIteration)
            await self._wait()
        data = self._messages.popleft()
        self._consumed += len(data)
        if self._consumed > self._credit_threshold:
            self._return_credit()
        return data

    async def next(self, timeout: float | None = None) -> bytes | None:
        """Returns the next message, or None if the stream has ended.

        Raises PresenceTimeoutError if no message arrives within `timeout` seconds; the stream goes on. If the stream
        has ended with an error, raises that error, and ClosedError if it was raised before.
        """
        if timeout is not None and not self._messages:
            await self._wait_for(check_seconds("timeout", timeout))
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            pass
        self._check_not_failed()
        return None

    async def _wait_for(self, timeout: float) -> None:
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            self._arrived.set()

        timer = self._conn._owner.loop.call_later(timeout, expire)
        try:
            while not (self._messages or self._ended or self._is_waiting):
                if expired:
                    raise PresenceTimeoutError(f"no message arrived within {timeout} s; the stream goes on")
                await self._wait()
        finally:
            timer.cancel()

    async def _wait(self) -> None:
        """Waits until a message or the end of the stream arrives."""
        self._conn._check_loop()
        self._set_reader()
        if self._returns_credit_on_wait:
            self._returns_credit_on_wait = False
            self._return_credit()
        self._arrived.clear()
        self._is_waiting = True
        try:
            await self._arrived.wait()
        except BaseException:  # CancelledError, GeneratorExit
            # Dropping the last reference is not enough: the traceback of an exception that a framework keeps has one.
            self._abandon()
            raise
        finally:
            self._is_waiting = False

    async def aclose(self) -> None:
        """Cancels the stream and drops its unread messages, without waiting. `contextlib.aclosing` calls it."""
        self._abandon()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._abandon()

    def _set_reader(self) -> None:
        tags = self._conn._tags_read_by(asyncio.current_task())
        if tags is not self._reader_tags:
            if self._reader_tags is not None:
                self._reader_tags.discard(self._tag)
            self._reader_tags = tags
        tags.add(self._tag)

    def _abandon(self) -> None:
        self.cancel()
        self._messages.clear()

    def _return_credit(self) -> None:
        """Returns credit to the worker for the messages that were read."""
        fast_stream_consumed(self._handle, self._consumed)
        self._consumed = 0

    def _message_sink(self) -> Sink:
        """Wakes the reader, and returns where to put the messages that have arrived."""
        self._returns_credit_on_wait = True
        self._arrived.set()
        if self._span is not None:
            self._span.on_first_message()
        return self._messages.append

    def _end(self, failure: PresenceError | None) -> None:
        if not self._ended:
            self._ended, self._failure = True, failure
            self._arrived.set()
            if self._span is not None:
                self._span.end(failure)


def _on_reader_done(weak: weakref.ref[Connection], tags: set[int], task: asyncio.Task[object]) -> None:
    # A task that is cancelled while it does not wait for its stream leaves that too. A suspended generator or a
    # traceback may still hold the stream.
    if (conn := weak()) is not None and task.cancelled():
        for tag in list(tags):
            if (stream := conn._stream(tag)) is not None:
                stream._abandon()


def _discard(message: bytes) -> None:
    """The sink for messages of a stream that was dropped."""


class Connection(BaseConnection):
    """A connection to nats-server, made by connect(). It belongs to one event loop."""

    _queue: int | None = None
    _close_future: asyncio.Future[int] | None = None
    """The status of presence_close, once it was called."""

    def __del__(self) -> None:
        super().__del__()
        lib.presence_queue_free(self._queue)  # Only if the loop ended before the connection was closed.

    def _start(self, on_event: OnEvent | None) -> None:
        self._owner = OwnerLoop()
        self._on_event = on_event
        self._tags = itertools.count(1)
        self._handlers: dict[int, tuple[str, Handler, bool]] = {}
        """By the tags of services: the subject, the handler, and `send_errors`."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._senders: weakref.WeakValueDictionary[int, Sender] = weakref.WeakValueDictionary()
        self._streams: dict[int, weakref.ref[Stream]] = {}
        self._readers: weakref.WeakKeyDictionary[asyncio.Task[object], set[int]] = weakref.WeakKeyDictionary()
        self._stopped = asyncio.Event()
        self._events = EventBatch(BATCH)
        self._queue, self._fd = new_queue(), -1
        self._fd = queue_fd(self._queue)
        if on_event is not None:
            self._watch(self._queue)
        self._owner.loop.add_reader(self._fd, self._dispatch_events)

    async def listen_offline(self) -> None:
        """Applies offline announcements of other processes in this process, as serving also does.

        Raises ClosedError.
        """
        self.stats()
        self._check_loop()
        await run_in_thread(self._listen_offline)

    async def serve(
        self, subject: str, handler: Handler, *, queue: str = "", max_streams: int = 0, send_errors: bool = False
    ) -> None:
        """Serves a subject with `async def handler(request, sender)`, one task per request.

        When it returns, nats-server has the subscription. run() then waits while handlers run.
        NATS distributes the requests among all processes that serve the subject in the same `queue` group; "" is no
        group. The service takes up to `max_streams` streams at a time (0: 10,000), and answers further requests with
        "server busy".
        A handler is a function, or an async generator that yields the messages to send. If one of them cannot be sent,
        the generator is closed. When the handler returns, the stream ends, unless the handler called Sender.detach().
        When it raises, the stream ends with an error: the reader gets "the handler failed" or, with `send_errors`, the
        exception's text, which may contain secrets. The logger `nats_presence` logs the exception. To send a text of
        your own and a code, raise HandlerError, or use sender.error().
        When the client leaves, or the stream ends otherwise, the handler's task is cancelled. The message of the
        CancelledError is the reason. Further sends raise StreamStoppedError.
        Raises InvalidError (also a TypeError, if the handler is a generator without async), ClosedError and
        PresenceTimeoutError; DisconnectedError or FullError if nats-server refuses the subscription. If nats-server
        refuses it later, on_event gets an event with the subject, and the connection tries to subscribe again.
        """
        check_async_handler(subject, handler)
        event_queue, tag = self._open_queue(), next(self._tags)
        self._handlers[tag] = subject, handler, send_errors
        try:
            serving = start_in_thread(self._serve, event_queue, subject, queue, max_streams, tag)
            try:
                await wrap_future(serving)
            except asyncio.CancelledError:
                serving.add_done_callback(self._end_abandoned_service)
                raise
        except BaseException:
            del self._handlers[tag]
            raise
        if self._stopped.is_set():
            self.stop()

    def _end_abandoned_service(self, serving: Future[c_void_p]) -> None:
        if serving.exception() is None:
            self._end_service(serving.result())

    def stream(
        self,
        subject: str,
        data: Payload = b"",
        *,
        client_id: str = "",
        timeout: float | None = None,
        headers: Mapping[str, Option] | None = None,
        **options: Option,
    ) -> Stream:
        """Requests a stream for a client. The client is online while the stream runs. Does not wait for the worker.

        `timeout`: seconds within which the stream has to end; otherwise its reader gets PresenceTimeoutError.
        `options`: retries, retry_delay_ms, stream_buffer_bytes (the amount of unread data that is buffered),
        only_online (raise OfflineError if the client is not online here already); see presence_config_set in the C
        header.
        Raises InvalidError, TooLargeError, FullError, DisconnectedError, ClosedError.
        """
        queue, settings = self._open_queue(), request_options(timeout, headers, options)
        tag = next(self._tags)
        stream = Stream(self, tag)
        self._streams[tag] = weakref.ref(stream)
        stream._handle = c_void_p()
        stream._span = self._request(stream._handle, queue, subject, data, client_id, settings, tag)
        # Return credit long before the worker runs out of it, but not for every message.
        window = min(int(str(options.get("stream_buffer_bytes") or DEFAULT_WINDOW)), MAX_WINDOW)
        stream._credit_threshold = window // 16
        return stream

    def stop(self) -> None:
        """Stops taking requests. Running streams go on, and run() returns when their handlers have returned."""
        self._stop_services()
        self._check_loop()
        self._stopped.set()

    async def run(self) -> None:
        """Waits until close() is called, or until stop() was called and all handlers have returned."""
        self._is_closed()  # Raises ForkedError.
        self._check_loop()
        await self._stopped.wait()
        while self._dispatch_events():
            pass
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, drain: float | None = 5.0) -> None:
        """Closes the connection. Its senders and streams end with ClosedError, and the peers are notified.

        Then waits up to `drain` seconds (None: no limit) until nats-server has everything that was sent and the
        handlers, whose tasks are cancelled, have returned. Raises PresenceTimeoutError, or DisconnectedError at once if
        there is no connection, when nats-server may not have everything; the connection is closed all the same. At the
        end of connect()'s `async with` block this is logged instead. Closing goes on if the task is cancelled
        meanwhile. A second call waits for the first, and has no other effect. A call in a forked child process has no
        effect.
        """
        limit = drain_ms(drain)
        if self._is_forked():
            return
        self._check_loop()
        deadline = time.monotonic() + limit / 1000
        if self._close_future is None:
            self._close_future = run_in_thread(self._close_now, limit)
            self._close_future.add_done_callback(lambda _: self._finish_close())
        ended_before = self._close_future.done()
        status = await asyncio.shield(self._close_future)
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=None if limit < 0 else max(0.0, deadline - time.monotonic()))
        if status != _ffi.CLOSED and not ended_before:
            check(status, "closing the connection")

    def _tags_read_by(self, task: asyncio.Task[object] | None) -> set[int]:
        """Returns the tags of the streams that a task reads. If the task is cancelled, these streams are cancelled."""
        if task is None:
            return set()
        tags = self._readers.get(task)
        if tags is None:
            tags = self._readers[task] = set()
            task.add_done_callback(partial(_on_reader_done, weakref.ref(self), tags))
        return tags

    def _check_loop(self) -> None:
        try:
            self._owner.check("connection")
        except RuntimeError:
            self.stats()  # Raises ForkedError, ClosedError.
            raise

    def _open_queue(self) -> int:
        self._check_loop()
        if self._queue is None:
            raise error(_ffi.CLOSED, "the connection is closed")
        return self._queue

    def _dispatch_events(self) -> bool:
        """Dispatches up to a batch of events of the queue. Returns False if there was none."""
        if self._queue is None:
            return False
        count = self._events.poll(self._queue)
        last: int = 0
        sink: Sink = _discard
        for index, (kind, tag, data, size) in enumerate(self._events.message_fields()):
            if kind != _ffi.EVENT_DATA:
                self._dispatch_event(self._events[index])
                continue
            if tag != last:
                last = tag
                stream = self._stream(tag)
                sink = _discard if stream is None else stream._message_sink()
            sink(MEMORY[data : data + size])
        return count > 0

    def _stream(self, tag: int) -> Stream | None:
        found = self._streams.get(tag)
        return None if found is None else found()

    def _dispatch_event(self, event: Event) -> None:
        kind = event.kind
        if kind == _ffi.EVENT_END:
            if (stream := self._stream(event.tag)) is not None:
                stream._end(None)
        elif kind == _ffi.EVENT_ERROR:
            if (stream := self._stream(event.tag)) is not None:
                stream._end(stream._to_failure(event))
        elif kind == _ffi.EVENT_REQUEST:
            sender = Sender(self, event.sender, event.client)
            handler = self._handlers.get(event.tag)
            if handler is None:
                return  # The service is gone. Dropping the sender ends the stream.
            self._senders[event.sender] = sender
            task = self._owner.loop.create_task(self._run_handler(*handler, Request(sender, event), sender))
            sender._task = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(sender._on_task_done)
        elif kind in (_ffi.EVENT_STOPPED, _ffi.EVENT_WRITABLE):
            stopped_or_writable = self._senders.get(event.sender)
            if stopped_or_writable is not None and kind == _ffi.EVENT_STOPPED:
                stopped_or_writable._on_stopped(event.status)
            elif stopped_or_writable is not None:
                stopped_or_writable._state_changed.set()
        elif self._on_event is not None:
            connection_event = to_connection_event(event)
            if connection_event is not None:
                call_on_event(self._on_event, connection_event)

    @staticmethod
    async def _run_handler(subject: str, handler: Handler, send_errors: bool, request: Request, sender: Sender) -> None:
        with _tracing.serving(subject, request, sender):
            try:
                result = handler(request, sender)
                if isinstance(result, AsyncIterator):
                    await sender._send_each(result)
                elif isinstance(result, Awaitable):
                    check_handler_result(await result)
                else:
                    raise TypeError(f"the handler returned a {type(result).__name__}: define it with async def")
                sender._on_handler_returned()
            except Exception as failure:
                sender._on_handler_failed(failure, send_errors)

    def _finish_close(self) -> None:
        """Dispatches the last events, and removes the queue from the loop."""
        while self._dispatch_events():
            pass
        if self._queue is not None:
            if self._fd >= 0:
                self._owner.loop.remove_reader(self._fd)
            lib.presence_queue_free(self._queue)
            self._queue = None
        for tag in list(self._streams):
            if (stream := self._stream(tag)) is not None:
                stream._end(error(_ffi.CLOSED, "the connection was closed"))
        for sender in list(self._senders.values()):
            sender._state_changed.set()
        self._stopped.set()


@asynccontextmanager
async def connect(url: str, *, on_event: OnEvent | None = None, **options: Option) -> AsyncIterator[Connection]:
    """Connects to nats-server: `async with connect(url) as conn`. The end of the block closes the connection.

    `url`: one or more URLs, separated by commas. It may contain a user and password, or a token.
    `on_event`: called with each ConnectionEvent, in the event loop.
    `options`: those of presence_config_set in the C header, for example name, token, tls_ca_file, connect_timeout_ms,
    session_grace_ms. None leaves an option at its default.
    Raises InvalidError (URL, options), DisconnectedError (nats-server cannot be reached or refuses the connection),
    PresenceTimeoutError, ForkedError.
    """
    # If the task is cancelled meanwhile, the connection is dropped, which closes it.
    conn = await run_in_thread(Connection, url, options)
    try:
        conn._start(on_event)
        yield conn
    finally:
        try:
            await conn.close()
        except PresenceError as failure:
            conn._log_failed_close(failure)


class Watch:
    """An asynchronous iterator of PresenceEvent: the clients that come online and go offline in this process.

    It ends with its `async with` block. Up to 65,536 unread events are kept and further ones are dropped: the iterator
    raises FullError once, after the kept events, and then goes on.
    """

    _queue: int | None = None

    def __init__(self) -> None:
        self._owner = OwnerLoop()
        self._queue = new_queue()
        self._fd = queue_fd(self._queue)
        self._events = EventBatch(BATCH)
        self._ready: deque[PresenceEvent] = deque()
        self._arrived = asyncio.Event()
        self._failure: PresenceError | None = None
        check(lib.presence_watch(self._queue, 0), "watching presence")

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> PresenceEvent:
        while not self._ready and self._queue is not None:
            self._owner.check("watch")
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            # Not before they are needed: the library limits the number of unread events.
            check(min(self._events.poll(self._queue), 0), "watch")
            self._ready, self._failure = to_presence_events(self._events)
            if not self._ready and self._failure is None:
                self._arrived.clear()
                self._owner.loop.add_reader(self._fd, self._on_arrival)
                await self._arrived.wait()
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    def _on_arrival(self) -> None:
        self._owner.loop.remove_reader(self._fd)
        self._arrived.set()

    def __del__(self) -> None:
        lib.presence_queue_free(self._queue)  # Only if the loop ended before the Watch was closed.

    def _close(self) -> None:
        self._owner.loop.remove_reader(self._fd)
        queue, self._queue = self._queue, None
        lib.presence_queue_free(queue)
        self._arrived.set()


@asynccontextmanager
async def watch() -> AsyncIterator[Watch]:
    """Watches presence in this process: `async with watch() as events`, and then `async for event in events`."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch._close()
