"""The API for threads.

Each stream has a queue of its own, on which its reader waits. Each service has one, on which its threads take turns
waiting. So no other thread is involved, and Python buffers no messages between the library and the caller.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from ctypes import c_void_p
from typing import Any, Callable

from . import _ffi, _tracing
from ._arguments import Option, Payload, check_integer, check_seconds, encode_payload
from ._batches import MessageBatches
from ._events import MEMORY, Event, EventBatch, new_queue
from ._ffi import FAST_MAX_BYTES, SIZE_ARGUMENTS, ZERO_TIMEOUT, fast_send_wait, fast_stream_consumed, lib
from ._handlers import check_handler_result, check_subject, check_sync_handler
from ._reader import SLICE_MS, QueueReader
from ._shared import (
    BaseConnection,
    BaseSender,
    BaseStream,
    ConnectionEvent,
    OnEvent,
    Request,
    call_on_event,
    drain_ms,
    log,
    request_options,
    to_connection_event,
)
from .errors import PresenceError, check


class Sender(BaseSender):
    __doc__ = f"{BaseSender.__doc__}\n    Every method may be called from any thread."

    def send(self, data: Payload) -> None:
        """Sends one message; a str as UTF-8. Blocks while its reader or nats-server is too slow to take more.

        Raises OfflineError once the client has left; StreamCancelledError (the reader cancelled the stream),
        PeerGoneError, ClosedError or DisconnectedError if the stream has ended otherwise. After TooLargeError,
        ReservedError and InvalidError the stream goes on.
        """
        # Not presence_sender_send: when that returns FULL a WRITABLE event follows, for which no thread waits here.
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
        """Sends messages in order, up to the first that fails. `send_count` has the number of those that were sent.

        A list or tuple is checked first (InvalidError), and costs a fraction of the same number of calls of send().
        From any other iterable, each message is sent as soon as the iterable yields it.
        """
        if not isinstance(messages, (list, tuple)):
            for data in messages:
                self.send(data)
            return
        batches = MessageBatches(messages)
        while batches:
            if not batches.send(self._handle_argument):
                self.send(batches.pop())  # Blocks until it is writable, or raises the reason.

    def _send_each(self, messages: Iterator[Payload]) -> None:
        """Sends what a handler yields. If a message cannot be sent, closes the generator, so that its clean-up runs."""
        try:
            for data in messages:
                self.send(data)
        finally:
            if (close := getattr(messages, "close", None)) is not None:
                close()

    def _trace(self, span: _tracing.StreamSpan) -> None:
        super()._trace(span)
        self.__class__ = _TracedSender


class _TracedSender(Sender):
    """A sender whose span waits for the first message. After that it is a Sender, whose sends cost nothing more.

    Another thread may change the class during a call: so no call depends on it.
    """

    def send(self, data: Payload) -> None:
        Sender.send(self, data)
        self._on_first_message(Sender)

    def send_many(self, messages: Iterable[Payload]) -> None:
        try:
            Sender.send_many(self, messages)
        finally:
            if self.send_count:
                self._on_first_message(Sender)


Handler = Callable[[Request, Sender], object]


class Stream(BaseStream, QueueReader[bytes]):
    """The messages of one stream, as an iterator of bytes.

    The iterator ends when the worker ends the stream. Otherwise it raises RemoteError (the worker sent an error),
    NoRespondersError, BusyError (the worker takes no more streams), PresenceTimeoutError, OfflineError, PeerGoneError,
    FullError (the reader was too slow), DisconnectedError, ClosedError or StreamCancelledError.
    A slow reader slows its worker down. On level 0, where that is not possible, its stream ends with FullError.
    Leaving the `with` block, close(), and dropping the last reference cancel the stream. An exception keeps the local
    variables of the frames it passed: use `with`, so that the stream ends with the block.
    One thread at a time may wait for a message; another one gets BusyError. cancel() and close() may be called from any
    thread. If a signal handler raises (KeyboardInterrupt), the item that is just being returned can be lost: one
    message, or the stream's error. You can continue to read the stream afterwards.
    """

    def __init__(
        self, conn: Connection, subject: str, data: Payload, client_id: str, options: dict[str, Option]
    ) -> None:
        super().__init__()
        self._conn = conn
        self._consumed: int | None = None
        self._handle = c_void_p()
        self._span = conn._request(self._handle, self._queue or 0, subject, data, client_id, options, 0)

    def __del__(self) -> None:
        self._cancel_span()
        lib.presence_stream_free(self._handle)
        super().__del__()

    def _before_wait(self) -> None:
        if self._ended:
            self._raise_end(StopIteration)
        if self._consumed is not None:
            fast_stream_consumed(self._handle, self._consumed)
            self._consumed = None

    def _take_items(self, events: EventBatch) -> deque[bytes]:
        fields = events.message_fields()
        messages = deque([MEMORY[data : data + size] for kind, _, data, size in fields if kind == _ffi.EVENT_DATA])
        if messages:
            self._consumed = sum(map(len, messages))
            if self._span is not None:
                self._span.on_first_message()
        for index in range(len(messages), len(fields)):  # No message follows the end of a stream.
            event = events[index]
            if event.kind == _ffi.EVENT_ERROR:
                self._failure = self._to_failure(event)
            self._ended |= event.kind in (_ffi.EVENT_END, _ffi.EVENT_ERROR)
        if self._ended and self._span is not None:
            self._span.end(self._failure)
        return messages

    def next(self, timeout: float | None = None) -> bytes | None:
        """Returns the next message, or None if the stream has ended.

        Raises PresenceTimeoutError if no message arrives within `timeout` seconds; the stream goes on. If the stream
        has ended with an error, raises that error, and ClosedError if it was raised before.
        """
        try:
            try:
                if self._ready:
                    return self.__next__()
                return self._wait(None if timeout is None else time.monotonic() + check_seconds("timeout", timeout))
            except StopIteration:
                pass
            self._check_not_failed()
            return None
        finally:
            del self

    def close(self) -> None:
        """Cancels the stream. WSGI servers call this when the client has left; `contextlib.closing` calls it, too."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()


