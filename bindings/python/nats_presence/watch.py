"""What becomes of the clients of this process, for threads. No connection is needed."""

from __future__ import annotations

from collections import deque

from . import _ffi
from ._events import EventBatch
from ._ffi import lib
from ._reader import QueueReader
from ._shared import PresenceEvent, to_presence_event
from .errors import PresenceError, check, error


class Watch(QueueReader[PresenceEvent]):
    """Clients that come online and go offline in this process from now on, as an iterator of PresenceEvent.

    It ends with close(), which may be called from any thread. One thread at a time may wait for an event: Busy.
    When 65,536 events wait for it further ones are dropped: it raises Full once, behind those that waited, and goes on.
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
        ready: deque[PresenceEvent] = deque()
        for event in events:
            if event.kind == _ffi.EVENT_LOG:
                self._failure = error(event.status, event.text)
            elif (told := to_presence_event(event)) is not None:
                ready.append(told)
        return ready

    def close(self) -> None:
        """Ends it; once more has no effect."""
        self._closed = True
        lib.presence_queue_wake(self._queue)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def watch() -> Watch:
    """Watches presence in this process, to be closed by `with` or close()."""
    return Watch()
