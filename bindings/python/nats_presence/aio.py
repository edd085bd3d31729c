"""The asyncio side: one queue for each connection, whose file descriptor the event loop watches.

Everything here belongs to the thread of the loop in which connect() was entered. Only marks, sessions and what only
reads a sender (status, closed, send_count) may be used from other threads.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from ctypes import c_void_p
from functools import partial
from typing import Callable, TypeVar, Union

from . import _ffi
from ._arguments import Option, Payload, check_seconds, encode_payload
from ._batches import MessageBatches
from ._events import MEMORY, Event, EventBatch, new_queue
from ._ffi import FAST_MAX_BYTES, SIZE_ARGUMENTS, fast_send, fast_stream_consumed, lib
from ._handlers import check_async_handler, check_handler_result, check_subject
from ._shared import (
    BaseConnection,
    BaseSender,
    OnEvent,
    PresenceEvent,
    Request,
    call_on_event,
    drain_ms,
    log,
    request_options,
    to_connection_event,
    to_presence_event,
)
from .errors import Busy, PresenceError, Timeout, check, error, status_text

T = TypeVar("T")

BATCH = 1024
SENDS_PER_YIELD = 256
MAX_WINDOW = 4 << 20
DEFAULT_WINDOW = 256 << 10
DECORATOR_WAIT = 0.1
"""Seconds that a decorator may stop the loop for; an answer of the server takes a few milliseconds, as a rule."""


class Sender(BaseSender):
    __doc__ = BaseSender.__doc__

    def __init__(self, conn: Connection, handle: int, client_id: str) -> None:
        super().__init__(handle, client_id)
        self._conn = conn
        self._state_changed = asyncio.Event()
        self._sends_since_yield = 0
        self._task: asyncio.Task[None] | None = None

    async def send(self, data: Payload) -> None:
        """Sends one message; text as UTF-8. Waits while there is no room: the reader, or nats-server, is behind.

        Yields to the loop now and then.
        Raises Offline as soon as the client has left, and Cancelled (the reader left the stream), PeerGone, Closed or
        Disconnected when the stream is over otherwise. After TooLarge, Reserved and Invalid the stream goes on.
        Cancelled while it waits, it has not sent.
        """
        self._sends_since_yield += 1
        if self._sends_since_yield == SENDS_PER_YIELD:
            self._sends_since_yield = 0
            await asyncio.sleep(0)  # Before it has sent, which a cancelled one has not.
        if (
            type(data) is not bytes
            or len(data) > FAST_MAX_BYTES
            or fast_send(self._handle_argument, data, SIZE_ARGUMENTS[len(data)]) != _ffi.OK
        ):
            await self._send(encode_payload(data))

    async def send_many(self, messages: Iterable[Payload]) -> None:
        """Sends one message after the other, up to the first that fails; `send_count` tells how far it came.

        A list or tuple is looked through before (Invalid), and costs a fraction of as many calls of send; of what else
        can be iterated over each message is sent as it comes.
        """
        if not isinstance(messages, (list, tuple)):
            for data in messages:
                await self.send(data)
            return
        batches = MessageBatches(messages)
        while batches:
            if not batches.send(self._handle_argument):
                await self._send(batches.pop())  # Waits, or raises what is wrong.
            await asyncio.sleep(0)

    async def _send_each(self, messages: AsyncIterator[Payload]) -> None:
        """What a handler yields. Its clean-up runs when no more can be sent."""
        try:
            async for data in messages:
                await self.send(data)
        finally:
            if (aclose := getattr(messages, "aclose", None)) is not None:
                await aclose()

    async def _send(self, raw: bytes) -> None:
        while (status := lib.presence_sender_send(self._handle, raw, len(raw))) == _ffi.FULL:
            self._conn._check_loop()
            # What changes is told by events, which this thread takes from the queue: none is missed in between.
            self._state_changed.clear()
            await self._state_changed.wait()
        self._check_sent(status, len(raw))

    def _check_end(self, status: int) -> None:
        self._state_changed.set()
        super()._check_end(status)

    def _on_stopped(self, status: int) -> None:
        self._state_changed.set()
        if self._task is not None:
            self._task.cancel(status_text(status))

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._task = None


Handler = Callable[[Request, Sender], Union[Awaitable[object], AsyncIterator[Payload]]]
Sink = Callable[[bytes], None]


class Stream:
    """The messages of one stream, as an asynchronous iterator of bytes.

    It ends when the worker ends it; otherwise by an exception: Remote (the worker's error), NoResponders, Busy (the
    worker takes no more streams), Timeout, Offline, PeerGone, Full (the reader was too slow), Disconnected, Closed,
    Cancelled.
    A reader that does not read holds its worker back, or, if that cannot be, loses its stream with Full.
    Leaving the `async with`, aclose(), or dropping it, cancels it. So does cancelling the task that waits for a
    message: to go on after a timeout use next(), not asyncio.wait_for(). One task at a time may wait: Busy.
    """

    _handle: c_void_p | None = None

    def __init__(self, conn: Connection, tag: int) -> None:
        self._conn = conn
        self._tag = tag
        self._messages: deque[bytes] = deque()
        self._consumed = 0
        self._credit_threshold = 0
        self._returns_credit_on_wait = False
        self._arrived = asyncio.Event()
        self._is_waiting = False
        self._reader_tags: set[int] | None = None
        """The tags of the streams that are read by the task that read the first message, or waited for one later."""
        self._ended = self._has_failed = False
        self._failure: PresenceError | None = None

    def __del__(self) -> None:
        self._conn._streams.pop(self._tag, None)
        if self._reader_tags is not None:
            self._reader_tags.discard(self._tag)
        lib.presence_stream_free(self._handle)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        if self._reader_tags is None:
            self._set_reader()
        while not self._messages:
            if self._is_waiting:
                raise Busy("another task waits for the next message of this stream")
            if self._ended:
                failure, self._failure = self._failure, None
                self._has_failed |= failure is not None
                raise failure or StopAsyncIteration
            await self._wait()
        data = self._messages.popleft()
        self._consumed += len(data)
        if self._consumed > self._credit_threshold:
            self._return_credit()
        return data

    async def next(self, timeout: float | None = None) -> bytes | None:
        """The next message; None at the stream's end.

        Raises Timeout when none came for `timeout` seconds (the stream goes on), else what the stream ends with,
        and Closed if that was raised before.
        """
        if timeout is not None and not self._messages:
            await self._wait_for(check_seconds("timeout", timeout))
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            if self._has_failed:
                raise error(_ffi.CLOSED, "the stream has failed before") from None
            return None

    async def _wait_for(self, timeout: float) -> None:
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            self._arrived.set()

        timer = self._conn._loop.call_later(timeout, expire)
        try:
            while not (self._messages or self._ended or self._is_waiting):
                if expired:
                    raise Timeout(f"no message came for {timeout} s; the stream goes on")
                await self._wait()
        finally:
            timer.cancel()

    async def _wait(self) -> None:
        """Waits until something arrives."""
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
            # The exception's traceback may keep this stream alive for as long as the caller's framework likes.
            self._abandon()
            raise
        finally:
            self._is_waiting = False

    def cancel(self) -> None:
        """Ends the stream, for its reader with Cancelled, and for its worker: see the README on leaving a stream.

        Once the stream has ended this has no effect.
        """
        lib.presence_stream_cancel(self._handle)

    async def aclose(self) -> None:
        """As cancel(), for `contextlib.aclosing`; messages that were not read are dropped. It does not wait."""
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
        """Gives the worker room for what was read."""
        fast_stream_consumed(self._handle, self._consumed)
        self._consumed = 0

    def _message_sink(self) -> Sink:
        """Messages arrive: where to put them."""
        self._returns_credit_on_wait = True
        self._arrived.set()
        return self._messages.append

    def _end(self, failure: PresenceError | None) -> None:
        if not self._ended:
            self._ended, self._failure = True, failure
            self._arrived.set()


def _start_thread(function: Callable[..., T], *arguments: object) -> Future[T]:
    """Calls what waits in a thread of its own: the loop's executor may be full of others that wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as raised:
            future.set_exception(raised)

    threading.Thread(target=run, name="nats_presence wait").start()
    return future


