"""gateway.py URL SUBJECT: holds clients, whose doings it reads from standard input.

ask CLIENT STREAM    the client asks for a stream
offline CLIENT       the client has left
"""

import asyncio
import sys
import time

from nats_presence import PresenceError, aio, mark_client_offline, online_count
from tell import tell


async def main(url: str, subject: str) -> None:
    readers = set()
    async with aio.connect(url) as conn:
        await conn.listen_offline()  # for clients that other gateways see leave
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, client, *rest = line.split()
            if command == "ask":
                name = rest[0]
                tell("ask", stream=name)
                stream = conn.stream(subject, name, client_id=client)
                readers.add(asyncio.create_task(read(stream, name)))
            elif command == "offline":
                at = time.monotonic_ns()
                mark_client_offline(client)
                tell("left", client=client, at=at)
        await asyncio.gather(*readers)
        tell("bye", running=conn.stats()["streams"], online=online_count())


async def read(stream: aio.Stream, name: str) -> None:
    """Is where the messages would go to the client's browser."""
    why = 0
    try:
        async with stream:
            async for message in stream:
                tell("message", stream=name, data=message.decode())
    except PresenceError as error:
        why = error.status
    tell("ended", stream=name, why=why)


asyncio.run(main(*sys.argv[1:]))
