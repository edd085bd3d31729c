"""Events as they leave a queue of the library. They are read as a whole: ctypes, field by field, costs a multiple."""

from __future__ import annotations

import sys
from ctypes import byref, c_char, c_void_p
from itertools import takewhile
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple

from . import _ffi
from ._ffi import lib
from .errors import check

FIELDS = Struct("iiQPPPNPNPN16x")
"""A presence_event."""

MEMORY: Any = (c_char * sys.maxsize).from_address(0)
"""All there is; a slice is a copy of it, as string_at's, but at a third of its price."""

KIND, TAG, DATA, DATA_LEN = 0, 2, 9, 10
"""Where these stand among the fields."""

_kind = itemgetter(KIND)


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
    client_at: int
    client_len: int
    subject_at: int
    subject_len: int
    data_at: int
    data_len: int

    @property
    def client(self) -> str:
        return decode(self.client_at, self.client_len)

    @property
    def subject(self) -> str:
        return decode(self.subject_at, self.subject_len)

    @property
    def data(self) -> bytes:
        return copy(self.data_at, self.data_len)

    @property
    def text(self) -> str:
        return decode(self.data_at, self.data_len)


def copy(address: int, size: int) -> bytes:
    """Bytes in the library's memory."""
    data: bytes = MEMORY[address : address + size]
    return data


def decode(address: int, size: int) -> str:
    """Text in the library's memory."""
    return copy(address, size).decode(errors="replace")


class Events:
    """Room for what one wait takes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._array = (_ffi.Event * most)()
        self._bytes = memoryview(self._array).cast("B")

    def wait(self, queue: int, timeout_ms: int) -> int:
        """As presence_queue_wait."""
        return int(lib.presence_queue_wait(queue, self._array, self._most, timeout_ms))

    def poll(self, queue: int) -> int:
        """As wait, without waiting."""
        return int(_ffi.queue_wait_now(queue, self._array, self._most, 0))

    def take(self) -> list[tuple[Any, ...]]:
        """What the last wait took: the fields of each event, valid until the next.

        It does not need the wait's result, which is lost when a signal's handler raises as the wait returns: that has
        no 0 among the kinds, and here they are made 0 again.
        """
        taken = list(takewhile(_kind, FIELDS.iter_unpack(self._bytes)))
        size = len(taken) * FIELDS.size
        self._bytes[:size] = bytes(size)
        return taken
