"""gateway.py URL SUBJECT: a gateway whose clients follow commands on standard input.

ask CLIENT STREAM    the client requests a stream
offline CLIENT       the client leaves
"""

import asyncio
import sys
import time

from nats_presence import PresenceError, aio, mark_client_offline, online_count
from report import report


async def main(url: str, subject: str) -> None:
    readers = set()
    async with aio.connect(url) as conn:
        await conn.listen_offline()  # for clients that other gateways mark offline
        report("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, client, *rest = line.split()
            if command == "ask":
                name = rest[0]
                report("ask", stream=name)
                stream = conn.stream(subject, name, client_id=client)
                readers.add(asyncio.create_task(read(stream, name)))
            elif command == "offline":
                at = time.monotonic_ns()
                mark_client_offline(client)
                report("left", client=client, at=at)
        await asyncio.gather(*readers)
        report("totals", running=conn.stats()["streams"], online=online_count())


async def read(stream: aio.Stream, name: str) -> None:
    """Reads a stream. A real gateway would forward the messages to the client's browser."""
    status = 0
    try:
        async with stream:
            async for message in stream:
                report("message", stream=name, data=message.decode())
    except PresenceError as error:
        status = error.status
    report("ended", stream=name, status=status)


asyncio.run(main(*sys.argv[1:]))
