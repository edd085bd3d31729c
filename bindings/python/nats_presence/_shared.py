"""What the threaded and the asyncio side have in common: connections, requests, senders, and the end of streams."""

from __future__ import annotations

import atexit
import logging
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from ctypes import byref, c_size_t, c_uint32, c_void_p, sizeof
from typing import TYPE_CHECKING, Callable, NamedTuple, NoReturn

from . import _ffi, _tracing
from ._arguments import Option, Payload, check_integer, encode_payload, encode_text, new_config, to_milliseconds
from ._events import Event, EventBatch, decode_text
from ._ffi import lib
from .errors import (
    ClosedError,
    HandlerError,
    InvalidError,
    PresenceError,
    RemoteError,
    StreamCancelledError,
    TooLargeError,
    check,
    check_code,
    check_error,
    error,
)
from .presence import encode_id

if TYPE_CHECKING:
    from .client import Client

log = logging.getLogger("nats_presence")

EXIT_DRAIN_MS = 1000

HANDLER_FAILED = "the handler failed"
"""What the reader is sent in place of the text of an exception, which may contain secrets."""


class ConnectionEvent(NamedTuple):
    """A change in the state of a connection, or a log message of it."""

    kind: str
    """"connected", "disconnected" or "log"."""
    status: int
    """0, or the `status` of the corresponding exception; `ClosedError.status` if it will not reconnect."""
    text: str
    """A description."""
    subject: str = ""
    """The subject of a service whose subscription nats-server refuses or takes back ("disconnected"), or accepts again
    ("connected"). Empty if the event concerns the connection."""


_EVENT_KINDS = {
    _ffi.EVENT_CONNECTED: "connected",
    _ffi.EVENT_DISCONNECTED: "disconnected",
    _ffi.EVENT_LOG: "log",
}


class PresenceEvent(NamedTuple):
    """A client came online or went offline in this process."""

    client_id: str
    online: bool


def to_presence_events(events: EventBatch) -> tuple[deque[PresenceEvent], PresenceError | None]:
    """Converts the events of a watch. Returns also the error to raise after them, if later events were dropped."""
    converted: deque[PresenceEvent] = deque()
    failure = None
    for event in events:
        if event.kind in (_ffi.EVENT_ONLINE, _ffi.EVENT_OFFLINE):
            converted.append(PresenceEvent(event.client, event.kind == _ffi.EVENT_ONLINE))
        elif event.kind == _ffi.EVENT_LOG:
            failure = error(event.status, event.text)
    return converted, failure


OnEvent = Callable[[ConnectionEvent], object]


def call_on_event(on_event: OnEvent, event: ConnectionEvent) -> None:
    """Calls a user's on_event. Logs what it raises, because there is no caller to raise it to."""
    try:
        on_event(event)
    except Exception:
        log.exception("on_event failed for %r", event)


def to_connection_event(event: Event) -> ConnectionEvent | None:
    """Converts an event of a connection. Returns None for other kinds of events."""
    kind = _EVENT_KINDS.get(event.kind)
    return None if kind is None else ConnectionEvent(kind, event.status, event.text, event.subject)


