"""What the sync and the asyncio side share: the connection's handle, requests, and the worker's end of a stream."""

from __future__ import annotations

import atexit
import logging
import warnings
import weakref
from collections.abc import Mapping
from ctypes import byref, c_size_t, c_uint32, c_void_p
from typing import Callable, NamedTuple

from . import _ffi
from ._arguments import Option, Payload, check_integer, encode_payload, encode_text, new_config, to_milliseconds
from ._events import Event, decode_text
from ._ffi import lib
from .errors import Closed, Invalid, PresenceError, TooLarge, check, check_error
from .presence import encode_id

log = logging.getLogger("nats_presence")

EXIT_DRAIN_MS = 1000

HANDLER_FAILED = "the handler failed"
"""What the reader gets to know of an exception, whose own text may have a secret in it."""


class ConnectionEvent(NamedTuple):
    """What became of a connection."""

    kind: str
    """"connected", "disconnected" or "log"."""
    status: int
    """0, or the `status` of the exception that would say the same; `Closed.status`: no attempt to reconnect follows."""
    text: str
    """For people."""
    subject: str = ""
    """That of a service whose subscription nats-server refuses or has taken back ("disconnected"), or accepts again
    ("connected"). Empty for events of the connection itself."""


_EVENT_KINDS = {
    _ffi.EVENT_CONNECTED: "connected",
    _ffi.EVENT_DISCONNECTED: "disconnected",
    _ffi.EVENT_LOG: "log",
}


class PresenceEvent(NamedTuple):
    """A client came online or went offline in this process."""

    client_id: str
    online: bool


def to_presence_event(event: Event) -> PresenceEvent | None:
    """An event of a watch as Python sees it; None for others."""
    if event.kind not in (_ffi.EVENT_ONLINE, _ffi.EVENT_OFFLINE):
        return None
    return PresenceEvent(event.client, event.kind == _ffi.EVENT_ONLINE)


OnEvent = Callable[[ConnectionEvent], object]


def call_on_event(on_event: OnEvent, event: ConnectionEvent) -> None:
    """Calls it; what it raises is logged, for nobody else could."""
    try:
        on_event(event)
    except Exception:
        log.exception("on_event failed for %r", event)


def to_connection_event(event: Event) -> ConnectionEvent | None:
    """An event of a connection as Python sees it; None for others."""
    kind = _EVENT_KINDS.get(event.kind)
    return None if kind is None else ConnectionEvent(kind, event.status, event.text, event.subject)


class BaseSender:
    """The worker's end of one stream.

    The library's sender is freed with this object, when nobody can be using it any longer: whatever a thread does with
    it, at whatever time, is safe. A sender that is dropped without having been ended ends its stream with an error.
    """

    _handle: int | None = None

    def __init__(self, handle: int, client_id: str) -> None:
        self._handle = handle
        self._handle_argument = _ffi.handle_argument(handle)
        self._status_word = c_uint32.from_address(lib.presence_sender_status_word(handle))
        self._detached = False
        self.client_id = client_id
        """The client's id; "" for an anonymous one."""

    def __del__(self) -> None:
        lib.presence_sender_free(self._handle)

    @property
    def status(self) -> int:
        """0 while it may send; then, for ever, the `status` of the exception that says why not.

        This is one load from memory: ask as often as you like, from any thread.
        """
        word = self._status_word.value
        return word - 2**32 if word else 0

    @property
    def closed(self) -> bool:
        """Whether it may send no more: it has ended, the client has left, or nobody can be reached. As status."""
        return self._status_word.value != 0

    @property
    def send_count(self) -> int:
        """How many messages were sent so far."""
        return int(lib.presence_sender_send_count(self._handle))

    @property
    def max_message(self) -> int:
        """How large a message may be, in bytes: the max_payload of the present nats-server, less 64."""
        return int(lib.presence_sender_max_message(self._handle))

    def end(self) -> None:
        """Ends the stream; once more is fine.

        Raises why it was stopped, if it was: Offline, Cancelled, PeerGone, Disconnected, Closed.
        """
        self._check_end(lib.presence_sender_end(self._handle))

    def error(self, message: str) -> None:
        """Ends the stream with an error, whose text the reader gets. Raises as end(), and Closed when it has ended."""
        raw = encode_payload(message)
        self._check_end(lib.presence_sender_error(self._handle, raw, len(raw)))

    def detach(self) -> None:
        """Keeps the stream open when the handler returns. Whoever still has the sender then ends it."""
        self._detached = True

    def _check_end(self, status: int) -> None:
        check(status, f"ending the stream of client {self.client_id!r}")

    def _check_sent(self, status: int, size: int) -> None:
        if status == _ffi.TOO_LARGE:
            raise TooLarge(f"message of {size} bytes is too large: the limit is {self.max_message}")
        if status:
            check(status, f"sending {size} bytes to client {self.client_id!r}")

    def _on_handler_returned(self) -> None:
        """The handler returned."""
        if not self._detached:
            self.end()

    def _on_handler_failed(self, failure: BaseException, send_errors: bool) -> None:
        """The handler raised: that is the stream's error, unless it only tells that the stream has ended."""
        if isinstance(failure, PresenceError) and failure.status == self.status:
            return
        log.error("the handler of a stream of client %r failed", self.client_id, exc_info=failure)
        reason = HANDLER_FAILED
        if send_errors:
            try:
                reason = str(failure).encode(errors="replace").decode() or type(failure).__name__
            except BaseException:
                reason = type(failure).__name__
        try:
            self.error(reason)
        except PresenceError as ended:
            log.debug("%s", ended)


