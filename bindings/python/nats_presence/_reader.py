"""For threads: an iterator over the events of a queue of its own. No other thread is involved."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Generic, NoReturn, TypeVar

from . import _ffi
from ._events import EventBatch, new_queue
from ._ffi import lib
from .errors import BusyError, PresenceTimeoutError, check

T = TypeVar("T")

# Python handles signals (KeyboardInterrupt) only between two waits.
SLICE_MS = 100
BATCH = 256


def slice_ms(until: float | None) -> int:
    """Returns the milliseconds that one wait may take, rounded up and at most SLICE_MS."""
    return SLICE_MS if until is None else max(0, min(SLICE_MS, math.ceil((until - time.monotonic()) * 1000)))


class QueueReader(Generic[T]):
    """The iterator. One thread at a time may wait for an item.

    A signal handler may raise anywhere. So the events that a wait took are converted to items in one step, which can be
    repeated from its start. Only the item that is just being returned can be lost.

    An exception's traceback keeps the local variables of the frames it passed. The frames of this class drop theirs
    before an exception leaves them: a stream without other references is freed at once, however long the caller keeps
    the exception.
    """

    _queue: int | None = None

    def __init__(self) -> None:
        self._queue = new_queue()
        self._events = EventBatch(BATCH)
        self._ready: deque[T] = deque()
        self._has_pending_events = False
        """Whether `_events` may hold events that are not converted to items yet."""
        # Reentrant: if a signal handler raises just as the thread acquires it, the thread has it for good.
        self._wait_lock = threading.RLock()

    def __del__(self) -> None:
        # Not before: a thread could be waiting, or reading events of the queue.
        lib.presence_queue_free(self._queue)

    def __iter__(self) -> Iterator[T]:
        # A generator for loops: to resume it costs half as much as a call of __next__.
        try:
            while True:
                try:
                    item: T | None = self._ready.popleft()
                except IndexError:
                    item = None
                if item is None:
                    try:
                        item = self._wait()
                    except StopIteration:
                        return
                yield item
        finally:
            del self

    def __next__(self) -> T:
        try:
            try:
                return self._ready.popleft()
            except IndexError:
                pass
            return self._wait()
        finally:
            del self

    def _wait(self, until: float | None = None) -> T:
        """Returns the next item, or raises StopIteration. `until`, a time of time.monotonic(), ends the wait with
        PresenceTimeoutError.
        """
        try:
            if not self._wait_lock.acquire(blocking=False):
                self._raise_busy()
            try:
                while not self._ready:
                    if not self._has_pending_events:
                        self._before_wait()
                        self._events.clear()
                        self._has_pending_events = True
                        check(min(self._events.wait(self._queue or 0, slice_ms(until)), 0), type(self).__name__.lower())
                    self._ready, self._has_pending_events = self._take_items(self._events), False
                    if not self._ready and until is not None and time.monotonic() >= until:
                        self._before_wait()  # The last events may have been the end.
                        raise PresenceTimeoutError("no message arrived within the timeout; the stream goes on")
                return self._ready.popleft()
            finally:
                self._wait_lock.release()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            del self

    def _raise_busy(self) -> NoReturn:
        # With no space for events, the wait only checks whether this process is a forked child.
        if lib.presence_queue_wait(self._queue, None, 0, 0) == _ffi.FORKED:
            check(_ffi.FORKED, type(self).__name__.lower())
        raise BusyError("another thread is waiting for the next item of this iterator")

    def _before_wait(self) -> None:
        """Called when all items have been read. Raises StopIteration or the failure if the iterator has ended."""
        raise NotImplementedError

    def _take_items(self, events: EventBatch) -> deque[T]:
        """Converts events to items. A second call with the same events has the same result."""
        raise NotImplementedError
