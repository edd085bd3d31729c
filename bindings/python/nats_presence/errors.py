"""The exceptions. Each status of the library has one; all of them derive from PresenceError."""

from __future__ import annotations

from . import _ffi


class PresenceError(Exception):
    """The base class of the exceptions that this package raises.

    `status` is the C library's status, `message` a description. `code` is the code that the worker gave the error which
    ended its stream (see HandlerError), usually of a RemoteError; 0 if it gave none.
    """

    status = _ffi.INTERNAL
    code = 0

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
    """The client is offline: it was marked offline in this process, or its last session here was closed, or another
    process announced it. A Client that was closed raises it, too.
    """

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
    """The worker ended the stream with an error; `message` is its text, and `code` its code, or 0."""

    status = _ffi.REMOTE


class ForkedError(PresenceError):
    """The object belongs to the parent of this forked process, or the parent connected before the fork."""

    status = _ffi.FORKED


class InternalError(PresenceError):
    """An internal error, which is a bug in the library. The library remains usable."""

    status = _ffi.INTERNAL


class HandlerError(Exception):
    """Raise it in a handler to end the stream with an error whose text and code the reader may see.

    The reader gets a RemoteError with this `message` and `code`. Other exceptions in a handler reach the reader as "the
    handler failed". The code is a number of your choice, from 1 to 2147483647; 0 is none. Readers without this library,
    and those of earlier releases, get the text only.
    """

    message = ""
    code = 0

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message, code)
        if not isinstance(message, str):
            raise InvalidError(f"message {message!r:.80}: must be a str")
        self.message = message
        self.code = check_code(code)

    def __str__(self) -> str:
        return f"error {self.code}: {self.message}" if self.code else self.message


def check_code(code: int) -> int:
    """Returns a worker's code if it is valid."""
    if not isinstance(code, int) or not 0 <= code < 2**31:
        raise InvalidError(f"code {code!r:.80}: must be an int from 0 to {2**31 - 1}")
    return code


_BY_STATUS = {
    kind.status: kind
    for kind in [*PresenceError.__subclasses__(), *StreamStoppedError.__subclasses__()]
    if kind is not StreamStoppedError
}


def status_text(status: int) -> str:
    """Returns a short description of a status."""
    text: bytes = _ffi.lib.presence_status_text(status)
    return text.decode()


def error(status: int, message: str, code: int = 0) -> PresenceError:
    """Makes the exception for a status. `code` is the worker's, for the end of a stream."""
    made = _BY_STATUS.get(status, InternalError)(message or status_text(status))
    if code:
        made.code = code
    return made


def check(status: int, what: str) -> None:
    """Raises the exception for a status that is not OK. `what` names the operation or the object."""
    if status != _ffi.OK:
        raise error(status, f"{what}: {status_text(status)}")


def check_error(status: int, details: _ffi.Error) -> None:
    """Raises the exception for a status that is not OK, with the message of a presence_error."""
    if status != _ffi.OK:
        raise error(status, details.message.decode(errors="replace"))
