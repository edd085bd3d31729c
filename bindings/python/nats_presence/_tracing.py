"""Spans of OpenTelemetry: one of kind CLIENT for each stream at the gateway, one of kind SERVER at the worker.

The package is used only if the program has imported it: as long as it has not, nothing can record spans. The requests
then carry what the configured propagators inject, usually the W3C header `traceparent`. A request to which the caller
gave that header passes it on untouched, and has no CLIENT span.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from . import _ffi
from .errors import OfflineError, PresenceError, StreamCancelledError, StreamStoppedError, status_text

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from ._shared import BaseSender, Request

SYSTEM = "nats_presence"
TRACEPARENT = "header.traceparent"
STATUS_NAMES = {value: name for name, value in vars(_ffi).items() if isinstance(value, int) and value < 0}


def is_used() -> bool:
    """Returns whether the program has imported OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


@cache
def _tracer() -> Tracer:
    from opentelemetry import trace

    from . import __version__

    return trace.get_tracer(SYSTEM, __version__)


class StreamSpan:
    """The span of one end of a stream. It ends once; calls after that have no effect. Any thread may call it."""

    def __init__(self, span: Span) -> None:
        self._open = [span]
        self._has_message = False
        self._stopped: tuple[int, int] | None = None
        """Why, and when in nanoseconds."""

    def on_first_message(self) -> None:
        """A second call has no effect."""
        if self._has_message:
            return
        self._has_message = True
        for span in self._open:
            span.add_event("first message")

    def on_stopped(self, status: int) -> None:
        """Notes the reason why the stream was stopped. A second call has no effect.

        The event is added at the end: a stop may be reported before the first message, which another thread has sent.
        """
        if self._stopped is None:
            self._stopped = status, time.time_ns()

    def end(self, failure: BaseException | None = None) -> None:
        """Ends the span. A client that leaves is no error."""
        try:
            span = self._open.pop()  # Atomic.
        except IndexError:
            return
        if isinstance(failure, StreamStoppedError):
            self.on_stopped(failure.status)
        if self._stopped:
            status, at = self._stopped
            span.add_event("stopped", {"reason": status_text(status)}, at)
        if failure is None or isinstance(failure, PresenceError):
            span.set_attribute("rpc.response.status_code", _status_name(failure))
        if failure is not None and not isinstance(failure, (OfflineError, StreamCancelledError)):
            from opentelemetry.trace import Status, StatusCode

            # Not the text of the exception, which may contain secrets.
            if isinstance(failure, PresenceError):
                kind, text = _status_name(failure), status_text(failure.status)
            else:
                kind, text = type(failure).__name__, None
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, text))
        span.end()


def _status_name(failure: PresenceError | None) -> str:
    """Returns the name of the status in the C header, without PRESENCE_."""
    return "OK" if failure is None else STATUS_NAMES.get(failure.status, "INTERNAL")


def start_request(subject: str, options: MutableMapping[str, Any]) -> StreamSpan | None:
    """Starts the span of a request, and adds the headers that carry it to the request's options."""
    if not is_used() or TRACEPARENT in options:
        return None
    from opentelemetry import propagate, trace

    span = _tracer().start_span(subject, kind=trace.SpanKind.CLIENT, attributes=_attributes(subject))
    headers: dict[str, str] = {}
    propagate.inject(headers, trace.set_span_in_context(span))
    for name, value in headers.items():
        options.setdefault(f"header.{name}", value)
    return StreamSpan(span) if span.is_recording() else None


def serving(subject: str, request: Request, sender: BaseSender) -> AbstractContextManager[None]:
    """Runs a handler in the span of its stream. `subject` is that of the service.

    The sender ends the span: that of a detached sender goes on after the handler has returned.
    """
    return _serving(subject, request, sender) if is_used() else nullcontext()


@contextmanager
def _serving(subject: str, request: Request, sender: BaseSender) -> Iterator[None]:
    from opentelemetry import context, propagate, trace

    headers = {name: _header(request, name) for name in propagate.get_global_textmap().fields}
    parent = propagate.extract({name: value for name, value in headers.items() if value})
    attributes = _attributes(subject)
    if request.subject != subject:
        attributes["rpc.method_original"] = request.subject
    span = _tracer().start_span(subject, parent, trace.SpanKind.SERVER, attributes)
    span.add_event("accepted")
    if span.is_recording():
        sender._trace(StreamSpan(span))
    token = context.attach(trace.set_span_in_context(span, parent))
    try:
        yield
    finally:
        context.detach(token)


def _header(request: Request, name: str) -> str | None:
    return request.header(name) or request.header(name.title())  # As an http.Header of Go writes it.


def _attributes(subject: str) -> dict[str, str]:
    return {"rpc.system.name": SYSTEM, "rpc.method": subject}
