"""gateway_async.py URL LANES [KEY=VALUE]...: gateway.c in Python, with asyncio."""

from __future__ import annotations

import asyncio
import json
import sys

from nats_presence import PresenceError, aio, mark_client_offline


def emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def read(stream: aio.Stream, client: str) -> None:
    try:
        async for message in stream:
            emit(event="data", client=client, data=message.decode())
        emit(event="end", client=client)
    except PresenceError as error:
        emit(event="error", client=client, status=error.status, text=str(error), code=error.code)


async def main(url: str, lanes: str, *options: str) -> None:
    readers = set()
    async with aio.connect(url, lanes=lanes, **dict(option.split("=", 1) for option in options)) as conn:
        emit(event="ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, *words = line.rstrip("\n").split(" ", 3)
            if command == "request":
                subject, client, text = words
                try:
                    stream = conn.stream(subject, text, client_id=client)
                except PresenceError as error:
                    emit(event="error", client=client, status=error.status, text=str(error))
                else:
                    readers.add(asyncio.create_task(read(stream, client)))
            elif command == "leave":
                mark_client_offline(words[0])


asyncio.run(main(*sys.argv[1:]))
