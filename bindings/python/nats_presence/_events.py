"""Reads events from a queue of the C library, a batch at a time: ctypes takes several times as long, field by field."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ctypes import byref, c_char, c_void_p
from struct import Struct
from typing import Any, NamedTuple

from . import _ffi
from ._ffi import lib
from .errors import check

EVENT_LAYOUT = Struct("iiQPPPNPNPNi12x")
"""The fields of a presence_event."""

MESSAGE_LAYOUT = Struct("i4xQ48xPN16x")
"""The fields of a presence_event that a message needs: kind, tag, and the address and size of the data."""

MEMORY: Any = (c_char * sys.maxsize).from_address(0)
"""The whole address space. A slice copies bytes, as ctypes.string_at does, in a third of the time."""


def new_queue() -> int:
    """Makes a presence_queue."""
    queue = c_void_p()
    check(lib.presence_queue_new(byref(queue)), "making a queue")
    return queue.value or 0


def queue_fd(queue: int) -> int:
    """Returns the queue's file descriptor, which is readable while events wait. The queue owns it."""
    fd: int = lib.presence_queue_fd(queue)
    check(min(fd, 0), "getting the queue's file descriptor")
    return fd


class Event(NamedTuple):
    """A presence_event. Its addresses are valid until the next wait or poll of the batch."""

    kind: int
    status: int
    tag: int
    sender: int
    stream: int
    client_address: int
    client_len: int
    subject_address: int
    subject_len: int
    data_address: int
    data_len: int
    error_code: int

    @property
    def client(self) -> str:
        return decode_text(self.client_address, self.client_len)

    @property
    def subject(self) -> str:
        return decode_text(self.subject_address, self.subject_len)

    @property
    def data(self) -> bytes:
        return copy_bytes(self.data_address, self.data_len)

    @property
    def text(self) -> str:
        return decode_text(self.data_address, self.data_len)


def copy_bytes(address: int, size: int) -> bytes:
    """Copies bytes from the library's memory."""
    data: bytes = MEMORY[address : address + size]
    return data


def decode_text(address: int, size: int) -> str:
    """Decodes UTF-8 in the library's memory."""
    return copy_bytes(address, size).decode(errors="replace")


class EventBatch:
    """The events that one wait or poll took. They are valid until the next one. An event of kind 0 is empty."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        """The number of events or, during a wait, an upper bound; the status if the wait failed (negative)."""
        self._capacity = capacity
        self._array = (_ffi.Event * capacity)()
        self._bytes = memoryview(self._array).cast("B")

    def wait(self, queue: int, timeout_ms: int) -> int:
        """Calls presence_queue_wait. Call clear() before."""
        # A signal handler that raises usually does so when the wait returns. Then the return value is lost; the events
        # are in the array, and the upper bound makes the caller look at all of it.
        self.count = self._capacity
        self.count = lib.presence_queue_wait(queue, self._array, self._capacity, timeout_ms)
        return self.count

    def poll(self, queue: int) -> int:
        """Takes the events that are there, without waiting."""
        self.clear()
        self.count = _ffi.fast_queue_wait(queue, self._array, self._capacity, 0)
        return self.count

    def message_fields(self) -> list[tuple[Any, ...]]:
        """Returns the fields of MESSAGE_LAYOUT of each event."""
        return list(MESSAGE_LAYOUT.iter_unpack(self._bytes[: self.count * EVENT_LAYOUT.size])) if self.count > 0 else []

    def __getitem__(self, index: int) -> Event:
        return Event._make(EVENT_LAYOUT.unpack_from(self._bytes, index * EVENT_LAYOUT.size))

    def __iter__(self) -> Iterator[Event]:
        return map(self.__getitem__, range(self.count))

    def clear(self) -> None:
        """Empties all events, so that those the next wait does not fill have kind 0."""
        size = max(self.count, 0) * EVENT_LAYOUT.size
        self._bytes[:size] = bytes(size)
        self.count = 0
