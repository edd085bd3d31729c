"""Stops work for clients that have left: presence and streams over NATS.

A *worker* serves requests for streams. A *gateway* requests streams on behalf of its *clients*. Once a client has left
its gateway, the worker's *sender* refuses to send: it raises `StreamStoppedError`.

- Presence in this process: mark_client_online, mark_client_offline, is_client_online, online_count, session, watch.
  mark_clients_online and mark_clients_offline mark many clients at once.
- A gateway's clients: client() returns a Client, whose late requests fail. For threads and asyncio.
- With threads: connect() returns a Connection. A worker uses its serve(), a gateway its stream().
- With asyncio: the same in nats_presence.aio.
- Metrics of this process for Prometheus: metrics(), metrics_wsgi and metrics_asgi.
- Errors: each status has an exception, derived from PresenceError. Those after which no one reads a stream any more
  derive from StreamStoppedError. A handler raises HandlerError to send its reader an error with a text and a code.

Durations are in seconds, except in options whose names end with _ms.
"""

from . import aio
from ._metrics import metrics, metrics_asgi, metrics_wsgi
from ._shared import ConnectionEvent, PresenceEvent, Request
from .client import Client, client
from .connection import Connection, Sender, Stream, connect
from .errors import (
    BusyError,
    ClosedError,
    DisconnectedError,
    ForkedError,
    FullError,
    HandlerError,
    InternalError,
    InvalidError,
    NoRespondersError,
    OfflineError,
    PeerGoneError,
    PresenceError,
    PresenceTimeoutError,
    RemoteError,
    ReservedError,
    StreamCancelledError,
    StreamStoppedError,
    TooLargeError,
)
from .presence import (
    Session,
    is_client_online,
    mark_client_offline,
    mark_client_online,
    mark_clients_offline,
    mark_clients_online,
    online_count,
    session,
)
from .watch import Watch, watch

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "Client",
    "ClosedError",
    "Connection",
    "ConnectionEvent",
    "DisconnectedError",
    "ForkedError",
    "FullError",
    "HandlerError",
    "InternalError",
    "InvalidError",
    "NoRespondersError",
    "OfflineError",
    "PeerGoneError",
    "PresenceError",
    "PresenceEvent",
    "PresenceTimeoutError",
    "RemoteError",
    "Request",
    "ReservedError",
    "Sender",
    "Session",
    "Stream",
    "StreamCancelledError",
    "StreamStoppedError",
    "TooLargeError",
    "Watch",
    "aio",
    "client",
    "connect",
    "is_client_online",
    "mark_client_offline",
    "mark_client_online",
    "mark_clients_offline",
    "mark_clients_online",
    "metrics",
    "metrics_asgi",
    "metrics_wsgi",
    "online_count",
    "session",
    "watch",
]