class _ThreadPool:
    """Daemon threads that take turns waiting on one queue.

    The thread whose turn it is converts the event. It handles the result after the next thread's turn has begun.
    """

    queue = 0

    def __init__(self, convert: Callable[[Event], Any], handle: Callable[[Any], None], threads: int, name: str) -> None:
        self._convert, self._handle = convert, handle
        self._turn = threading.Lock()
        self._stop_when_empty = self._stop_now = False
        self._names = [f"{name} {n}" for n in range(threads)]
        self.queue = new_queue()
        self.threads: list[threading.Thread] = []
        """The threads that could be started."""

    def __del__(self) -> None:
        # Not before: a thread could be waiting, or reading an event of the queue.
        lib.presence_queue_free(self.queue)

    def start(self) -> None:
        for name in self._names:
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop_when_empty(self) -> None:
        """Lets the threads end when the queue is empty."""
        self._stop_when_empty = True
        lib.presence_queue_wake(self.queue)

    def stop_now(self) -> None:
        """Lets the threads end when they have handled the events they took."""
        self._stop_now = True
        lib.presence_queue_wake(self.queue)

    def _run(self) -> None:
        events = EventBatch(1)
        while True:
            with self._turn:
                if self._stop_now:
                    return
                count = events.wait(self.queue, 0 if self._stop_when_empty else -1)
                item = self._convert(events[0]) if count > 0 else None
            if count < 0 or (count == 0 and self._stop_when_empty):
                return
            if item is not None:
                try:
                    self._handle(item)
                except BaseException:  # Also SystemExit: the thread has to serve other requests.
                    log.exception("a thread of nats_presence continues after this exception")
                item = None  # Do not keep it during the wait: a sender without references ends its stream.


