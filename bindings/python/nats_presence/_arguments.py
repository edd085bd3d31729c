"""Converts the arguments of callers to what the C library takes.

A wrong argument raises InvalidError, with the name of the argument and, unless it may be a secret, its value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Union

from ._ffi import Error, lib
from .errors import InvalidError, check_error

MAX_SECONDS = 316_224_000
"""Ten years."""

Payload = Union[bytes, bytearray, memoryview, str]
Option = Union[str, int, float, bool, "os.PathLike[str]", None]


def encode_text(name: str, value: object) -> bytes:
    """Encodes a NUL-terminated string. No message shows the value, because it may be a secret."""
    if not isinstance(value, str):
        raise InvalidError(f"{name}: must be a str, not {type(value).__name__}")
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raise InvalidError(f"{name}: cannot be encoded as UTF-8") from None
    if b"\0" in raw:
        raise InvalidError(f"{name}: contains a NUL character")
    return raw


def option_text(value: Option) -> object:
    """Converts an option's value to a str. Returns a value of any other type unchanged, for encode_text to refuse."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def encode_payload(data: Payload) -> bytes:
    """Returns the bytes of a message; encodes a str as UTF-8."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if not isinstance(data, str):
        raise InvalidError(f"payload {data!r:.80}: must be bytes, bytearray, memoryview or str")
    try:
        return data.encode()
    except UnicodeEncodeError:
        raise InvalidError(f"payload {data!r:.80}: cannot be encoded as UTF-8") from None


def check_integer(name: str, value: int, least: int, most: int) -> int:
    """Returns `value` if it is an int from `least` to `most`."""
    if not isinstance(value, int) or not least <= value <= most:
        raise InvalidError(f"{name} {value!r:.80}: must be an int from {least} to {most}")
    return value


def check_seconds(name: str, value: float) -> float:
    """Returns a duration in seconds, at most MAX_SECONDS."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InvalidError(f"{name} {value!r:.80}: must be a number of seconds, 0 or more")
    return min(value, MAX_SECONDS)


def to_milliseconds(name: str, value: float) -> int:
    """Converts a duration in seconds to milliseconds, rounded up."""
    return math.ceil(check_seconds(name, value) * 1000)


@contextmanager
def new_config(options: Mapping[str, Option]) -> Iterator[int]:
    """Makes a presence_config from options, and frees it afterwards. None leaves an option at its default."""
    handle: int = lib.presence_config_new()
    try:
        for key, value in options.items():
            if value is None:
                continue
            name, text = encode_text("option", key), encode_text(f"option {key}", option_text(value))
            status = lib.presence_config_set(handle, name, text)
            if status:
                details = Error()
                lib.presence_config_error(handle, details)
                check_error(status, details)
        yield handle
    finally:
        lib.presence_config_free(handle)
