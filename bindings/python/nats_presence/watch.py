"""Watches clients coming online and going offline in this process, for threads. No connection is needed."""

from __future__ import annotations

from collections import deque

from ._events import EventBatch
from ._ffi import lib
from ._reader import QueueReader
from ._shared import PresenceEvent, to_presence_events
from .errors import PresenceError, check


class Watch(QueueReader[PresenceEvent]):
    """An iterator of PresenceEvent: the clients that come online and go offline in this process from now on.

    It ends with close(), which may be called from any thread. Only one thread at a time may wait for an event; another
    one gets BusyError. Up to 65,536 unread events are kept and further ones are dropped: the iterator raises FullError
    once, after the kept events, and then goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._closed = False
        self._failure: PresenceError | None = None
        check(lib.presence_watch(self._queue, 0), "watching presence")

    def _before_wait(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._closed:
            raise StopIteration

    def _take_items(self, events: EventBatch) -> deque[PresenceEvent]:
        items, self._failure = to_presence_events(events)
        return items

    def close(self) -> None:
        """Ends the iterator. A second call has no effect."""
        self._closed = True
        lib.presence_queue_wake(self._queue)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def watch() -> Watch:
    """Watches presence in this process. Close the Watch with `with` or close()."""
    return Watch()
