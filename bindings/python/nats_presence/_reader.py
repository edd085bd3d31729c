"""For threads: an iterator over what comes on a queue of its own. Nothing runs in between."""

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
from .errors import Busy, Timeout, check

T = TypeVar("T")

# Python handles signals (KeyboardInterrupt) between two waits only.
SLICE_MS = 100
BATCH = 256


def slice_ms(until: float | None) -> int:
    """How long one wait may take, rounded up: at most SLICE_MS."""
    return SLICE_MS if until is None else max(0, min(SLICE_MS, math.ceil((until - time.monotonic()) * 1000)))


class QueueReader(Generic[T]):
    """One thread at a time may wait.

    A signal's handler may raise anywhere. So what a wait took is made ready in one step, which can be done again from
    its beginning; only the item that is being handed over can be lost.

    An exception's traceback keeps the variables of the frames it passed. Ours are emptied before an exception leaves
    them: a stream that has no other reference is freed at once, however long the caller keeps the exception.
    """

    _queue: int | None = None

    def __init__(self) -> None:
        self._queue = new_queue()
        self._events = EventBatch(BATCH)
        self._ready: deque[T] = deque()
        self._has_pending_events = False
        """Whether a wait may have taken what is not ready yet."""
        # Its thread can take it again: it has kept it if a signal's handler raised just as it was taken.
        self._wait_lock = threading.RLock()

    def __del__(self) -> None:
        # Only here: until now a thread could be waiting, or reading what the queue gave.
        lib.presence_queue_free(self._queue)

    def __iter__(self) -> Iterator[T]:
        # For a loop: to resume a generator costs half of a call of __next__.
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
        """The next item, or StopIteration. `until`: when to raise Timeout, in the clock of time.monotonic()."""
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
                        self._before_wait()  # The end may have come at last.
                        raise Timeout("no message came in time; the stream goes on")
                return self._ready.popleft()
            finally:
                self._wait_lock.release()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            del self

    def _raise_busy(self) -> NoReturn:
        # Without room for an event it only looks whether this is a child.
        if lib.presence_queue_wait(self._queue, None, 0, 0) == _ffi.FORKED:
            check(_ffi.FORKED, type(self).__name__.lower())
        raise Busy("another thread waits for the next of this iterator")

    def _before_wait(self) -> None:
        """All that was ready is read. Raises what the iterator ends with, if it has ended."""
        raise NotImplementedError

    def _take_items(self, events: EventBatch) -> deque[T]:
        """What they give. Twice is the same as once."""
        raise NotImplementedError
