"""Which clients are online in this process. Every function may be called from any thread. None of them blocks."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import byref, c_size_t, c_void_p
from typing import TypeVar

from ._ffi import INVALID, Error, lib
from .errors import InvalidError, check, check_error

_RULE = "a client id must be a str of 1 to 1024 bytes of UTF-8 without control characters"


def encode_id(client_id: str) -> bytes:
    """Encodes a client id. The library checks its length and characters."""
    if not isinstance(client_id, str):
        raise InvalidError(f"client id {client_id!r:.80}: {_RULE}")
    try:
        return client_id.encode()
    except UnicodeEncodeError:
        raise InvalidError(f"client id {client_id!r:.80}: {_RULE}") from None


def _check(status: int, client_id: str) -> None:
    if status == INVALID:
        raise InvalidError(f"client id {client_id!r:.80}: {_RULE}")
    check(status, f"client {client_id!r}")


def mark_client_online(client_id: str) -> None:
    """Marks a client online in this process, until mark_client_offline is called here or another process announces it.

    A second call has no effect, nor has the empty id. Raises InvalidError.
    """
    raw = encode_id(client_id)
    _check(lib.presence_mark_online(raw, len(raw)), client_id)


def mark_client_offline(client_id: str) -> None:
    """Marks a client offline, and announces it to other processes on every open connection.

    When this returns, the client's senders and streams in this process are stopped and its sessions have ended. The
    empty id has no effect. Raises InvalidError.
    """
    raw = encode_id(client_id)
    _check(lib.presence_mark_offline(raw, len(raw)), client_id)


def mark_clients_online(client_ids: Iterable[str]) -> None:
    """Marks many clients online, each as mark_client_online does, in less time for each.

    The order in which different clients are marked is not defined. Raises InvalidError if an id is invalid. The message
    says which one, counted from 0, and no client was marked.
    """
    _mark_many(True, client_ids)


def mark_clients_offline(client_ids: Iterable[str]) -> None:
    """Marks many clients offline, each as mark_client_offline does, in less time for each.

    The order in which different clients are marked is not defined. Raises InvalidError if an id is invalid. The message
    says which one, counted from 0, and no client was marked.
    """
    _mark_many(False, client_ids)


def _mark_many(online: bool, client_ids: Iterable[str]) -> None:
    if isinstance(client_ids, str):
        raise InvalidError(f"client_ids is the str {client_ids!r:.80}: pass a list of client ids")
    raw = [encode_id(client_id) for client_id in client_ids]
    lengths = (c_size_t * len(raw))(*map(len, raw))
    details = Error()
    check_error(lib.presence_mark_many(online, b"".join(raw), lengths, len(raw), byref(details)), details)


def is_client_online(client_id: str) -> bool:
    """Returns whether a client is marked online, or has a session or a running stream, in this process.

    The empty id is always online. An unknown or invalid id is not.
    """
    try:
        raw = encode_id(client_id)
    except InvalidError:
        return False
    return bool(lib.presence_is_online(raw, len(raw)))


def online_count() -> int:
    """Returns the number of clients that are online in this process."""
    return int(lib.presence_online_count())


S = TypeVar("S", bound="Session")


class Session:
    """A connection of a client to this process, such as a browser tab. The client is online while a session is open.

    When the client's last session in this process is closed, the streams that this process requested for the client end
    with OfflineError, unless the client is also marked online. That happens at once, or after the option
    `session_grace_ms` of connect(). Streams that other processes requested continue; mark_client_offline ends those as
    well. However, a worker on level 0 can be stopped only by announcing the client offline to all processes: if one of
    the streams that end here is on level 0, the client's streams at all other gateways end, too.
    Dropping the last reference to a session closes it.
    """

    _handle: c_void_p | None = None

    def __init__(self, client_id: str) -> None:
        raw = encode_id(client_id)
        self._handle = (
            c_void_p()
        )  # Before the call that opens the session: a signal handler may raise when that returns.
        _check(lib.presence_session_open(raw, len(raw), byref(self._handle)), client_id)
        self.client_id = client_id

    def close(self) -> None:
        """Closes the session. A second call has no effect."""
        handle, self._handle = self._handle, None
        lib.presence_session_close(handle)

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self: S) -> S:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def session(client_id: str) -> Session:
    """Opens a session of a client. Close it with `with`, `async with` or close(). Raises InvalidError.

    A session of the empty id has no effect.
    """
    return Session(client_id)
