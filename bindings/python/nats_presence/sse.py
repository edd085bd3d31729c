"""Server-sent events: the text that a browser's EventSource reads. For WSGI servers; nats_presence.asgi uses it, too.

An answer is a sequence of events without a name, which EventSource passes to `onmessage`. After them comes one event
that the browser can wait for with addEventListener: `end`, whose data is empty, or `failure`, whose data says why the
answer is incomplete. The page then has to call EventSource.close(): otherwise EventSource connects again, and so asks
again, after a few seconds. A failure is not named `error`, because EventSource has an event of that name for lost
connections.

Events are text: bytes of a message that are not UTF-8 arrive as U+FFFD, and each line end (CR LF, CR or LF) as LF.
Encode binary messages, for example as JSON or in base64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable, NamedTuple

from ._arguments import Payload, encode_payload
from .connection import Stream
from .errors import InvalidError, PresenceError, status_text

KEEPALIVE = 15.0
"""Proxies usually close a connection that is silent for 30 to 100 seconds."""

COMMENT = b": keep-alive\n\n"
"""EventSource ignores it. It keeps a connection open, and lets the server detect that the browser has vanished."""

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store, no-transform",  # A proxy that compressed the response would delay events.
    "X-Accel-Buffering": "no",  # nginx would collect events before it forwards them.
}

FailureText = Callable[[PresenceError], str]


class Event(NamedTuple):
    """One event. An empty `name` is EventSource's "message". EventSource sends the last `id` when it connects again."""

    data: Payload
    name: str = ""
    id: str = ""

    def encode(self) -> bytes:
        """Returns the text of the event. It is one event, whatever its data contains. Raises InvalidError."""
        data = encode_payload(self.data)
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" in data:  # EventSource joins the lines of data.
            data = data.replace(b"\n", b"\ndata: ")
        name = _field(b"event", self.name) if self.name else b""
        event_id = _field(b"id", self.id) if self.id else b""
        return b"%b%bdata: %b\n\n" % (name, event_id, data)


def _field(name: bytes, value: str) -> bytes:
    encoded = encode_payload(value)
    if any(end in encoded for end in (b"\r", b"\n", b"\0")):
        raise InvalidError(f"{name.decode()} {value!r:.80}: contains a line end or NUL")
    return b"%b: %b\n" % (name, encoded)


END = Event(b"", "end").encode()


def failure_text(failure: PresenceError) -> str:
    """Returns the description of a status. The text of a worker, and names of subjects, do not reach the browser."""
    return status_text(failure.status)


def failure_event(text: str) -> bytes:
    return Event(text, "failure").encode()


def events(
    stream: Stream, *, keepalive: float = KEEPALIVE, failure_text: FailureText = failure_text
) -> Iterator[bytes]:
    """The body of a WSGI response with HEADERS: the messages of a stream, and its end or its failure, as events.

    While there are no messages, sends a comment every `keepalive` seconds: a WSGI server detects that the browser has
    left only when it sends. It then closes the iterator, which cancels the stream. `failure_text` returns the data of
    the event `failure`; with `str` the browser gets the whole message of the exception.
    """
    with stream:
        try:
            while True:
                try:
                    message = stream.next(timeout=keepalive)
                except TimeoutError:
                    if stream._has_raised:  # The stream itself has timed out.
                        raise
                    yield COMMENT
                    continue
                if message is None:
                    break
                yield Event(message).encode()
        except PresenceError as failure:
            yield failure_event(failure_text(failure))
        else:
            yield END
