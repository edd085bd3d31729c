"""What the demo's programs tell: remembered for each stream, and printed as a timeline."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from programs import Broken, Event, Program

PATIENCE = 20.0
"""How many seconds the demo waits for what should take milliseconds."""
OFFLINE = -2
"""What a sender answers whose client has left, in all languages."""


@dataclass
class Stream:
    """What became of a stream, as both its ends tell it."""

    name: str
    client: str
    gateway: Program
    worker: Program | None = None
    begun_at: int = 0
    """When the worker began. Times are nanoseconds."""
    received: list[str] = field(default_factory=list)
    left_from: Program | None = None
    """The gateway that saw its client leave; None: the client stayed."""
    left_at: int = 0
    done: Event = field(default_factory=dict)
    """The worker's last word about it."""
    late: Event = field(default_factory=dict)
    """What came of one more send, long after it was stopped."""
    ended: Event = field(default_factory=dict)
    """The gateway's last word about it."""
    afterwards: int = 0
    """How many messages came out of the gateway after that."""

    @property
    def stopped_after_us(self) -> float:
        """How long the worker went on after its client had left."""
        return float(self.done["at"] - self.left_at) / 1000

    @property
    def is_over(self) -> bool:
        is_stopped = self.done.get("why") == OFFLINE
        return bool(self.done and self.ended and (self.late or not is_stopped))


class Show:
    """The programs and the streams between them."""

    def __init__(self, told: queue.Queue[tuple[Program, Event]]) -> None:
        self.streams: dict[str, Stream] = {}
        self._told = told
        self._began = time.monotonic_ns()
        self._lines: list[tuple[int, Callable[[], str]]] = []

    def ask(self, client: str, gateway: Program) -> Stream:
        """Has a client ask for a stream."""
        number = 1 + sum(stream.client == client for stream in self.streams.values())
        stream = Stream(f"{client}-{number}", client, gateway)
        self.streams[stream.name] = stream
        gateway.command(f"ask {client} {stream.name}")
        return stream

    def leave(self, stream: Stream, gateway: Program) -> None:
        """Has a gateway see that the stream's client has left."""
        stream.left_from = gateway
        gateway.command(f"offline {stream.client}")

    def wait(self, what: str, is_so: Callable[[], bool]) -> None:
        """Listens to the programs until it is so."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if time.monotonic() > deadline:
                raise Broken(f"not within {PATIENCE:.0f} s: {what}")
            # A line waits a little for older ones that come later, from another process.
            self.print_until(time.monotonic_ns() - 200_000_000)
            try:
                program, event = self._told.get(timeout=0.05)
            except queue.Empty:
                continue
            self._hear(program, event)

    def print_until(self, limit: int) -> None:
        """Prints the lines of the timeline that are older, each made only now, when all is known that belongs to it."""
        self._lines.sort(key=lambda line: line[0])
        while self._lines and self._lines[0][0] < limit:
            at, make = self._lines.pop(0)
            print(f"{(at - self._began) / 1e9:8.4f}  {make()}", flush=True)

    def _hear(self, program: Program, event: Event) -> None:
        kind = event["event"]
        if kind == "ready":
            program.is_ready = True
        elif kind == "bye":
            program.bye = event
        elif kind == "exit":
            program.exit_code = event["code"]
            if not program.bye:
                raise Broken(f"the {program} has ended, with code {event['code']}")
        elif kind == "left":
            for stream in self.streams.values():
                if stream.client == event["client"] and stream.left_from and not stream.left_at:
                    stream.left_at = event["at"]
                    self._tell_of(stream, program, event)
        else:
            stream = self.streams[event["stream"]]
            if kind == "message":
                stream.received.append(event["data"])
                stream.afterwards += bool(stream.ended)
                return
            if kind == "begin":
                if stream.worker:
                    raise Broken(f"two workers serve {stream.name}: {stream.worker} and {program}")
                stream.worker, stream.begun_at = program, event["at"]
            elif kind in ("done", "late", "ended"):
                setattr(stream, kind, event)
            self._tell_of(stream, program, event)

    def _tell_of(self, stream: Stream, program: Program, event: Event) -> None:
        self._lines.append((event["at"], lambda: describe(stream, program, event)))


def describe(stream: Stream, program: Program, event: Event) -> str:
    """A line of the timeline."""
    name, kind = stream.name, event["event"]
    if kind == "ask":
        return f"{name}  {stream.client} asks the {program}"
    if kind == "begin":
        return f"{name}  the {program} begins"
    if kind == "left":
        whose = "" if program is stream.gateway else f", which did not ask for the stream: the {stream.gateway} did"
        return f"{name}  {stream.client} leaves, says the {program}{whose}"
    if kind == "done" and event["why"] == OFFLINE and stream.left_at:
        return f"{name}  the {program} stops, {stream.stopped_after_us:.0f} µs later; it has sent {event['sent']}"
    if kind == "done":
        return f"{name}  the {program} has made {event['made']} pieces and sent {event['sent']}"
    if kind == "late":
        verdict = "refused still" if event["why"] == OFFLINE else "NOT REFUSED"
        return f"{name}  the {program} tries to send once more: {verdict}"
    outcome = (
        "to its end" if event["why"] == 0 else "up to its client's leave" if event["why"] == OFFLINE else "in part"
    )
    return f"{name}  the {program} has read it {outcome}: {len(stream.received)} pieces"
