"""Counts what the workers compute, how much of it is for clients that have left, and how fast they stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]

LANGUAGES = ("C", "Go", "Python")
MODES = ("presence", "plain")
BUCKETS_MS = (0.5, 1, 2, 5, 10, 100, 1000, 5000)
"""Upper limits of the histogram's buckets; one more bucket has the rest."""
PEER_GONE = -9
"""The status of a sender whose gateway is gone, in all languages."""
FORGET_AFTER = 10.0
"""Seconds after its last event that a stream is forgotten, if it has ended at one end."""
LOSS_LIMIT = 30.0
"""Seconds after which a loss is reported, even if some of its streams have not ended."""


@dataclass
class Stream:
    """A stream, with the events of its worker and its gateway. Times are monotonic, in nanoseconds."""

    name: str
    mode: str = ""
    language: str = ""
    length: int = 0
    times: list[int] = field(default_factory=list)
    """When each message was computed."""
    left_at: int = 0
    why: str = ""
    """Why its client is gone: "left", "gateway killed", "gateway frozen"."""
    done: Event | None = None
    """The worker's event when it finished or stopped."""
    ended: Event | None = None
    """The gateway's event at the stream's end."""
    changed: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        return bool(self.language) and not self.done

    @property
    def wasted(self) -> int:
        """How many messages were computed after the client had left."""
        return sum(at > self.left_at for at in self.times) if self.left_at else 0

    @property
    def not_computed(self) -> int:
        """How many messages were never computed, because the client had left."""
        return self.length - len(self.times) if self.left_at and self.done and not self.done.get("killed") else 0


@dataclass
class Counts:
    """What one worker has done since the last reset."""

    streams: int = 0
    running: int = 0
    computed: int = 0
    sent: int = 0
    wasted: int = 0
    not_computed: int = 0
    cpu_us: int = 0


@dataclass
class Loss:
    """Something that happened to several streams at once, which is logged when all of them have ended."""

    names: set[str]
    has_ended: Callable[[Stream], bool]
    describe: Callable[[list[Stream]], str]
    deadline: float


