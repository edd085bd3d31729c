"""gateway.py URL NAME OPTIONS: gateway.c in Python, with asyncio and a task for each client and each stream."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress

import nats_presence as presence
import soak
from nats_presence import aio

SILENCE = 10.0
WORKERS = ["c", "c", "c", "go", "go", "go", "python", "victim"]
KINDS = {"reads": 50, "leaves": 15, "cancels": 10, "slow": 5, "marked": 5, "fails": 5, "races": 10}  # of 100 clients
STATUSES = {
    presence.InvalidError: "INVALID",
    presence.OfflineError: "OFFLINE",
    presence.ClosedError: "CLOSED",
    presence.StreamCancelledError: "CANCELLED",
    presence.FullError: "FULL",
    presence.DisconnectedError: "DISCONNECTED",
    presence.PeerGoneError: "PEER_GONE",
    presence.NoRespondersError: "NO_RESPONDERS",
    presence.BusyError: "BUSY",
    presence.PresenceTimeoutError: "TIMEOUT",
    presence.RemoteError: "REMOTE",
}


class Reader:
    """Reads one stream to its end and counts its outcome."""

    running: set[Reader] = set()  # noqa: RUF012

    def __init__(self, kind: str, worker: str, lanes_here: bool, lanes_there: bool, rng: random.Random) -> None:
        self.kind, self.worker, self.rng = kind, worker, rng
        self.conn = conns[0 if lanes_here else 1]
        self.subject = f"soak.{worker}" if lanes_there else f"soak.{worker}.0"
        self.level = "lane" if lanes_here and lanes_there else "level0"
        self.key, shape = rng.getrandbits(62), rng.randrange(100)
        self.options = {"timeout": 60}  # never reached
        if kind == "slow":  # more than its window
            self.count, self.size, burst, pause = 50, 2000, 50, 0
            self.options["stream_buffer_bytes"] = 16384
        elif shape < 70:
            self.count, self.size = 1 + rng.randrange(50), 16 + rng.randrange(200)
            burst, pause = 1 + rng.randrange(10), rng.randrange(100)
        elif shape < 95:
            self.count, self.size = 200 + rng.randrange(1800), 16 + rng.randrange(100)
            burst, pause = 100 + rng.randrange(900), rng.randrange(50)
        else:
            self.count, self.size, burst, pause = 5 + rng.randrange(20), 16 + rng.randrange(20000), 5, 50
        self.what = {"marked": "mark", "fails": "fail"}.get(kind, "end")
        self.request = f"{self.key} {self.count} {self.size} {burst} {pause} {self.what}"
        self.received = 0
        self.last = time.monotonic()
        self.is_silent = False
        self.stream: aio.Stream | None = None

    async def read(self, client: str) -> str:
        """Reads to the end and returns the outcome."""
        try:
            self.stream = self.conn.stream(self.subject, self.request, client_id=client, **self.options)
        except presence.PresenceError as refused:
            return f"REFUSED_{STATUSES[type(refused)]}"
        if self.kind == "cancels":
            asyncio.get_running_loop().call_later(self.rng.randrange(1, 300) / 1000, self.stream.cancel)
        self.running.add(self)
        try:
            async for message in self.stream:
                self.last = time.monotonic()
                if self.received >= self.count or message != soak.content(self.key, self.received, self.size):
                    which = f"message {self.received} of {self.count} of a stream of {self.worker}"
                    soak.emit(event="violation", what=f"{which} is not what was sent")
                    self.stream.cancel()
                    return "WRONG"
                self.received += 1
                if self.kind == "slow":
                    await asyncio.sleep(0.01)
        except presence.PresenceError as error:
            return self.outcome(error)
        finally:
            self.running.discard(self)
        return "END" if self.received == self.count else "SHORT"

    def outcome(self, error: presence.PresenceError) -> str:
        if isinstance(error, presence.StreamCancelledError) and self.is_silent:
            return "SILENT"
        if not isinstance(error, presence.RemoteError):
            return STATUSES[type(error)]
        if error.message == "asked for":
            if self.what != "fail":
                return "UNASKED"
            return "FAILED" if self.received == self.count else "FAILED_EARLY"
        return "REMOTE"

    async def count_outcome(self, counts: Counter[str], client: str) -> None:
        outcome = await self.read(client)
        some = "some" if self.received else "none"
        counts[f"{self.level} {self.worker} {self.kind} {some} {outcome}"] += 1


async def watch_over() -> None:
    """Prints statistics regularly, and cancels streams that have become silent."""
    while True:
        await asyncio.sleep(0.5)
        soak.tell_stats("stats", conns)
        for reader in list(Reader.running):
            if time.monotonic() > reader.last + SILENCE and reader.stream is not None:
                reader.is_silent = True
                reader.stream.cancel()


class Cycle:
    """All clients come during the first 0.4 of the time, and leave during its second half."""

    def __init__(self, seed: int, clients: int, seconds: float) -> None:
        self.seed, self.clients, self.seconds = seed, clients, seconds
        self.counts: Counter[str] = Counter()
        self.here = self.most = 0

    async def run(self) -> None:
        await asyncio.gather(*(self.client(number) for number in range(self.clients)))
        soak.emit(event="cycle", clients=self.clients, most=self.most, counts=self.counts)

    async def client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        client, begin = f"{sys.argv[2]}-{self.seed:x}-{number}", time.monotonic()
        comes, leaves = rng.uniform(0, 0.4 * self.seconds), rng.uniform(0.5, 0.8) * self.seconds
        await asyncio.sleep(comes)
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        self.here += 1
        self.most = max(self.most, self.here)
        session = presence.session(client) if rng.random() < 0.5 else None
        if session is None:
            presence.mark_client_online(client)
        first = rng.uniform(0, leaves - comes)
        kinds = [kind]
        if kind == "cancels" or rng.random() < 0.25:
            kinds.append("reads" if kind == "cancels" else kind)  # of two streams, only one is cancelled
        afters = [rng.uniform(0, leaves - comes) if kind == "reads" else first for _ in kinds]
        streams = [
            asyncio.create_task(self.stream(client, each, after, random.Random(rng.random())))
            for each, after in zip(kinds, afters)
        ]
        if kind == "races":
            await asyncio.sleep(first)
        elif kind == "leaves":
            await asyncio.sleep(first + rng.uniform(0, 0.5))
        else:
            await asyncio.gather(*streams)
            if kind != "marked":
                await asyncio.sleep(max(0, begin + leaves - time.monotonic()))
        if session is not None:
            session.close()
        else:
            presence.mark_client_offline(client)
        self.here -= 1
        await asyncio.gather(*streams)

    async def stream(self, client: str, kind: str, after: float, rng: random.Random) -> None:
        await asyncio.sleep(after)
        reader = Reader(kind, rng.choice(WORKERS), rng.randrange(8) != 0, rng.randrange(8) > 1, rng)
        await reader.count_outcome(self.counts, client)


async def settle() -> None:
    """Has one stream from each worker, so that all lanes exist."""
    counts: Counter[str] = Counter()
    rng = random.Random(0)
    readers = [
        Reader("settle", worker, here, there, rng)
        for worker in ("c", "go", "python", "victim")
        for here in (False, True)
        for there in (False, True)
    ]
    await asyncio.gather(*(reader.count_outcome(counts, "") for reader in readers))
    soak.give_back()
    soak.emit(event="cycle", clients=0, counts=counts)
    soak.tell_stats("quiet", conns)


async def commands() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    soak.emit(event="ready")
    tasks = [asyncio.create_task(watch_over())]
    while line := (await reader.readline()).decode():
        command, *numbers = line.split()
        if command == "cycle":
            seed, clients, ms = map(int, numbers)
            tasks.append(asyncio.create_task(Cycle(seed, clients, ms / 1000).run()))
        else:
            tasks.append(asyncio.create_task(settle()))
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


conns: list[aio.Connection] = []


async def main() -> None:
    async with AsyncExitStack() as stack:
        for level in range(2):
            options = soak.connection_options(sys.argv[3], level)
            conns.append(await stack.enter_async_context(aio.connect(sys.argv[1], **options)))
            await conns[-1].listen_offline()
        await commands()


asyncio.run(main())
