"""Measures the Python binding: one stream of messages from a worker to a gateway.

python_stream.py worker URL threads|asyncio lists|each MESSAGES SIZE
python_stream.py gateway URL threads|asyncio MESSAGES
"""

from __future__ import annotations

import asyncio
import sys
import time

import nats_presence
from nats_presence import aio

SUBJECT = "bench.python"
LIST = 1000  # messages in a list


def lists_of(messages: int, size: int) -> list[list[bytes]]:
    one = [b"%0*d" % (size, number) for number in range(LIST)]
    return [one] * (messages // LIST)


def must_have_lane(stats: dict[str, int]) -> None:
    if stats["lanes"] == 0:
        sys.exit("the stream does not use a lane")


def rate(received: int, messages: int, seconds: float) -> float:
    """Returns messages per second, without the first one, after which the clock was started."""
    if received != messages:
        sys.exit("messages were lost")
    return (messages - 1) / seconds


def worker(url: str, lists: bool, messages: int, size: int) -> float:
    """Returns the CPU time of the process in seconds, from the first send until nats-server has everything."""
    start = 0.0
    with nats_presence.connect(url) as conn:

        @conn.service(SUBJECT)
        def answer(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
            nonlocal start
            start = time.process_time()
            for some in lists_of(messages, size):
                if lists:
                    sender.send_many(some)
                else:
                    for message in some:
                        sender.send(message)
            conn.stop()

        print("READY", flush=True)
        conn.run()
    return time.process_time() - start


def gateway(url: str, messages: int) -> float:
    with nats_presence.connect(url) as conn:
        stream = conn.stream(SUBJECT, client_id="client")
        next(stream)
        must_have_lane(conn.stats())
        start, received = time.monotonic(), 1
        for _ in stream:
            received += 1
        seconds = time.monotonic() - start
    return rate(received, messages, seconds)


async def aio_worker(url: str, lists: bool, messages: int, size: int) -> float:
    start = 0.0
    async with aio.connect(url) as conn:

        async def answer(request: nats_presence.Request, sender: aio.Sender) -> None:
            nonlocal start
            start = time.process_time()
            for some in lists_of(messages, size):
                if lists:
                    await sender.send_many(some)
                else:
                    for message in some:
                        await sender.send(message)
            conn.stop()

        await conn.serve(SUBJECT, answer)
        print("READY", flush=True)
        await conn.run()
    return time.process_time() - start


async def aio_gateway(url: str, messages: int) -> float:
    async with aio.connect(url) as conn:
        stream = conn.stream(SUBJECT, client_id="client")
        await stream.__anext__()
        must_have_lane(conn.stats())
        start, received = time.monotonic(), 1
        async for _ in stream:
            received += 1
        seconds = time.monotonic() - start
    return rate(received, messages, seconds)


def main() -> None:
    role, url, style, *rest = sys.argv[1:]
    if role == "worker":
        lists, messages, size = rest[0] == "lists", int(rest[1]), int(rest[2])
        args = (url, lists, messages, size)
        cpu = asyncio.run(aio_worker(*args)) if style == "asyncio" else worker(*args)
        print(f'{{"cpu_ns_per_send": {cpu / messages * 1e9:.1f}}}')
    else:
        count = int(rest[0])
        per_s = asyncio.run(aio_gateway(url, count)) if style == "asyncio" else gateway(url, count)
        print(f'{{"messages_per_s": {per_s:.0f}}}')


main()