def _outcome(future: Future[T]) -> asyncio.Future[T]:
    """As asyncio.wrap_future(), which would cancel the thread's future, and fail if the loop was closed meanwhile."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(done: Future[T]) -> None:
        if outcome.done():
            return  # Cancelled.
        if (failure := done.exception()) is not None:
            outcome.set_exception(failure)
        else:
            outcome.set_result(done.result())

    def tell_loop(done: Future[T]) -> None:
        with suppress(RuntimeError):  # The loop is closed: nobody waits any longer.
            loop.call_soon_threadsafe(tell, done)

    future.add_done_callback(tell_loop)
    return outcome


def _in_thread(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    return _outcome(_start_thread(function, *arguments))


def _on_reader_done(weak: weakref.ref[Connection], tags: set[int], task: asyncio.Task[object]) -> None:
    # It may have been cancelled while it handed a message on, its stream held by a suspended generator or a traceback.
    if (conn := weak()) is not None and task.cancelled():
        for tag in list(tags):
            if (stream := conn._stream(tag)) is not None:
                stream._abandon()


def _check_loop(what: str, loop: asyncio.AbstractEventLoop, thread: int) -> None:
    """Raises RuntimeError in another loop than the object's: what is waited for there would never come."""
    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop or (running is None and threading.get_ident() == thread):
        return
    where = "a thread without a loop" if running is None else repr(running)
    raise RuntimeError(f"the {what} belongs to the loop in which it was made, {loop!r}; it is used from {where}")


