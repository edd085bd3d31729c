"""The sync side: threads that wait.

Each stream has a queue of its own, on which its reader waits, and each service has one, on which its threads take
turns waiting. So there is no thread in between, nothing is buffered in Python, and nothing runs that was not asked for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from ctypes import c_void_p
from typing import Any, Callable

from . import _ffi
from ._arguments import Option, Payload, check_integer, check_seconds, encode_payload
from ._batches import MessageBatches
from ._events import MEMORY, Event, EventBatch, new_queue
from ._ffi import FAST_MAX_BYTES, SIZE_ARGUMENTS, ZERO_TIMEOUT, fast_send_wait, fast_stream_consumed, lib
from ._handlers import check_handler_result, check_subject, check_sync_handler
from ._reader import SLICE_MS, QueueReader
from ._shared import (
    BaseConnection,
    BaseSender,
    ConnectionEvent,
    OnEvent,
    Request,
    call_on_event,
    drain_ms,
    log,
    request_options,
    to_connection_event,
)
from .errors import PresenceError, check, error


class Sender(BaseSender):
    __doc__ = f"{BaseSender.__doc__}\n    Every method may be called from any thread."

    def send(self, data: Payload) -> None:
        """Sends one message; text as UTF-8. Waits while there is no room: the reader, or nats-server, is behind.

        Raises Offline as soon as the client has left, and Cancelled (the reader left the stream), PeerGone, Closed or
        Disconnected when the stream is over otherwise. After TooLarge, Reserved and Invalid the stream goes on.
        """
        # Not presence_sender_send: nobody waits for the event that follows its refusal.
        if (
            type(data) is bytes
            and len(data) <= FAST_MAX_BYTES
            and fast_send_wait(self._handle_argument, data, SIZE_ARGUMENTS[len(data)], ZERO_TIMEOUT) == _ffi.OK
        ):
            return
        raw = encode_payload(data)
        status = _ffi.TIMEOUT
        while status == _ffi.TIMEOUT:
            status = lib.presence_sender_send_wait(self._handle, raw, len(raw), SLICE_MS)
        self._check_sent(status, len(raw))

    def send_many(self, messages: Iterable[Payload]) -> None:
        """Sends one message after the other, up to the first that fails; `send_count` tells how far it came.

        A list or tuple is looked through before (Invalid), and costs a fraction of as many calls of send; of what else
        can be iterated over each message is sent as it comes.
        """
        if not isinstance(messages, (list, tuple)):
            for data in messages:
                self.send(data)
            return
        batches = MessageBatches(messages)
        while batches:
            if not batches.send(self._handle_argument):
                self.send(batches.pop())  # Waits, or raises what is wrong.

    def _send_each(self, messages: Iterator[Payload]) -> None:
        """What a handler yields. Its clean-up runs when no more can be sent."""
        try:
            for data in messages:
                self.send(data)
        finally:
            if (close := getattr(messages, "close", None)) is not None:
                close()


Handler = Callable[[Request, Sender], object]


class Stream(QueueReader[bytes]):
    """The messages of one stream, as an iterator of bytes.

    It ends when the worker ends it; otherwise by an exception: Remote (the worker's error), NoResponders, Busy (the
    worker takes no more streams), Timeout, Offline, PeerGone, Full (the reader was too slow), Disconnected, Closed,
    Cancelled.
    A reader that does not read holds its worker back, or, if that cannot be, loses its stream with Full.
    Leaving the `with`, close(), or dropping it, cancels it. An exception keeps what the frames it passed have a name
    for: use `with`, and the stream ends where the block does.
    One thread at a time may wait for a message: Busy. cancel() and close() may be called from any thread.
    Where a signal's handler raises (KeyboardInterrupt), what was just being handed over can be lost: one message, or
    why it ended. Who still has the stream may go on reading it.
    """

    _handle: c_void_p | None = None

    def __init__(
        self, conn: Connection, subject: str, data: Payload, client_id: str, options: dict[str, Option]
    ) -> None:
        super().__init__()
        self._conn = conn
        self._consumed: int | None = None
        self._ended = self._has_failed = False
        self._failure: PresenceError | None = None
        self._handle = c_void_p()
        conn._request(self._handle, self._queue or 0, subject, data, client_id, options, 0)

    def __del__(self) -> None:
        lib.presence_stream_free(self._handle)
        super().__del__()

    def _before_wait(self) -> None:
        if self._ended:
            failure, self._failure = self._failure, None
            self._has_failed |= failure is not None
            raise failure or StopIteration
        if self._consumed is not None:
            fast_stream_consumed(self._handle, self._consumed)
            self._consumed = None

    def _take_items(self, events: EventBatch) -> deque[bytes]:
        fields = events.message_fields()
        messages = deque([MEMORY[data : data + size] for kind, _, data, size in fields if kind == _ffi.EVENT_DATA])
        if messages:
            self._consumed = sum(map(len, messages))
        for index in range(len(messages), len(fields)):  # No message follows an end.
            event = events[index]
            if event.kind == _ffi.EVENT_ERROR:
                self._failure = error(event.status, event.text)
            self._ended |= event.kind in (_ffi.EVENT_END, _ffi.EVENT_ERROR)
        return messages

    def next(self, timeout: float | None = None) -> bytes | None:
        """The next message; None at the stream's end.

        Raises Timeout when none came for `timeout` seconds (the stream goes on), else what the stream ends with,
        and Closed if that was raised before.
        """
        try:
            if self._ready:
                return self.__next__()
            return self._wait(None if timeout is None else time.monotonic() + check_seconds("timeout", timeout))
        except StopIteration:
            if self._has_failed:
                raise error(_ffi.CLOSED, "the stream has failed before") from None
            return None
        finally:
            del self

    def cancel(self) -> None:
        """Ends the stream, for its reader with Cancelled, and for its worker: see the README on leaving a stream.

        Once the stream has ended this has no effect.
        """
        lib.presence_stream_cancel(self._handle)

    def close(self) -> None:
        """As cancel(), for `contextlib.closing` and for WSGI servers, which call it when the client has left."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()


