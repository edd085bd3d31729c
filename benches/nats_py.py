"""The peer of python_stream: nats-py publishes as fast as it can, and counts messages in a callback.

nats_py.py publish URL MESSAGES SIZE
nats_py.py subscribe URL MESSAGES
"""

from __future__ import annotations

import asyncio
import sys
import time

import nats
from nats.aio.msg import Msg

SUBJECT = "bench.natspy"


async def publish(url: str, messages: int, size: int) -> float:
    """Returns the CPU time of the process in seconds, from the first message until nats-server has everything."""
    conn = await nats.connect(url)
    message = bytes(size)
    start = time.process_time()
    for _ in range(messages):
        await conn.publish(SUBJECT, message)
    await conn.flush(timeout=60)
    cpu = time.process_time() - start
    await conn.close()
    return cpu


async def subscribe(url: str, messages: int) -> float:
    conn = await nats.connect(url)
    done = asyncio.Event()
    received, start, seconds = 0, 0.0, 0.0

    async def count(msg: Msg) -> None:
        nonlocal received, start, seconds
        received += 1
        if received == 1:
            start = time.monotonic()
        if received == messages:
            seconds = time.monotonic() - start
            done.set()

    # Without limits, so that a slow reader loses no messages.
    await conn.subscribe(SUBJECT, cb=count, pending_msgs_limit=0, pending_bytes_limit=0)
    await conn.flush()
    print("READY", flush=True)
    await asyncio.wait_for(done.wait(), 60)
    await conn.close()
    return (messages - 1) / seconds


def main() -> None:
    role, url, messages, *rest = sys.argv[1:]
    if role == "publish":
        cpu = asyncio.run(publish(url, int(messages), int(rest[0])))
        print(f'{{"cpu_ns_per_send": {cpu / int(messages) * 1e9:.1f}}}')
    else:
        print(f'{{"messages_per_s": {asyncio.run(subscribe(url, int(messages))):.0f}}}')


main()
