"""Shared by both peers in Python: soak.h in Python."""

from __future__ import annotations

import ctypes
import gc
import json
import struct
import sys
from collections.abc import Sequence
from typing import Protocol

import nats_presence as presence

HEAD = struct.Struct("<QQ")
LARGEST, SHIFTS = 1 << 16, 4096
MASK = (1 << 64) - 1


def scramble(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


TABLE = b"".join(scramble(i).to_bytes(8, "little") for i in range((LARGEST + SHIFTS) // 8))


def content(key: int, number: int, size: int) -> bytes:
    """Message `number` of the stream with this key: both, then bytes derived from them."""
    at = (key + number) % SHIFTS
    return HEAD.pack(key, number) + TABLE[at : at + size - HEAD.size]


def connection_options(text: str, level: int) -> dict[str, str]:
    """The options "KEY=VALUE,..." of the connection with lanes (0), or on level 0 (1), which does not announce."""
    options = dict(option.split("=") for option in text.split(","))
    return options | {"lanes": "false", "announce": "never"} if level else options


class Mallinfo(ctypes.Structure):
    """malloc's own statistics."""

    _fields_ = (
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("between", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("behind", ctypes.c_size_t * 2),
    )


libc = ctypes.CDLL(None)
mallinfo2 = libc.mallinfo2
mallinfo2.restype = Mallinfo


class Connection(Protocol):
    def stats(self) -> dict[str, int]: ...


def emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def tell_stats(event: str, conns: Sequence[Connection], **more: int) -> None:
    """Prints statistics, with the bytes of C's heap in use, as an event of this name."""
    both = [conn.stats() for conn in conns]
    sums = {
        name: sum(stats[name] for stats in both) for name in ("connected", "connects", "streams", "senders", "lanes")
    }
    waiting = sum(stats["bytes_waiting"] for stats in both)
    heap = mallinfo2()
    emit(event=event, heap=heap.uordblks + heap.hblkhd, online=presence.online_count(), waiting=waiting, **sums, **more)


def give_back() -> None:
    """Returns unused memory to the system."""
    gc.collect()
    libc.malloc_trim(0)