class _ThreadPool:
    """Daemon threads that take turns waiting on one queue. Each event is taken in turn, and worked on out of it."""

    queue = 0

    def __init__(self, take: Callable[[Event], Any], work: Callable[[Any], None], threads: int, name: str) -> None:
        self._take, self._work = take, work
        self._turn = threading.Lock()
        self._stopping = self._freed = False
        self._names = [f"{name} {n}" for n in range(threads)]
        self.queue = new_queue()
        self.threads: list[threading.Thread] = []
        """Those that could be started."""

    def __del__(self) -> None:
        # Only here: until now a thread could be waiting, or reading what the queue gave.
        lib.presence_queue_free(self.queue)

    def start(self) -> None:
        for name in self._names:
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> None:
        """Has the threads end when nothing is left in the queue."""
        self._stopping = True
        lib.presence_queue_wake(self.queue)

    def free(self) -> None:
        """Has the threads end when they have done what they took."""
        self._freed = True
        lib.presence_queue_wake(self.queue)

    def _run(self) -> None:
        events = EventBatch(1)
        while True:
            with self._turn:
                if self._freed:
                    return
                count = events.wait(self.queue, 0 if self._stopping else -1)
                taken = self._take(events[0]) if count > 0 else None
            if count < 0 or (count == 0 and self._stopping):
                return
            if taken is not None:
                try:
                    self._work(taken)
                except BaseException:  # SystemExit too: the thread serves others.
                    log.exception("a thread goes on after this")
                taken = None  # Not kept while waiting: a sender that nobody has any longer ends.


