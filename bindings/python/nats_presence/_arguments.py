"""What callers give, as the library takes it. Everything here raises Invalid, which says what is wrong with what."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Union

from ._ffi import Error, lib
from .errors import Invalid, check_error

MAX_SECONDS = 316_224_000
"""Seconds: ten years."""

Payload = Union[bytes, bytearray, memoryview, str]
Option = Union[str, int, float, bool, "os.PathLike[str]", None]


def encode_text(name: str, value: object) -> bytes:
    """Text that the library takes up to a NUL. It is not shown: it may be a secret."""
    if not isinstance(value, str):
        raise Invalid(f"{name}: must be a str, not {type(value).__name__}")
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{name}: not UTF-8") from None
    if b"\0" in raw:
        raise Invalid(f"{name}: has a NUL")
    return raw


def option_text(value: Option) -> object:
    """An option's value as text; what can be none is left to encode_text() to refuse."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def encode_payload(data: Payload) -> bytes:
    """A message: bytes as they are, text as UTF-8."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if not isinstance(data, str):
        raise Invalid(f"payload {data!r:.80}: must be bytes, bytearray, memoryview or str")
    try:
        return data.encode()
    except UnicodeEncodeError:
        raise Invalid(f"payload {data!r:.80}: not UTF-8") from None


def check_integer(name: str, value: int, least: int, most: int) -> int:
    """A number within bounds."""
    if not isinstance(value, int) or not least <= value <= most:
        raise Invalid(f"{name} {value!r:.80}: must be an int from {least} to {most}")
    return value


def check_seconds(name: str, value: float) -> float:
    """A time; one that is longer than the library takes is cut to that."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise Invalid(f"{name} {value!r:.80}: must be a number of seconds, 0 or more")
    return min(value, MAX_SECONDS)


def to_milliseconds(name: str, value: float) -> int:
    """A time, rounded up."""
    return math.ceil(check_seconds(name, value) * 1000)


@contextmanager
def new_config(options: Mapping[str, Option]) -> Iterator[int]:
    """Options as a presence_config, which is freed afterwards. None leaves an option at its default."""
    handle: int = lib.presence_config_new()
    try:
        for key, value in options.items():
            if value is None:
                continue
            status = lib.presence_config_set(
                handle, encode_text("option", key), encode_text(f"option {key}", option_text(value))
            )
            if status:
                details = Error()
                lib.presence_config_error(handle, details)
                check_error(status, details)
        yield handle
    finally:
        lib.presence_config_free(handle)