class BaseSender:
    """The worker's end of one stream.

    The library's sender is freed with this object, when no other thread can be using it: every method is safe to call
    at any time. If the last reference is dropped before the stream has ended, the stream ends with an error.
    """

    _handle: int | None = None
    _span: _tracing.StreamSpan | None = None

    def __init__(self, handle: int, client_id: str) -> None:
        self._handle = handle
        self._handle_argument = _ffi.handle_argument(handle)
        self._status_word = c_uint32.from_address(lib.presence_sender_status_word(handle))
        self._detached = False
        self.client_id = client_id
        """The client's id; "" if the request had none."""

    def __del__(self) -> None:
        if self._span is not None:
            self._span.end(error(self.status or _ffi.CLOSED, ""))
        lib.presence_sender_free(self._handle)

    @property
    def status(self) -> int:
        """0 while the sender may send; afterwards, for good, the `status` of the exception that says why it may not.

        Reading it costs one load from memory. It may be read as often as you like, from any thread.
        """
        word = self._status_word.value
        return word - 2**32 if word else 0

    @property
    def closed(self) -> bool:
        """Whether the sender may not send any more: its stream has ended or was stopped. As cheap as `status`."""
        return self._status_word.value != 0

    @property
    def send_count(self) -> int:
        """The number of messages sent so far."""
        return int(lib.presence_sender_send_count(self._handle))

    @property
    def max_message(self) -> int:
        """The maximum size of a message in bytes: the present nats-server's max_payload less 64."""
        return int(lib.presence_sender_max_message(self._handle))

    def end(self) -> None:
        """Ends the stream. A second call has no effect.

        If the stream was stopped before, raises the reason: OfflineError, StreamCancelledError, PeerGoneError,
        DisconnectedError or ClosedError.
        """
        self._check_end(lib.presence_sender_end(self._handle))

    def error(self, message: str, code: int = 0) -> None:
        """Ends the stream with an error. The reader gets `message`, and `code` (see HandlerError).

        Raises as end(), and ClosedError after an end.
        """
        raw = encode_payload(message)
        ended = lib.presence_sender_error_code(self._handle, check_code(code), raw, len(raw))
        self._check_end(ended, RemoteError(""))

    def detach(self) -> None:
        """Keeps the stream open after the handler returns. You then have to keep the sender, and to call end()."""
        self._detached = True

    def _trace(self, span: _tracing.StreamSpan) -> None:
        self._span = span

    def _on_first_message(self, untraced: type[BaseSender]) -> None:
        """Records the first message. The sender is then of the class `untraced`, whose sends cost nothing more."""
        if self._span is not None:
            self._span.on_first_message()
        self.__class__ = untraced

    def _check_end(self, status: int, failure: PresenceError | None = None) -> None:
        if self._span is not None:
            self._span.end(error(status, "") if status else failure)
        check(status, f"ending the stream of client {self.client_id!r}")

    def _check_sent(self, status: int, size: int) -> None:
        if status == _ffi.TOO_LARGE:
            raise TooLargeError(f"message is {size} bytes; the limit is {self.max_message}")
        if status:
            check(status, f"sending {size} bytes to client {self.client_id!r}")

    def _on_handler_returned(self) -> None:
        if not self._detached:
            self.end()

    def _on_handler_failed(self, failure: BaseException, send_errors: bool) -> None:
        """Ends the stream with the exception that the handler raised, unless that is why the stream has ended."""
        if self._span is not None:
            self._span.end(failure)
        if isinstance(failure, PresenceError) and failure.status == self.status:
            return
        code = 0
        if isinstance(failure, HandlerError):
            reason, code = failure.message.encode(errors="replace").decode(), failure.code
        else:
            log.error("the handler of a stream of client %r failed", self.client_id, exc_info=failure)
            reason = HANDLER_FAILED
            if send_errors:
                try:
                    reason = str(failure).encode(errors="replace").decode() or type(failure).__name__
                except BaseException:
                    reason = type(failure).__name__
        try:
            self.error(reason, code)
        except PresenceError as ended:
            log.debug("%s", ended)


class Request:
    """A request that a worker serves."""

    def __init__(self, sender: BaseSender, event: Event) -> None:
        self._sender = sender
        self.client_id = sender.client_id
        """The client's id; "" if the request has none."""
        self.subject = event.subject
        """The subject on which the request arrived."""
        self.data = event.data
        """The payload of the request."""

    def header(self, name: str) -> str | None:
        """Returns a header of the request, or None if there is none of exactly this name. Raises InvalidError."""
        value, size = c_void_p(), c_size_t()
        handle = self._sender._handle
        status = lib.presence_sender_header(handle, encode_text("header", name), byref(value), byref(size))
        check(status, f"header {name!r}")
        return None if value.value is None else decode_text(value.value, size.value)


class BaseStream:
    """How a stream ends for its reader."""

    _handle: c_void_p | None = None
    _client: Client | None = None
    """The client through which it was requested."""
    _ended = False
    _failure: PresenceError | None = None
    """The error with which the stream has ended, until it is raised."""
    _has_raised = False
    """Whether the failure was raised."""
    _span: _tracing.StreamSpan | None = None

    def cancel(self) -> None:
        """Cancels the stream: its reader gets StreamCancelledError.

        The README says under "Leaving a stream" what its worker gets. It has no effect on a stream that has ended.
        """
        lib.presence_stream_cancel(self._handle)
        self._cancel_span()

    def _cancel_span(self) -> None:
        if self._span is not None:
            self._span.end(StreamCancelledError(""))

    def _to_failure(self, event: Event) -> PresenceError:
        """Converts the event that ended the stream with an error. A client that is closed cancels its streams."""
        if event.status == _ffi.CANCELLED and self._client is not None and not self._client.online:
            return self._client._offline_error()
        return error(event.status, event.text, event.error_code)

    def _raise_end(self, stop: type[Exception]) -> NoReturn:
        """Raises the failure of a stream that has ended; after that, and if there is none, `stop`."""
        failure, self._failure = self._failure, None
        self._has_raised |= failure is not None
        raise failure or stop

    def _check_not_failed(self) -> None:
        """Raises ClosedError if the failure was raised before: what ended with an error must not look complete."""
        if self._has_raised:
            raise error(_ffi.CLOSED, "the stream has already failed")