class Connection(BaseConnection):
    """A connection to nats-server, made by connect(). Every method may be called from any thread.

    In a child after fork() every method but close() raises Forked.
    """

    _events: _ThreadPool | None = None
    _on_event: OnEvent | None = None

    def __init__(self, url: str, on_event: OnEvent | None, options: Mapping[str, Option]) -> None:
        self._pools: list[_ThreadPool] = []
        self._stopped = False
        try:
            super().__init__(url, options)
            if on_event is not None:
                self._on_event, self._turn = on_event, threading.Lock()
                self._events = _ThreadPool(to_connection_event, self._call_on_event, 1, "nats_presence events")
                self._watch(self._events.queue)
                self._events.start()
        except BaseException:  # Of a signal's handler, or where no thread can be started.
            self._close_now(0)
            raise

    def _call_on_event(self, event: ConnectionEvent) -> None:
        """Calls on_event, if there is one. Not by two threads at once: services have events, too."""
        if self._on_event is not None:
            with self._turn:
                call_on_event(self._on_event, event)

    def listen_offline(self) -> None:
        """Applies the offline announcements of other processes in this one. Serving does it too. Raises Closed."""
        self._listen_offline()

    def service(
        self,
        subject: str,
        *,
        queue: str = "",
        max_streams: int = 0,
        threads: int = 16,
        send_errors: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Decorates `handler(request, sender)`, which serves the subject from now on, in at most `threads` threads.

        Requests are spread over all processes that serve the subject in the same `queue` group; "" is no group. At most
        `max_streams` streams (0: as many as there are threads) run at once: a request beyond is answered with "server
        busy". Give a number where handlers detach their senders, whose streams outlast them.
        A handler is a function, or a generator, whose messages are sent as it yields them; it is closed when one cannot
        be. The stream ends when the handler returns (see Sender.detach), with an error when it raises: the reader is
        sent "the handler failed", or with `send_errors` the exception's text, which may have secrets in it. To send a
        text of your own use sender.error(). The log `nats_presence` has it all. A handler has to ask `sender.closed`,
        or to send, to learn that the client has left. Raises Invalid (and TypeError, for an async handler), Closed,
        Timeout; Disconnected or Full where nats-server refuses the subscription. A refusal that comes later is an event
        with the subject, and the subscription is tried again.
        """
        check_subject(subject)

        def take(event: Event) -> tuple[Request, Sender] | None:
            if event.kind != _ffi.EVENT_REQUEST:
                if (what := to_connection_event(event)) is not None:
                    self._call_on_event(what)
                return None
            sender = Sender(event.sender, event.client)
            return Request(sender, event), sender

        def decorate(handler: Handler) -> Handler:
            check_sync_handler(subject, handler)

            def work(taken: tuple[Request, Sender]) -> None:
                request, sender = taken
                if sender.closed:  # Its client left while it waited for a thread.
                    return
                try:
                    result = handler(request, sender)
                    if isinstance(result, Iterator):
                        sender._send_each(result)
                    else:
                        check_handler_result(result)
                    sender._on_handler_returned()
                except BaseException as failure:
                    sender._on_handler_failed(failure, send_errors)

            pool = _ThreadPool(take, work, check_integer("threads", threads, 1, 10_000), f"nats_presence {subject}")
            try:
                pool.start()  # Before there is a service: it may be impossible.
                self._serve(pool.queue, subject, queue, max_streams or threads, 0)
                self._pools.append(pool)
            except BaseException:
                pool.free()
                raise
            if self._closing:
                pool.free()
            elif self._stopped:
                self.stop()
            return handler

        return decorate

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
        return Stream(self, subject, data, client_id, request_options(timeout, headers, options))

    def stop(self) -> None:
        """Takes no more requests. Streams that run go on; run() returns when their handlers have."""
        self._stopped = True  # First: a service that is begun meanwhile sees it, and stops.
        self._stop_services()
        for pool in self._pools:
            pool.stop()

    def run(self) -> None:
        """Waits until close(), or until stop() and the return of all handlers."""
        self._is_closed()  # Raises Forked.
        # An Event's wait() would miss a KeyboardInterrupt that comes as it begins to block, or be left locked by it.
        while not self._stopped:
            time.sleep(SLICE_MS / 1000)
        for pool in self._pools:
            for thread in pool.threads:
                while thread.is_alive():
                    thread.join(SLICE_MS / 1000)

    def close(self, drain: float | None = 5.0) -> None:
        """Closes it: senders and streams that still run end with Closed, and the other ends are told.

        Then it waits, at most `drain` seconds (None: without limit), until the server has all that was sent before and
        the handlers have returned. Raises Timeout or Disconnected (at once, where there is no connection) when the
        server may not have it all; the connection is closed all the same. The end of a `with` logs that instead.
        Once more has no effect; nor has it in a child after fork().
        """
        status = self._close_now(drain_ms(drain))
        if status not in (_ffi.CLOSED, _ffi.FORKED):
            check(status, "closing the connection")

    def _close_now(self, drain_ms: int) -> int:
        deadline = None if drain_ms < 0 else time.monotonic() + drain_ms / 1000
        try:
            status = super()._close_now(drain_ms)
        finally:  # Where a signal's handler raises, too.
            self._stopped = True
            pools = [*self._pools, self._events] if self._events else self._pools
            for pool in pools:
                pool.free()
        if status == _ffi.FORKED:
            return status
        me = threading.current_thread()
        for thread in [thread for pool in pools for thread in pool.threads if thread is not me]:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return status

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.close()
        except PresenceError as failure:
            self._log_failed_close(failure)


def connect(url: str, *, on_event: OnEvent | None = None, **options: Option) -> Connection:
    """Connects to nats-server, waiting until it is reached or cannot be; to be closed by `with` or close().

    Keep it: a connection that is dropped is closed, and what it served with it.
    `url`: one or several with commas between; user and password, or a token, may stand in it.
    `on_event`: called with each ConnectionEvent, one after the other, in threads of the connection.
    `options`: as presence_config_set in the C header lists them, for example name, token, tls_ca_file,
    connect_timeout_ms, session_grace_ms; None leaves one at its default.
    Raises Invalid (URL, options), Disconnected (cannot be reached, or refuses us), Timeout, Forked.
    """
    return Connection(url, on_event, options)
