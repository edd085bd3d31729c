"""Reads server-sent events as a browser's EventSource does."""

from __future__ import annotations

import re
from typing import NamedTuple


class Received(NamedTuple):
    name: str
    data: str


def parse(stream: bytes) -> list[Received]:
    """Returns the events that EventSource dispatches (HTML Standard, 9.2.6, Interpreting an event stream)."""
    events: list[Received] = []
    name, data = "", ""
    text = stream.decode(errors="replace").removeprefix("\ufeff")
    *lines, _ = re.split("\r\n|\r|\n", text)  # What follows the last line end is incomplete.
    for line in lines:
        if not line:
            if data:
                events.append(Received(name or "message", data.removesuffix("\n")))
            name, data = "", ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value + "\n"
    return events


def normalised(message: bytes) -> str:
    """Returns a message as EventSource shows it."""
    return re.sub("\r\n|\r", "\n", message.decode(errors="replace"))
