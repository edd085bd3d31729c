"""Sends many messages with one call of the C library: most of the cost of a send is the call."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ._arguments import Payload, encode_payload
from ._ffi import SIZE_ARGUMENTS, fast_send_many

MAX_MESSAGES = 1024
MAX_BYTES = 1 << 18


class MessageBatches:
    """A sequence of messages, sent in batches. It is true while messages are left."""

    def __init__(self, messages: Sequence[Payload]) -> None:
        """Raises InvalidError if one of them is not a message."""
        copied: list[Any] = list(messages)  # The caller may change its list while messages are being sent.
        all_bytes = set(map(type, copied)) <= {bytes}
        self._messages: list[bytes] = copied if all_bytes else list(map(encode_payload, copied))
        self._ends = [0, *accumulate(map(len, self._messages))]
        self._next = 0

    def __bool__(self) -> bool:
        return self._next < len(self._messages)

    def send(self, sender: object) -> bool:
        """Sends as much of the next batch as the sender takes without waiting. Returns False if that was nothing.

        `sender` is a handle_argument.
        """
        last = bisect_right(self._ends, self._ends[self._next] + MAX_BYTES) - 1
        batch = self._messages[self._next : max(self._next + 1, min(last, self._next + MAX_MESSAGES))]
        lengths = array("L", map(len, batch)).tobytes()  # As an array of size_t.
        sent: int = fast_send_many(sender, b"".join(batch), lengths, SIZE_ARGUMENTS[len(batch)])
        self._next += max(sent, 0)
        return sent > 0

    def pop(self) -> bytes:
        """Removes the next message, for the caller to send by itself."""
        self._next += 1
        return self._messages[self._next - 1]