class Connection(BaseConnection):
    """A connection to nats-server, made by connect(). Every method may be called from any thread.

    In a forked child process every method except close() raises ForkedError.
    """

    _event_pool: _ThreadPool | None = None
    _on_event: OnEvent | None = None

    def __init__(self, url: str, on_event: OnEvent | None, options: Mapping[str, Option]) -> None:
        self._pools: list[_ThreadPool] = []
        self._stopped = False
        try:
            super().__init__(url, options)
            if on_event is not None:
                self._on_event, self._on_event_lock = on_event, threading.Lock()
                self._event_pool = _ThreadPool(to_connection_event, self._call_on_event, 1, "nats_presence events")
                self._watch(self._event_pool.queue)
                self._event_pool.start()
        except BaseException:  # A signal handler raised, or no thread can be started.
            self._close_now(0)
            raise

    def _call_on_event(self, event: ConnectionEvent) -> None:
        """Calls on_event, if there is one. The lock is for the events of services, which their own threads receive."""
        if self._on_event is not None:
            with self._on_event_lock:
                call_on_event(self._on_event, event)

    def listen_offline(self) -> None:
        """Applies offline announcements of other processes in this process, as serving also does.

        Raises ClosedError.
        """
        self._listen_offline()

    def serve(
        self,
        subject: str,
        handler: Handler,
        *,
        queue: str = "",
        max_streams: int = 0,
        threads: int = 16,
        send_errors: bool = False,
    ) -> None:
        """Serves a subject with `handler(request, sender)`, in up to `threads` threads.

        When it returns, nats-server has the subscription. run() then waits while handlers run.
        NATS distributes the requests among all processes that serve the subject in the same `queue` group; "" is no
        group. The service takes up to `max_streams` streams at a time (0: `threads`), and answers further requests with
        "server busy". Set `max_streams` if handlers detach their senders, whose streams then outlast the handlers.
        A handler is a function, or a generator that yields the messages to send. If one of them cannot be sent, the
        generator is closed. When the handler returns, the stream ends, unless the handler called Sender.detach(). When
        it raises, the stream ends with an error: the reader gets "the handler failed" or, with `send_errors`, the
        exception's text, which may contain secrets. The logger `nats_presence` logs the exception. To send a text of
        your own and a code, raise HandlerError, or use sender.error(). A handler learns that its client has left from
        `sender.closed`, or when it sends.
        Raises InvalidError (also a TypeError, if the handler is async), ClosedError and PresenceTimeoutError;
        DisconnectedError or FullError if nats-server refuses the subscription. If nats-server refuses it later,
        on_event gets an event with the subject, and the connection tries to subscribe again.
        """
        check_sync_handler(subject, handler)

        def read_request(event: Event) -> tuple[Request, Sender] | None:
            if event.kind != _ffi.EVENT_REQUEST:
                if (connection_event := to_connection_event(event)) is not None:
                    self._call_on_event(connection_event)
                return None
            sender = Sender(event.sender, event.client)
            return Request(sender, event), sender

        def answer(item: tuple[Request, Sender]) -> None:
            request, sender = item
            if sender.closed:  # The client left before a thread was free.
                return
            with _tracing.serving(subject, request, sender):
                try:
                    result = handler(request, sender)
                    if isinstance(result, Iterator):
                        sender._send_each(result)
                    else:
                        check_handler_result(result)
                    sender._on_handler_returned()
                except BaseException as failure:
                    sender._on_handler_failed(failure, send_errors)

        count = check_integer("threads", threads, 1, 10_000)
        pool = _ThreadPool(read_request, answer, count, f"nats_presence {subject}")
        try:
            pool.start()  # Before the service takes requests, because the system may refuse to start threads.
            self._serve(pool.queue, subject, queue, max_streams or threads, 0)
            self._pools.append(pool)
        except BaseException:
            pool.stop_now()
            raise
        if self._closing:
            pool.stop_now()
        elif self._stopped:
            self.stop()

    def service(
        self,
        subject: str,
        *,
        queue: str = "",
        max_streams: int = 0,
        threads: int = 16,
        send_errors: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Decorator for a handler: calls serve() with it."""
        check_subject(subject)

        def decorate(handler: Handler) -> Handler:
            self.serve(subject, handler, queue=queue, max_streams=max_streams, threads=threads, send_errors=send_errors)
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
        """Requests a stream for a client. The client is online while the stream runs. Does not wait for the worker.

        `timeout`: seconds within which the stream has to end; otherwise its reader gets PresenceTimeoutError.
        `options`: retries, retry_delay_ms, stream_buffer_bytes (the amount of unread data that is buffered),
        only_online (raise OfflineError if the client is not online here already); see presence_config_set in the C
        header.
        Raises InvalidError, TooLargeError, FullError, DisconnectedError, ClosedError.
        """
        return Stream(self, subject, data, client_id, request_options(timeout, headers, options))

    def stop(self) -> None:
        """Stops taking requests. Running streams go on, and run() returns when their handlers have returned."""
        self._stopped = True  # First, so that a service that is just being started stops too.
        self._stop_services()
        for pool in self._pools:
            pool.stop_when_empty()

    def run(self) -> None:
        """Blocks until close() is called, or until stop() was called and all handlers have returned."""
        self._is_closed()  # Raises ForkedError.
        # Event.wait() can miss a KeyboardInterrupt that arrives as it begins to block, or stay locked after it.
        while not self._stopped:
            time.sleep(SLICE_MS / 1000)
        for pool in self._pools:
            for thread in pool.threads:
                while thread.is_alive():
                    thread.join(SLICE_MS / 1000)

    def close(self, drain: float | None = 5.0) -> None:
        """Closes the connection. Its senders and streams end with ClosedError, and the peers are notified.

        Then waits up to `drain` seconds (None: no limit) until nats-server has everything that was sent and the
        handlers have returned. Raises PresenceTimeoutError, or DisconnectedError at once if there is no connection,
        when nats-server may not have everything; the connection is closed all the same. At the end of a `with` block
        this is logged instead. A second call has no effect, nor has a call in a forked child process.
        """
        status = self._close_now(drain_ms(drain))
        if status not in (_ffi.CLOSED, _ffi.FORKED):
            check(status, "closing the connection")

    def _close_now(self, drain_ms: int) -> int:
        deadline = None if drain_ms < 0 else time.monotonic() + drain_ms / 1000
        try:
            status = super()._close_now(drain_ms)
        finally:  # Also if a signal handler raises.
            self._stopped = True
            pools = [*self._pools, self._event_pool] if self._event_pool else self._pools
            for pool in pools:
                pool.stop_now()
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
    """Connects to nats-server. Blocks until it is reached or the attempt fails.

    Close the connection with `with` or close(). Keep a reference to it: a connection without references is closed, and
    its services end.
    `url`: one or more URLs, separated by commas. It may contain a user and password, or a token.
    `on_event`: called with each ConnectionEvent, one at a time, in threads of the connection.
    `options`: those of presence_config_set in the C header, for example name, token, tls_ca_file, connect_timeout_ms,
    session_grace_ms. None leaves an option at its default.
    Raises InvalidError (URL, options), DisconnectedError (nats-server cannot be reached or refuses the connection),
    PresenceTimeoutError, ForkedError.
    """
    return Connection(url, on_event, options)
