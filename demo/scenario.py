"""Runs the demo: collects the events of the programs for each stream, and prints them as a timeline."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from programs import DemoError, Event, Program

TIMEOUT = 20.0
"""Seconds that the demo waits for an event. It usually occurs within milliseconds."""
OFFLINE = -2
"""The status of a sender whose client has left, in all languages."""


@dataclass
class Stream:
    """A stream, with the events of its worker and its gateway."""

    name: str
    client: str
    gateway: Program
    worker: Program | None = None
    started_at: int = 0
    """When the worker started. Times are in nanoseconds."""
    received: list[str] = field(default_factory=list)
    left_from: Program | None = None
    """The gateway from which the client left; None if it stayed."""
    left_at: int = 0
    done: Event = field(default_factory=dict)
    """The worker's event when it finished or stopped."""
    late: Event = field(default_factory=dict)
    """The worker's event of one more send, long after it was stopped."""
    ended: Event = field(default_factory=dict)
    """The gateway's event at the end of the stream."""
    received_after_end: int = 0
    """The number of messages that the gateway received after that. It has to be 0."""

    @property
    def stopped_after_us(self) -> float:
        """How long the worker continued after its client had left."""
        return float(self.done["at"] - self.left_at) / 1000

    @property
    def is_over(self) -> bool:
        is_stopped = self.done.get("status") == OFFLINE
        return bool(self.done and self.ended and (self.late or not is_stopped))


class Scenario:
    """The running programs, and the streams between them."""

    def __init__(self, events: queue.Queue[tuple[Program, Event]]) -> None:
        self.streams: dict[str, Stream] = {}
        self._events = events
        self._began = time.monotonic_ns()
        self._lines: list[tuple[int, Callable[[], str]]] = []

    def ask(self, client: str, gateway: Program) -> Stream:
        """Lets a client request a stream."""
        number = 1 + sum(stream.client == client for stream in self.streams.values())
        stream = Stream(f"{client}-{number}", client, gateway)
        self.streams[stream.name] = stream
        gateway.command(f"ask {client} {stream.name}")
        return stream

    def leave(self, stream: Stream, gateway: Program) -> None:
        """Lets the stream's client leave a gateway."""
        stream.left_from = gateway
        gateway.command(f"offline {stream.client}")

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Handles events of the programs until the condition is true."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise DemoError(f"timeout after {TIMEOUT:.0f} s; expected: {what}")
            # Events of another process may arrive later but be older, so that lines are printed with a delay.
            self.print_until(time.monotonic_ns() - 200_000_000)
            try:
                program, event = self._events.get(timeout=0.05)
            except queue.Empty:
                continue
            self._handle(program, event)

    def print_until(self, limit: int) -> None:
        """Prints the lines older than `limit`. Their texts are made only now, because they depend on later events."""
        self._lines.sort(key=lambda line: line[0])
        while self._lines and self._lines[0][0] < limit:
            at, make = self._lines.pop(0)
            print(f"{(at - self._began) / 1e9:8.4f}  {make()}", flush=True)

    def _handle(self, program: Program, event: Event) -> None:
        kind = event["event"]
        if kind == "ready":
            program.is_ready = True
        elif kind == "totals":
            program.totals = event
        elif kind == "exit":
            program.exit_code = event["code"]
            if not program.totals:
                raise DemoError(f"the {program} exited with code {event['code']}")
        elif kind == "left":
            for stream in self.streams.values():
                if stream.client == event["client"] and stream.left_from and not stream.left_at:
                    stream.left_at = event["at"]
                    self._add_line(stream, program, event)
        else:
            stream = self.streams[event["stream"]]
            if kind == "message":
                stream.received.append(event["data"])
                stream.received_after_end += bool(stream.ended)
                return
            if kind == "begin":
                if stream.worker:
                    raise DemoError(f"two workers serve {stream.name}: {stream.worker} and {program}")
                stream.worker, stream.started_at = program, event["at"]
            elif kind in ("done", "late", "ended"):
                setattr(stream, kind, event)
            self._add_line(stream, program, event)

    def _add_line(self, stream: Stream, program: Program, event: Event) -> None:
        self._lines.append((event["at"], lambda: describe(stream, program, event)))


def describe(stream: Stream, program: Program, event: Event) -> str:
    """Returns the text of an event in the timeline."""
    name, kind = stream.name, event["event"]
    if kind == "ask":
        return f"{name}  {stream.client} requests a stream through the {program}"
    if kind == "begin":
        return f"{name}  the {program} starts"
    if kind == "left":
        origin = "" if program is stream.gateway else f"; the {stream.gateway} had requested the stream"
        return f"{name}  the {program} marks {stream.client} offline{origin}"
    if kind == "done" and event["status"] == OFFLINE and stream.left_at:
        return f"{name}  the {program} stops {stream.stopped_after_us:.0f} µs later, after {event['sent']} pieces"
    if kind == "done":
        return f"{name}  the {program} has produced {event['made']} pieces and sent {event['sent']}"
    if kind == "late":
        outcome = "refused" if event["status"] == OFFLINE else "NOT REFUSED"
        return f"{name}  the {program} tries to send again: {outcome}"
    outcome = (
        "to its end" if event["status"] == 0 else "until its client left" if event["status"] == OFFLINE else "in part"
    )
    return f"{name}  the {program} has read it {outcome}: {len(stream.received)} pieces"
