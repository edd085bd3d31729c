"""For threads: an iterator over what comes on a queue of its own. Nothing runs in between."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Generic, NoReturn, TypeVar

from . import _ffi
from ._events import Events, new_queue
from ._ffi import lib
from .errors import Busy, check

T = TypeVar("T")
R = TypeVar("R", bound="QueueReader[Any]")

# Python handles signals (KeyboardInterrupt) between two waits only.
SLICE_MS = 100
BATCH = 128


class QueueReader(Generic[T]):
    """One thread at a time may wait."""

    _queue: int | None = None

    def __init__(self) -> None:
        self._queue = new_queue()
        self._events = Events(BATCH)
        self._ready: deque[T] = deque()
        self._waiting = threading.Lock()

    def __del__(self) -> None:
        # Only here: until now a thread could be waiting, or reading what the queue gave.
        lib.presence_queue_free(self._queue)

    def __iter__(self: R) -> R:
        return self

    def __next__(self) -> T:
        try:
            return self._ready.popleft()
        except IndexError:
            pass
        if not self._waiting.acquire(blocking=False):
            self._refuse()
        try:
            while not self._ready:
                self._before_wait()
                try:
                    count = self._events.wait(self._queue or 0, SLICE_MS)
                finally:
                    # Even if a signal's handler raises: as a rule it does so when the wait returns, with what it took.
                    self._on_events(self._events.take())
                check(min(count, 0), type(self).__name__.lower())
            return self._ready.popleft()
        finally:
            self._waiting.release()

    def _refuse(self) -> NoReturn:
        # Without room for an event it only looks whether this is a child.
        if lib.presence_queue_wait(self._queue, None, 0, 0) == _ffi.FORKED:
            check(_ffi.FORKED, type(self).__name__.lower())
        raise Busy("another thread waits for the next of this iterator")

    def _before_wait(self) -> None:
        """All that was ready is read. Raises what the iterator ends with, if it has ended."""
        raise NotImplementedError

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        """Makes what they tell ready."""
        raise NotImplementedError
