"""The exceptions. Each status of the library has one; all of them derive from PresenceError."""

from __future__ import annotations

from . import _ffi


class PresenceError(Exception):
    """The base class of this package's exceptions. `status` is the C library's status, `message` a description."""

    status = _ffi.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidError(PresenceError, ValueError):
    """An argument is invalid: of a wrong type, not UTF-8, empty, too long, or with a character that is not allowed."""

    status = _ffi.INVALID


class StreamStoppedError(PresenceError):
    """The stream was stopped before its end. A worker that catches it should stop its work: no one reads the stream.

    This is the base class of OfflineError, StreamCancelledError, PeerGoneError, DisconnectedError and ClosedError.
    """


class OfflineError(StreamStoppedError):
    """The client is offline: it was marked offline in this process, or another process announced it."""

    status = _ffi.OFFLINE


class ClosedError(StreamStoppedError):
    """The sender or stream has already ended, or the connection is closed."""

    status = _ffi.CLOSED


class StreamCancelledError(StreamStoppedError):
    """The reader cancelled the stream. A worker also gets this if the client left before the stream had begun."""

    status = _ffi.CANCELLED


class DisconnectedError(StreamStoppedError, ConnectionError):
    """There is no connection to nats-server at present, or it was lost while the stream ran."""

    status = _ffi.DISCONNECTED


class PeerGoneError(StreamStoppedError, ConnectionError):
    """The process at the other end of the stream is gone: it was killed, hangs, or is cut off."""

    status = _ffi.PEER_GONE


class FullError(PresenceError):
    """A buffer or a limit is full. A stream also ends with this if its reader was too slow."""

    status = _ffi.FULL


class TooLargeError(PresenceError, ValueError):
    """The message is larger than nats-server's max_payload allows."""

    status = _ffi.TOO_LARGE


class ReservedError(PresenceError, ValueError):
    """The message begins with `__STREAM_END__` or `__STREAM_ERROR__`, which would end the stream for its reader."""

    status = _ffi.RESERVED


class NoRespondersError(PresenceError):
    """No worker serves the subject."""

    status = _ffi.NO_RESPONDERS


class BusyError(PresenceError):
    """Another thread or task is reading this stream, or the worker's service already has `max_streams` streams."""

    status = _ffi.BUSY


class PresenceTimeoutError(PresenceError, TimeoutError):
    """The operation did not finish within its timeout."""

    status = _ffi.TIMEOUT


class RemoteError(PresenceError):
    """The worker ended the stream with an error; `message` is its text."""

    status = _ffi.REMOTE


class ForkedError(PresenceError):
    """The object belongs to the parent of this forked process, or the parent connected before the fork."""

    status = _ffi.FORKED


class InternalError(PresenceError):
    """An internal error, which is a bug in the library. The library remains usable."""

    status = _ffi.INTERNAL


_BY_STATUS = {
    kind.status: kind
    for kind in [*PresenceError.__subclasses__(), *StreamStoppedError.__subclasses__()]
    if kind is not StreamStoppedError
}


def status_text(status: int) -> str:
    """Returns a short description of a status."""
    text: bytes = _ffi.lib.presence_status_text(status)
    return text.decode()


def error(status: int, message: str) -> PresenceError:
    """Makes the exception for a status."""
    return _BY_STATUS.get(status, InternalError)(message or status_text(status))


def check(status: int, what: str) -> None:
    """Raises the exception for a status that is not OK. `what` names the operation or the object."""
    if status != _ffi.OK:
        raise error(status, f"{what}: {status_text(status)}")


def check_error(status: int, details: _ffi.Error) -> None:
    """Raises the exception for a status that is not OK, with the message of a presence_error."""
    if status != _ffi.OK:
        raise error(status, details.message.decode(errors="replace"))