def _discard(message: bytes) -> None:
    """For messages of a stream that nobody has any longer."""


class Connection(BaseConnection):
    """A connection to nats-server, made by connect(), for one event loop."""

    _queue: int | None = None
    _close_future: asyncio.Future[int] | None = None
    """The status of the library's close, once it was begun."""

    def __del__(self) -> None:
        super().__del__()
        lib.presence_queue_free(self._queue)  # Its loop ended before it was closed.

    def _start(self, on_event: OnEvent | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._on_event = on_event
        self._tags = itertools.count(1)
        self._handlers: dict[int, tuple[Handler, bool]] = {}
        """By their tags, each with whether its errors are sent."""
        self._pending_services: set[asyncio.Task[None]] = set()
        """For services that were not served yet when their decorator returned."""
        self._failure: PresenceError | None = None
        """Why one of them is not."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._senders: weakref.WeakValueDictionary[int, Sender] = weakref.WeakValueDictionary()
        self._streams: dict[int, weakref.ref[Stream]] = {}
        self._readers: weakref.WeakKeyDictionary[asyncio.Task[object], set[int]] = weakref.WeakKeyDictionary()
        self._stopped = asyncio.Event()
        self._events = EventBatch(BATCH)
        self._queue = new_queue()
        self._fd: int = lib.presence_queue_fd(self._queue)
        check(min(self._fd, 0), "the queue's file descriptor")
        if on_event is not None:
            self._watch(self._queue)
        self._loop.add_reader(self._fd, self._dispatch_events)

    async def listen_offline(self) -> None:
        """Applies the offline announcements of other processes in this one. Serving does it too. Raises Closed."""
        self.stats()
        self._check_loop()
        await _in_thread(self._listen_offline)

    def service(
        self, subject: str, *, queue: str = "", max_streams: int = 0, send_errors: bool = False
    ) -> Callable[[Handler], Handler]:
        """Decorates `async def handler(request, sender)`, which serves the subject from now on, in a task per request.

        Requests are spread over all processes that serve the subject in the same `queue` group; "" is no group. At most
        `max_streams` streams (0: 10,000) run at once: a request beyond is answered with "server busy".
        A handler is a function, or an async generator, whose messages are sent as it yields them; it is closed when one
        cannot be. The stream ends when the handler returns (see Sender.detach), with an error when it raises: the
        reader is sent "the handler failed", or with `send_errors` the exception's text, which may have secrets in it.
        To send a text of your own use sender.error(). The log `nats_presence` has it all.
        When the client leaves, or the stream is over otherwise, the handler's task is cancelled; the message of the
        CancelledError says why. What it still sends raises StreamStopped.
        Decorating waits for the server's answer, but at most 0.1 s, for the loop stands still meanwhile. If it does not
        serve after all, run() raises why. serve() waits without stopping the loop.
        Raises Invalid (and TypeError, for a generator without async), Closed, Timeout; Disconnected or Full where
        nats-server refuses the subscription. A refusal that comes later is an event with the subject, and the
        subscription is tried again.
        """
        check_subject(subject)

        def decorate(handler: Handler) -> Handler:
            tag, serving = self._start_serving(subject, handler, queue, max_streams, send_errors)
            wait([serving], DECORATOR_WAIT)
            if serving.done():
                try:
                    serving.result()
                except BaseException:
                    del self._handlers[tag]
                    raise
                self._stop_if_requested()
            else:
                task = self._loop.create_task(self._finish_serving(subject, tag, serving))
                self._pending_services.add(task)
                task.add_done_callback(self._pending_services.discard)
            return handler

        return decorate

    async def serve(
        self, subject: str, handler: Handler, *, queue: str = "", max_streams: int = 0, send_errors: bool = False
    ) -> None:
        """As service(), in one call: when it returns the handler serves, and the loop has gone on meanwhile."""
        check_subject(subject)
        tag, serving = self._start_serving(subject, handler, queue, max_streams, send_errors)
        try:
            await _outcome(serving)
        except asyncio.CancelledError:
            serving.add_done_callback(self._end_abandoned_service)
            del self._handlers[tag]
            raise
        except BaseException:
            del self._handlers[tag]
            raise
        self._stop_if_requested()

    def _start_serving(
        self, subject: str, handler: Handler, queue: str, max_streams: int, send_errors: bool
    ) -> tuple[int, Future[c_void_p]]:
        check_async_handler(subject, handler)
        event_queue, tag = self._open_queue(), next(self._tags)
        self._handlers[tag] = handler, send_errors
        try:
            return tag, _start_thread(self._serve, event_queue, subject, queue, max_streams, tag)
        except BaseException:  # Where no thread can be started.
            del self._handlers[tag]
            raise

    async def _finish_serving(self, subject: str, tag: int, serving: Future[c_void_p]) -> None:
        try:
            await _outcome(serving)
        except PresenceError as failure:
            del self._handlers[tag]
            if not self._closing:
                log.error("subject %r is not served: %s", subject, failure)
                self._failure = failure
                self._stopped.set()
        else:
            self._stop_if_requested()

    def _end_abandoned_service(self, serving: Future[c_void_p]) -> None:
        if serving.exception() is None:
            self._end_service(serving.result())

    def _stop_if_requested(self) -> None:
        if self._stopped.is_set():
            self.stop()

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
        """Requests a stream for a client, who is online here as long as it runs. Does not wait for the worker.

        `timeout`: seconds from request to end, else Timeout. `options`: retries, retry_delay_ms, stream_buffer_bytes
        (how far the reader may be behind), only_online (Offline where the client is not online here already); see
        presence_config_set in the C header.
        Raises Invalid, TooLarge, Full, Disconnected, Closed.
        """
        queue, settings = self._open_queue(), request_options(timeout, headers, options)
        tag = next(self._tags)
        stream = Stream(self, tag)
        self._streams[tag] = weakref.ref(stream)
        stream._handle = c_void_p()
        self._request(stream._handle, queue, subject, data, client_id, settings, tag)
        # Well before the worker has no room left, and not for each message.
        stream._credit_threshold = min(int(str(options.get("stream_buffer_bytes") or DEFAULT_WINDOW)), MAX_WINDOW) // 16
        return stream

    def stop(self) -> None:
        """Takes no more requests. Streams that run go on; run() returns when their handlers have."""
        self._stop_services()
        self._check_loop()
        self._stopped.set()

    async def run(self) -> None:
        """Waits until close(), or until stop() and the return of all handlers.

        Raises why what a decorator was to serve is not served.
        """
        self._is_closed()  # Raises Forked.
        self._check_loop()
        await self._stopped.wait()
        if self._failure is not None:
            raise self._failure
        while self._dispatch_events():
            pass
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, drain: float | None = 5.0) -> None:
        """Closes it: senders and streams that still run end with Closed, and the other ends are told.

        Then it waits, at most `drain` seconds (None: without limit), until the server has all that was sent before and
        the handlers, whose tasks are cancelled, have returned. Raises Timeout or Disconnected (at once, where
        there is no connection) when the server may not have it all; the connection is closed all the same. Cancelled
        meanwhile, it goes on; once more waits for it, and has no other effect. The end of connect()'s `async with` logs
        what this raises. In a child after fork() it does nothing.
        """
        limit = drain_ms(drain)
        if self._is_forked():
            return
        self._check_loop()
        deadline = time.monotonic() + limit / 1000
        if self._close_future is None:
            self._close_future = _in_thread(self._close_now, limit)
            self._close_future.add_done_callback(lambda _: self._finish_close())
        ended_before = self._close_future.done()
        status = await asyncio.shield(self._close_future)
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=None if limit < 0 else max(0.0, deadline - time.monotonic()))
        if status != _ffi.CLOSED and not ended_before:
            check(status, "closing the connection")

    def _tags_read_by(self, task: asyncio.Task[object] | None) -> set[int]:
        """The tags of the streams that a task reads. Should it be cancelled, whatever it then waited for, they end."""
        if task is None:
            return set()
        tags = self._readers.get(task)
        if tags is None:
            tags = self._readers[task] = set()
            task.add_done_callback(partial(_on_reader_done, weakref.ref(self), tags))
        return tags

    def _check_loop(self) -> None:
        try:
            _check_loop("connection", self._loop, self._thread)
        except RuntimeError:
            self.stats()  # Raises Forked, Closed.
            raise

    def _open_queue(self) -> int:
        self._check_loop()
        if self._queue is None:
            raise error(_ffi.CLOSED, "connection: already ended")
        return self._queue

    def _dispatch_events(self) -> bool:
        """Dispatches what waits in the queue, up to a batch; whether there was any."""
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
                stream._end(error(event.status, event.text))
        elif kind == _ffi.EVENT_REQUEST:
            sender = Sender(self, event.sender, event.client)
            handler = self._handlers.get(event.tag)
            if handler is None:
                return  # Serving failed after all: the sender, dropped, ends its stream.
            self._senders[event.sender] = sender
            task = self._loop.create_task(self._run_handler(*handler, Request(sender, event), sender))
            sender._task = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(sender._on_task_done)
        elif kind in (_ffi.EVENT_STOPPED, _ffi.EVENT_WRITABLE):
            known = self._senders.get(event.sender)
            if known is not None and kind == _ffi.EVENT_STOPPED:
                known._on_stopped(event.status)
            elif known is not None:
                known._state_changed.set()
        elif self._on_event is not None:
            what = to_connection_event(event)
            if what is not None:
                call_on_event(self._on_event, what)

    @staticmethod
    async def _run_handler(handler: Handler, send_errors: bool, request: Request, sender: Sender) -> None:
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
        """Takes the last events, and leaves the loop."""
        while self._dispatch_events():
            pass
        if self._queue is not None:
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
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
    """Connects to nats-server: `async with connect(url) as conn`. It is closed, as by close(), when the block is left.

    `url`: one or several with commas between; user and password, or a token, may stand in it.
    `on_event`: called with each ConnectionEvent, in the loop.
    `options`: as presence_config_set in the C header lists them, for example name, token, tls_ca_file,
    connect_timeout_ms, session_grace_ms; None leaves one at its default.
    Raises Invalid (URL, options), Disconnected (cannot be reached, or refuses us), Timeout, Forked.
    """
    conn = await _in_thread(Connection, url, options)  # Cancelled meanwhile, it is dropped, and so closed.
    try:
        conn._start(on_event)
        yield conn
    finally:
        try:
            await conn.close()
        except PresenceError as failure:
            conn._log_failed_close(failure)


class Watch:
    """Clients that come online and go offline in this process, as an asynchronous iterator of PresenceEvent.

    It ends when its `async with` is left. When 65,536 events wait for it further ones are dropped: it raises Full once,
    behind those that waited, and goes on.
    """

    _queue: int | None = None

    def __init__(self) -> None:
        self._queue = new_queue()
        self._events = EventBatch(BATCH)
        self._ready: deque[PresenceEvent] = deque()
        self._arrived = asyncio.Event()
        self._failure: PresenceError | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._fd: int = lib.presence_queue_fd(self._queue)
        check(min(self._fd, 0), "the queue's file descriptor")
        check(lib.presence_watch(self._queue, 0), "watching presence")

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> PresenceEvent:
        while not self._ready and self._queue is not None:
            _check_loop("watch", self._loop, self._thread)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            # Taken only now: those that wait are bounded by the library.
            check(min(self._events.poll(self._queue), 0), "watch")
            for event in self._events:
                if event.kind == _ffi.EVENT_LOG:
                    self._failure = error(event.status, event.text)
                elif (told := to_presence_event(event)) is not None:
                    self._ready.append(told)
            if not self._ready and self._failure is None:
                self._arrived.clear()
                self._loop.add_reader(self._fd, self._on_arrival)
                await self._arrived.wait()
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    def _on_arrival(self) -> None:
        self._loop.remove_reader(self._fd)
        self._arrived.set()

    def __del__(self) -> None:
        lib.presence_queue_free(self._queue)  # Its loop ended before it was closed.

    def _close(self) -> None:
        self._loop.remove_reader(self._fd)
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
