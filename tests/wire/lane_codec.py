"""Lane messages as docs/wire.md describes them, encoded and decoded without any of our code."""

from __future__ import annotations

import struct
from typing import NamedTuple

VERSION = 1
PING, PONG, GAP, RESET, NEW = 1, 2, 4, 8, 16
ACCEPT, DATA, END, ERROR, CANCEL, CREDIT, CODE, WINDOW = range(1, 9)
HEADER = 30
OVERHEAD = 64
"""What each message counts in its stream's window, in addition to its bytes."""


class Frame(NamedTuple):
    kind: int
    stream: int
    body: bytes = b""


class LaneMessage(NamedTuple):
    flags: int
    sequence: int
    ack: int
    frames: tuple[Frame, ...] = ()
    ping: int = 0
    pong: int = 0
    server: int = 0

    def plain(self) -> LaneMessage:
        """A lane message without the numbers of PING and PONG, and without the server."""
        return self._replace(ping=0, pong=0, server=0)


def encode(message: LaneMessage) -> bytes:
    header = struct.pack("<BBQQIII", VERSION, *message[:3], *message[4:])
    return header + b"".join(encode_frame(frame) for frame in message.frames)


def server_number(server_id: str) -> int:
    """A nats-server in the header: FNV-1a of its id."""
    number = 0x811C9DC5
    for byte in server_id.encode():
        number = (number ^ byte) * 0x01000193 % 2**32
    return number


def encode_frame(frame: Frame) -> bytes:
    return bytes([frame.kind]) + encode_number(frame.stream) + encode_number(len(frame.body)) + frame.body


def encode_number(number: int) -> bytes:
    digits = bytearray()
    while number >= 128:
        digits.append(number % 128 + 128)
        number //= 128
    digits.append(number)
    return bytes(digits)


def decode(payload: bytes) -> LaneMessage:
    """Decodes strictly: anything the document does not allow is a ValueError."""
    if len(payload) < HEADER:
        raise ValueError(f"{len(payload)} bytes are no header")
    version, flags, sequence, ack, ping, pong, server = struct.unpack_from("<BBQQIII", payload)
    if version != VERSION or flags >= 32 or bool(flags & PING) != bool(ping) or bool(flags & PONG) != bool(pong):
        raise ValueError(f"version {version}, flags {flags}, PING {ping}, PONG {pong}")
    frames = []
    at = HEADER
    while at < len(payload):
        kind = payload[at]
        stream, at = decode_number(payload, at + 1)
        length, at = decode_number(payload, at)
        if not ACCEPT <= kind <= WINDOW or stream == 0 or at + length > len(payload):
            raise ValueError(f"kind {kind}, stream {stream}, {length} bytes of {len(payload) - at}")
        frames.append(Frame(kind, stream, payload[at : at + length]))
        at += length
    return LaneMessage(flags, sequence, ack, tuple(frames), ping, pong, server)


def decode_number(payload: bytes, at: int) -> tuple[int, int]:
    """Returns the number that begins at this place, and the place after it."""
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(payload):
            raise ValueError("a number is cut off")
        number |= payload[at] % 128 << shift
        at += 1
        if payload[at - 1] < 128:
            return number, at
    raise ValueError("a number is too long")


def u64(number: int) -> bytes:
    """The body of ACCEPT, CREDIT and WINDOW."""
    return struct.pack("<Q", number)


def from_u64(body: bytes) -> int:
    number: int = struct.unpack("<Q", body)[0]
    return number


def accept(stream: int, key: int) -> Frame:
    return Frame(ACCEPT, stream, u64(key))


def data(stream: int, body: bytes) -> Frame:
    return Frame(DATA, stream, body)


def end(stream: int) -> Frame:
    return Frame(END, stream)


def error(stream: int, text: bytes) -> Frame:
    return Frame(ERROR, stream, text)


def code(stream: int, number: int) -> Frame:
    return Frame(CODE, stream, struct.pack("<I", number))


def cancel(stream: int, reason: int) -> Frame:
    return Frame(CANCEL, stream, bytes([reason]))


def credit(stream: int, weight: int) -> Frame:
    return Frame(CREDIT, stream, u64(weight))


def enlarged(stream: int, window: int) -> Frame:
    return Frame(WINDOW, stream, u64(window))
