"""The exceptions: one for each status of the library, all of them below PresenceError."""

from __future__ import annotations

from . import _ffi


class PresenceError(Exception):
    """What this package raises. `status` is the library's number for it, `message` a text for people."""

    status = _ffi.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Invalid(PresenceError, ValueError):
    """An argument is wrong: of a wrong type, not UTF-8, empty, too long, or with a character that may not be there."""

    status = _ffi.INVALID


class StreamStopped(PresenceError):
    """The stream was stopped before its end. At a worker: nobody reads what it sends any longer, so stop the work.

    It is the base class of Offline, Cancelled, PeerGone, Disconnected and Closed.
    """


class Offline(StreamStopped):
    """The client is offline: marked so in this process, or announced by another one."""

    status = _ffi.OFFLINE


class Closed(StreamStopped):
    """The sender, stream or connection has ended already."""

    status = _ffi.CLOSED


class Cancelled(StreamStopped):
    """The stream was cancelled by its reader; at a worker also: the client left before the stream had begun."""

    status = _ffi.CANCELLED


class Disconnected(StreamStopped):
    """There is no connection to nats-server now, or it was lost while the stream ran."""

    status = _ffi.DISCONNECTED


class PeerGone(StreamStopped):
    """The process at the other end is gone."""

    status = _ffi.PEER_GONE


class Full(PresenceError):
    """No room; a stream whose reader was too slow ends with it."""

    status = _ffi.FULL


class TooLarge(PresenceError):
    """The payload is larger than nats-server's max_payload."""

    status = _ffi.TOO_LARGE


class Reserved(PresenceError):
    """The payload begins with `__STREAM_END__` or `__STREAM_ERROR__`, and would end the stream at the other end."""

    status = _ffi.RESERVED


class NoResponders(PresenceError):
    """Nobody serves the subject."""

    status = _ffi.NO_RESPONDERS


class Busy(PresenceError):
    """Another thread or task reads this stream, or the worker's service has as many streams as it takes."""

    status = _ffi.BUSY


class Timeout(PresenceError, TimeoutError):
    """The time given was over."""

    status = _ffi.TIMEOUT


class Remote(PresenceError):
    """The worker ended the stream with an error; `message` is its text."""

    status = _ffi.REMOTE


class Forked(PresenceError):
    """The object belongs to the parent of this forked process, or the parent had connected before the fork."""

    status = _ffi.FORKED


class Internal(PresenceError):
    """A defect of the library. It remains usable."""

    status = _ffi.INTERNAL


_BY_STATUS = {
    kind.status: kind
    for kind in [*PresenceError.__subclasses__(), *StreamStopped.__subclasses__()]
    if kind is not StreamStopped
}


def status_text(status: int) -> str:
    """What a status means, in a few words."""
    text: bytes = _ffi.lib.presence_status_text(status)
    return text.decode()


def error(status: int, message: str) -> PresenceError:
    """The exception for a status."""
    return _BY_STATUS.get(status, Internal)(message or status_text(status))


def check(status: int, what: str) -> None:
    """Raises the exception for a status, unless it is OK. `what` was tried, or is concerned."""
    if status != _ffi.OK:
        raise error(status, f"{what}: {status_text(status)}")


def check_error(status: int, details: _ffi.Error) -> None:
    """As check, with the message that the library gave."""
    if status != _ffi.OK:
        raise error(status, details.message.decode(errors="replace"))
