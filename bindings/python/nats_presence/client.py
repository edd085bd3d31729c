"""The clients of a gateway, for requests that may come late. The same for threads and for asyncio."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Protocol, TypeVar

from ._arguments import Option, Payload
from ._ffi import lib
from ._shared import BaseStream
from .errors import OfflineError
from .presence import Session

StreamT = TypeVar("StreamT", bound=BaseStream, covariant=True)


class _Connection(Protocol[StreamT]):
    """Either kind of connection."""

    def stream(
        self,
        subject: str,
        data: Payload = ...,
        *,
        client_id: str = ...,
        timeout: float | None = ...,
        headers: Mapping[str, Option] | None = ...,
        **options: Option,
    ) -> StreamT: ...


class Client(Session):
    """A session with the streams that are requested through it. Every method may be called from any thread, except that
    a request on an asyncio connection is made in its loop.

    Once the client was closed or marked offline, its stream() raises OfflineError, so that a late request cannot bring
    the id back online. It remains offline even if another client with the same id comes online.
    Closing it ends the streams that were requested through it, with OfflineError, and no others, unless it was the
    client's last session in this process: see Session. A stream keeps its client: the client is dropped when neither
    you nor a stream refers to it.
    """

    def __init__(self, client_id: str) -> None:
        self._streams: weakref.WeakValueDictionary[int, BaseStream] = weakref.WeakValueDictionary()
        super().__init__(client_id)

    @property
    def online(self) -> bool:
        """Whether the client was neither closed nor marked offline, here or by another process."""
        return bool(lib.presence_session_is_open(self._handle))

    def stream(
        self,
        conn: _Connection[StreamT],
        subject: str,
        data: Payload = b"",
        *,
        timeout: float | None = None,
        headers: Mapping[str, Option] | None = None,
        **options: Option,
    ) -> StreamT:
        """Requests a stream as conn.stream() does, for this client. `conn` is a connection of either kind.

        Raises OfflineError once the client was closed or marked offline, and what conn.stream() raises. The stream ends
        with OfflineError when the client is closed or marked offline.
        """
        self._check_online()
        options["only_online"] = True
        stream = conn.stream(subject, data, client_id=self.client_id, timeout=timeout, headers=headers, **options)
        stream._client = self
        self._streams[id(stream)] = stream
        try:
            # If the session is open now, it was open when the request was made: it does not open again.
            self._check_online()
        except OfflineError:
            stream.cancel()
            raise
        return stream

    def close(self) -> None:
        """Closes the client and ends the streams that were requested through it. A second call has no effect."""
        super().close()
        # Not before: a thread that is just requesting a stream finds the client offline, or its stream is found here.
        for reference in self._streams.valuerefs():
            if (stream := reference()) is not None:
                stream.cancel()

    def _check_online(self) -> None:
        if not self.online:
            raise self._offline_error()

    def _offline_error(self) -> OfflineError:
        return OfflineError(f"client {self.client_id!r} is offline: it was closed or marked offline")


def client(client_id: str) -> Client:
    """Opens a client. Close it with `with`, `async with` or close(). Raises InvalidError.

    The empty id stands for no client, which is online until it is closed.
    """
    return Client(client_id)
