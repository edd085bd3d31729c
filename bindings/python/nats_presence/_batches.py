"""Many messages at once: what costs is the call, not the message."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ._arguments import Payload, encode_payload
from ._ffi import SIZE_ARGUMENTS, fast_send_many

MESSAGES = 1024
BYTES = 1 << 18


class MessageBatches:
    """Messages to be sent; true as long as there are any."""

    def __init__(self, messages: Sequence[Payload]) -> None:
        """Raises Invalid."""
        own: list[Any] = list(messages)  # While some are sent the caller's may change.
        self._messages: list[bytes] = own if set(map(type, own)) <= {bytes} else list(map(encode_payload, own))
        self._ends = [0, *accumulate(map(len, self._messages))]
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._messages)

    def send(self, sender: object) -> bool:
        """Sends what there is room for, at most a block; whether it was any. `sender`: as untyped calls take it."""
        last = bisect_right(self._ends, self._ends[self._at] + BYTES) - 1
        block = self._messages[self._at : max(self._at + 1, min(last, self._at + MESSAGES))]
        lengths = array("L", map(len, block)).tobytes()  # Of size_t.
        sent: int = fast_send_many(sender, b"".join(block), lengths, SIZE_ARGUMENTS[len(block)])
        self._at += max(sent, 0)
        return sent > 0

    def pop(self) -> bytes:
        """The next, to be sent by itself."""
        self._at += 1
        return self._messages[self._at - 1]
