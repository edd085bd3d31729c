"""The metrics of this process, as text and as WSGI and ASGI applications."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from ctypes import create_string_buffer
from typing import Any

from ._ffi import lib
from .errors import check

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_Message = MutableMapping[str, Any]


def metrics() -> bytes:
    """Returns the metrics of this process as OpenMetrics text: those of all its connections together.

    No label has a client's id; the metrics of a service have its subject. docs/metrics.md describes each metric.
    """
    size = 16 << 10
    while True:
        buffer = create_string_buffer(size)
        length = lib.presence_metrics(buffer, size)
        if length < 0:
            check(length, "metrics")
        if length < size:
            return buffer.raw[:length]
        size = length + length // 4  # The text may have grown by the next call.


def _answer(method: str) -> tuple[int, str, bytes]:
    if method not in ("GET", "HEAD"):
        return 405, "text/plain; charset=utf-8", b"metrics are read with GET\n"
    return 200, CONTENT_TYPE, metrics()


def metrics_wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answers with metrics(): a WSGI application for Prometheus, to be mounted at /metrics."""
    method = environ["REQUEST_METHOD"]
    status, kind, body = _answer(method)
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    if status == 405:
        headers.append(("Allow", "GET, HEAD"))
    start_response("200 OK" if status == 200 else "405 Method Not Allowed", headers)
    return [b"" if method == "HEAD" else body]


async def metrics_asgi(
    scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
) -> None:
    """Answers with metrics(): an ASGI application for Prometheus, to be mounted at /metrics."""
    if scope["type"] != "http":
        raise ValueError(f"metrics_asgi answers HTTP requests only, not {scope['type']!r}")
    method = scope["method"]
    status, kind, body = _answer(method)
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    if status == 405:
        headers.append((b"allow", b"GET, HEAD"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})