class Request:
    """A request that a worker serves."""

    def __init__(self, sender: BaseSender, event: Event) -> None:
        self._sender = sender
        self.client_id = sender.client_id
        """The client's id; "" for an anonymous one."""
        self.subject = event.subject
        """The subject it came on."""
        self.data = event.data
        """Its payload."""

    def header(self, name: str) -> str | None:
        """A header of the request, by its name as it was sent; None when there is none. Raises Invalid."""
        value, size = c_void_p(), c_size_t()
        status = lib.presence_sender_header(
            self._sender._handle, encode_text("header", name), byref(value), byref(size)
        )
        check(status, f"header {name!r}")
        return None if value.value is None else decode_text(value.value, size.value)


class BaseConnection:
    """A connection to nats-server, kept up until it is closed."""

    _handle: c_void_p | None = None
    _closing = False

    def __init__(self, url: str, options: Mapping[str, Option]) -> None:
        """Connects, waiting until the server is reached or cannot be."""
        # The object has each handle before the call that makes it: a signal's handler may raise when that returns.
        self._handle, details = c_void_p(), _ffi.Error()
        self._services: list[c_void_p] = []
        with new_config(options) as settings:
            check_error(
                lib.presence_connect(encode_text("url", url), settings, byref(self._handle), byref(details)), details
            )
        _open_connections.add(self)

    def __del__(self) -> None:
        if self._handle and not self._closing and not self._is_forked():
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=1)
            self._close_now(0)

    def stats(self) -> dict[str, int]:
        """What the connection has done and has in hand: the fields of presence_stats in the C header. Raises Closed."""
        stats = _ffi.Stats()
        check(lib.presence_conn_stats(self._handle, byref(stats)), "connection")
        return {name: getattr(stats, name) for name, *_ in _ffi.Stats._fields_ if name != "reserved"}

    def _is_closed(self) -> bool:
        """Whether it was closed. Raises Forked."""
        try:
            self.stats()
        except Closed:
            return True
        return False

    def _is_forked(self) -> bool:
        """Whether this is a child of the process that made it: there is nothing to be closed here."""
        return bool(lib.presence_conn_stats(self._handle, byref(_ffi.Stats())) == _ffi.FORKED)

    def _log_failed_close(self, failure: PresenceError) -> None:
        """The block's work is done, and the connection is closed: an exception would only hide what it was."""
        log.warning("closing the connection: nats-server may not have all that was sent: %s", failure)

    def _listen_offline(self) -> None:
        check(lib.presence_listen_offline(self._handle), "listening to offline announcements")

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
    ) -> None:
        """Makes the stream."""
        details = _ffi.Error()
        raw, client = encode_payload(data), encode_id(client_id)
        with new_config(options) as settings:
            status = lib.presence_request(
                self._handle, queue, encode_text("subject", subject), raw, len(raw), client, len(client), settings, tag,
                byref(stream), byref(details),
            )  # fmt: skip
        check_error(status, details)

    def _stop_services(self) -> None:
        self._is_closed()  # Raises Forked.
        for service in list(self._services):
            lib.presence_service_stop(service)

    def _close_now(self, drain_ms: int) -> int:
        """Closes the library's connection and frees what it served; the status tells whether the server has all."""
        _open_connections.discard(self)
        self._closing = True
        try:
            return int(lib.presence_close(self._handle, drain_ms))
        finally:  # Where a signal's handler raises, too.
            for service in self._services:
                lib.presence_service_free(service)


def request_options(
    timeout: float | None, headers: Mapping[str, Option] | None, options: Mapping[str, Option]
) -> dict[str, Option]:
    """The options of presence_request, with credit as the reader reads."""
    if "manual_credit" in options:
        raise Invalid("option manual_credit: is always true here, for a reader gives credit as it reads")
    named: dict[str, Option] = {f"header.{name}": value for name, value in (headers or {}).items()}
    if timeout is not None:
        named["timeout_ms"] = max(1, to_milliseconds("timeout", timeout))
    return {**options, **named, "manual_credit": True}


def drain_ms(drain: float | None) -> int:
    """The time that closing may take; None is without limit."""
    return -1 if drain is None else to_milliseconds("drain", drain)


_open_connections: weakref.WeakSet[BaseConnection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for connection in list(_open_connections):
        connection._close_now(EXIT_DRAIN_MS)
