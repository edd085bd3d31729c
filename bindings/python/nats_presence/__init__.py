"""Stop work for clients who have left: presence and streams over NATS.

A *worker* serves requests for streams, a *gateway* requests them for its *clients*. Once a client has left its gateway,
the worker's *sender* refuses to send, at once: it raises `StreamStopped`.

- Presence, in this process: mark_client_online, mark_client_offline, is_client_online, online_count, session, watch.
- With threads: connect() gives a Connection, whose service() is the worker's side and stream() the gateway's.
- With asyncio: the same below nats_presence.aio.
- Errors: one exception for each status, all below PresenceError. Those that mean that nobody reads a stream any
  longer are below StreamStopped.

Times are seconds; only the names of options that end with _ms say milliseconds.
"""

from . import aio
from ._shared import ConnectionEvent, PresenceEvent, Request
from .connection import Connection, Sender, Stream, connect
from .errors import (
    Busy,
    Cancelled,
    Closed,
    Disconnected,
    Forked,
    Full,
    Internal,
    Invalid,
    NoResponders,
    Offline,
    PeerGone,
    PresenceError,
    Remote,
    Reserved,
    StreamStopped,
    Timeout,
    TooLarge,
)
from .presence import Session, is_client_online, mark_client_offline, mark_client_online, online_count, session
from .watch import Watch, watch

__version__ = "0.1.0"

__all__ = [
    "Busy",
    "Cancelled",
    "Closed",
    "Connection",
    "ConnectionEvent",
    "Disconnected",
    "Forked",
    "Full",
    "Internal",
    "Invalid",
    "NoResponders",
    "Offline",
    "PeerGone",
    "PresenceError",
    "PresenceEvent",
    "Remote",
    "Request",
    "Reserved",
    "Sender",
    "Session",
    "Stream",
    "StreamStopped",
    "Timeout",
    "TooLarge",
    "Watch",
    "aio",
    "connect",
    "is_client_online",
    "mark_client_offline",
    "mark_client_online",
    "online_count",
    "session",
    "watch",
]
