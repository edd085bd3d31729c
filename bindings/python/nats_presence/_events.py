"""Events as they leave a queue of the library. They are read as a whole: ctypes, field by field, costs a multiple."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ctypes import byref, c_char, c_void_p
from struct import Struct
from typing import Any, NamedTuple

from . import _ffi
from ._ffi import lib
from .errors import check

EVENT_LAYOUT = Struct("iiQPPPNPNPN16x")
"""A presence_event."""

MESSAGE_LAYOUT = Struct("i4xQ48xPN16x")
"""What of it is read of each: kind, tag, and address and size of the data."""

MEMORY: Any = (c_char * sys.maxsize).from_address(0)
"""All there is; a slice is a copy of it, as string_at's, but at a third of its price."""


def new_queue() -> int:
    """A presence_queue."""
    queue = c_void_p()
    check(lib.presence_queue_new(byref(queue)), "making a queue")
    return queue.value or 0


class Event(NamedTuple):
    """A presence_event, for those that are not read by the thousand. Valid until the next wait."""

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
    """Bytes in the library's memory."""
    data: bytes = MEMORY[address : address + size]
    return data


def decode_text(address: int, size: int) -> str:
    """Text in the library's memory."""
    return copy_bytes(address, size).decode(errors="replace")


class EventBatch:
    """What one wait takes; valid until the next. Kind 0 is none."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        """How many there are, at most; or the negative status that the wait returned."""
        self._capacity = capacity
        self._array = (_ffi.Event * capacity)()
        self._bytes = memoryview(self._array).cast("B")

    def wait(self, queue: int, timeout_ms: int) -> int:
        """As presence_queue_wait, after clear()."""
        # Where a signal's handler raises, as a rule when the wait returns, its result is lost, but not what it took.
        self.count = self._capacity
        self.count = lib.presence_queue_wait(queue, self._array, self._capacity, timeout_ms)
        return self.count

    def poll(self, queue: int) -> int:
        """As wait, without waiting."""
        self.clear()
        self.count = _ffi.fast_queue_wait(queue, self._array, self._capacity, 0)
        return self.count

    def message_fields(self) -> list[tuple[Any, ...]]:
        """MESSAGE_LAYOUT's fields of each."""
        return list(MESSAGE_LAYOUT.iter_unpack(self._bytes[: self.count * EVENT_LAYOUT.size])) if self.count > 0 else []

    def __getitem__(self, index: int) -> Event:
        return Event._make(EVENT_LAYOUT.unpack_from(self._bytes, index * EVENT_LAYOUT.size))

    def __iter__(self) -> Iterator[Event]:
        return map(self.__getitem__, range(self.count))

    def clear(self) -> None:
        """Has no kind be other than 0 but of what the next wait takes."""
        size = max(self.count, 0) * EVENT_LAYOUT.size
        self._bytes[:size] = bytes(size)
        self.count = 0