class Tally:
    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.counts = {(mode, language): Counts() for mode in MODES for language in LANGUAGES}
        self.stops: dict[str, list[int]] = {mode: [0] * (len(BUCKETS_MS) + 1) for mode in MODES}
        self.log: deque[tuple[int, str]] = deque(maxlen=60)
        self.frozen_at = 0
        """When the gateway was frozen; 0 if it is not."""
        self._entries = 0
        self._losses: list[Loss] = []
        self._last: dict[tuple[str, str], tuple[int, int]] = {}
        """CPU time and number of sent messages that each worker reported last."""

    def add_log(self, text: str) -> None:
        self._entries += 1
        self.log.append((self._entries, text))

    def reset(self, mode: str) -> bool:
        """Begins to count anew, unless streams run."""
        if self.running(mode):
            return False
        for language in LANGUAGES:
            self.counts[mode, language] = Counts()
        self.stops[mode] = [0] * (len(BUCKETS_MS) + 1)
        return True

    # Events of the programs.

    def handle_worker(self, mode: str, language: str, event: Event) -> None:
        counts, kind = self.counts[mode, language], event["event"]
        counts.running = event.get("running", counts.running)
        if kind == "work":
            self._handle_work(mode, language, event)
        elif kind == "begin":
            if (stream := self._stream(event["stream"])).language:  # The name was used before.
                del self.streams[stream.name]
                stream = self._stream(stream.name)
            stream.mode, stream.language, stream.length = mode, language, event["length"]
            counts.streams += 1
        elif kind == "done":
            stream = self._stream(event["stream"])
            if stream.is_running:
                stream.done = event
                self._settle(stream)

    def _handle_work(self, mode: str, language: str, event: Event) -> None:
        counts = self.counts[mode, language]
        for name, times in event["made"].items():
            stream = self._stream(name)
            stream.times += times
            counts.computed += len(times)
            if stream.left_at:
                counts.wasted += sum(at > stream.left_at for at in times)
        if last := self._last.get((mode, language)):
            counts.cpu_us += event["cpu_us"] - last[0]
            counts.sent += event["sent"] - last[1]
        self._last[mode, language] = event["cpu_us"], event["sent"]

    def handle_gateway(self, event: Event) -> None:
        if "stream" not in event:
            return
        stream = self._stream(event["stream"])
        if event["event"] == "left":
            self.leave(stream, event["at"], "left")
        elif event["event"] == "ended":
            stream.ended = event
            self._check_losses()

    def handle_worker_exit(self, mode: str, language: str, at: int) -> None:
        """The worker was killed: its streams have ended."""
        self._last.pop((mode, language), None)
        for stream in self.streams.values():
            if (stream.mode, stream.language) == (mode, language) and stream.is_running:
                stream.done = {"at": at, "killed": True}
        self.counts[mode, language].running = 0

    # What happens to streams.

    def leave(self, stream: Stream, at: int, why: str) -> None:
        if stream.left_at:
            return
        stream.left_at, stream.why = at, why
        if stream.language:
            self.counts[stream.mode, stream.language].wasted += stream.wasted
        if stream.done:
            self._settle(stream)

    def _settle(self, stream: Stream) -> None:
        """The worker has stopped; if the client has left, counts what that saved."""
        if self.frozen_at and not stream.left_at and stream.done and stream.done.get("status") == PEER_GONE:
            self.leave(stream, self.frozen_at, "gateway frozen")
            return
        if stream.left_at and stream.done and not stream.done.get("killed"):
            delay_ms = max(0.0, (stream.done["at"] - stream.left_at) / 1e6)
            bucket = sum(delay_ms >= limit for limit in BUCKETS_MS)
            self.stops[stream.mode][bucket] += 1
            self.counts[stream.mode, stream.language].not_computed += stream.not_computed
            if stream.why == "left" and ".load-" not in stream.name:
                self.add_log(describe_leaving(stream, delay_ms))
        self._check_losses()

    def expect(
        self,
        streams: list[Stream],
        has_ended: Callable[[Stream], bool],
        describe: Callable[[list[Stream]], str],
        limit: float = LOSS_LIMIT,
    ) -> None:
        """Logs `describe(streams)` when all of them have ended, or after `limit` seconds."""
        self._losses.append(Loss({s.name for s in streams}, has_ended, describe, time.monotonic() + limit))
        self._check_losses()

    def _check_losses(self) -> None:
        for loss in list(self._losses):
            streams = [stream for name in loss.names if (stream := self.streams.get(name))]
            if all(map(loss.has_ended, streams)) or time.monotonic() > loss.deadline:
                self._losses.remove(loss)
                self.add_log(loss.describe(streams))

    def running(self, *modes: str) -> list[Stream]:
        return [s for s in self.streams.values() if s.is_running and (not modes or s.mode in modes)]

    def sweep(self) -> None:
        """Forgets streams that have ended."""
        self._check_losses()
        now = time.monotonic()
        for name, stream in list(self.streams.items()):
            if not stream.is_running and now - stream.changed > FORGET_AFTER:
                del self.streams[name]

    def _stream(self, name: str) -> Stream:
        stream = self.streams.setdefault(name, Stream(name))
        stream.changed = time.monotonic()
        return stream


def describe_leaving(stream: Stream, delay_ms: float) -> str:
    who = f"Stream {stream.name.partition('.')[2]}: its client left"
    if stream.mode == "plain":
        return (
            f"{who}, and the worker in {stream.language} did not notice. It went on for {duration(delay_ms)} and"
            f" computed {stream.wasted} messages for nobody."
        )
    return (
        f"{who}, and the worker in {stream.language} stopped {duration(delay_ms)} later, after"
        f" {len(stream.times)} of {stream.length} messages. {stream.not_computed} were not computed."
    )


def duration(ms: float) -> str:
    if ms < 10:
        return f"{ms:.2f} ms"
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