class BaseConnection:
    """A connection to nats-server. The library keeps it up until it is closed."""

    _handle: c_void_p | None = None
    _closing = False

    def __init__(self, url: str, options: Mapping[str, Option]) -> None:
        """Connects. Blocks until the server is reached or the attempt fails."""
        # The object has each handle before the call that fills it: a signal handler may raise when that returns.
        self._handle, details = c_void_p(), _ffi.Error()
        self._services: list[c_void_p] = []
        with new_config(options) as settings:
            status = lib.presence_connect(encode_text("url", url), settings, byref(self._handle), byref(details))
            check_error(status, details)
        _open_connections.add(self)

    def __del__(self) -> None:
        if self._handle and not self._closing and not self._is_forked():
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=1)
            self._close_now(0)

    def stats(self) -> dict[str, int]:
        """Returns the counters of the connection: the fields of presence_stats in the C header. Raises ClosedError."""
        stats = _ffi.Stats()
        check(lib.presence_conn_stats(self._handle, byref(stats)), "connection")
        return {name: getattr(stats, name) for name, *_ in _ffi.Stats._fields_ if name != "reserved"}

    def _is_closed(self) -> bool:
        """Returns whether the connection is closed. Raises ForkedError."""
        try:
            self.stats()
        except ClosedError:
            return True
        return False

    def _is_forked(self) -> bool:
        """Returns whether the connection belongs to a parent process, so that there is nothing to close here."""
        return bool(lib.presence_conn_stats(self._handle, byref(_ffi.Stats())) == _ffi.FORKED)

    def _log_failed_close(self, failure: PresenceError) -> None:
        """Logs a failure at the end of a `with` block: an exception would hide how the block itself ended."""
        log.warning("closing the connection: nats-server may not have all that was sent: %s", failure)

    def _listen_offline(self) -> None:
        check(lib.presence_listen_offline(self._handle), "subscribing to offline announcements")

    def _watch(self, queue: int) -> None:
        check(lib.presence_conn_watch(self._handle, queue, 0), "watching the connection")

    def _serve(self, queue: int, subject: str, group: str, max_streams: int, tag: int) -> c_void_p:
        service, details = c_void_p(), _ffi.Error()
        limit = check_integer("max_streams", max_streams, 0, 2**32 - 1)
        self._services.append(service)
        try:
            status = lib.presence_serve(
                self._handle,
                queue,
                encode_text("subject", subject),
                encode_text("queue", group),
                limit,
                tag,
                byref(service),
                byref(details),
            )
            check_error(status, details)
        except BaseException:
            self._end_service(service)
            raise
        return service

    def _end_service(self, service: c_void_p) -> None:
        self._services.remove(service)
        lib.presence_service_free(service)

    def _request(
        self,
        stream: c_void_p,
        queue: int,
        subject: str,
        data: Payload,
        client_id: str,
        options: dict[str, Option],
        tag: int,
    ) -> _tracing.StreamSpan | None:
        """Requests a stream, and stores its handle in `stream`. Returns the stream's span, if it is traced."""
        details = _ffi.Error()
        raw, client, encoded_subject = encode_payload(data), encode_id(client_id), encode_text("subject", subject)
        span = _tracing.start_request(subject, options)
        try:
            with new_config(options) as settings:
                args = _ffi.RequestArgs(
                    size=sizeof(_ffi.RequestArgs),
                    subject=encoded_subject,
                    data=raw,
                    data_len=len(raw),
                    client=client,
                    client_len=len(client),
                    tag=tag,
                    config=settings,
                )
                status = lib.presence_request(self._handle, queue, byref(args), byref(stream), byref(details))
            check_error(status, details)
        except BaseException as failure:
            if span is not None:
                span.end(failure)
            raise
        return span

    def _stop_services(self) -> None:
        self._is_closed()  # Raises ForkedError.
        for service in list(self._services):
            lib.presence_service_stop(service)

    def _close_now(self, drain_ms: int) -> int:
        """Closes the library's connection and frees its services. Returns the status of presence_close."""
        _open_connections.discard(self)
        self._closing = True
        try:
            return int(lib.presence_close(self._handle, drain_ms))
        finally:  # Also if a signal handler raises.
            for service in self._services:
                lib.presence_service_free(service)


def request_options(
    timeout: float | None, headers: Mapping[str, Option] | None, options: Mapping[str, Option]
) -> dict[str, Option]:
    """Returns the options of presence_request. The binding returns credit as the stream is read (manual_credit)."""
    if "manual_credit" in options:
        raise InvalidError("option manual_credit: cannot be set here, because reading a stream returns its credit")
    named: dict[str, Option] = {f"header.{name}": value for name, value in (headers or {}).items()}
    if timeout is not None:
        named["timeout_ms"] = max(1, to_milliseconds("timeout", timeout))
    return {**options, **named, "manual_credit": True}


def drain_ms(drain: float | None) -> int:
    """Converts the `drain` argument of close() to milliseconds. None is unlimited (-1)."""
    return -1 if drain is None else to_milliseconds("drain", drain)


_open_connections: weakref.WeakSet[BaseConnection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for connection in list(_open_connections):
        connection._close_now(EXIT_DRAIN_MS)
