"""worker.py URL SUBJECT GROUP PIECES PAUSE_MS: makes pieces for whoever asks, and stops the moment a client leaves."""

import asyncio
import sys

from nats_presence import PresenceError, Request, StreamStopped, aio, online_count
from tell import tell

LATER = 0.3
"""Seconds after which a stopped sender is tried once more."""


async def main(url: str, subject: str, group: str, pieces: int, pause: float) -> None:
    async with aio.connect(url) as conn:

        @conn.service(subject, queue=group)
        async def answer(request: Request, sender: aio.Sender) -> None:
            """Serves one request, in a task that is cancelled when the client leaves."""
            stream = request.data.decode()
            tell("begin", stream=stream)
            made = 0
            try:
                while made < pieces:
                    piece = f"{stream} piece {made}"
                    made += 1
                    await sender.send(piece)
                    await asyncio.sleep(pause)
                sender.end()
            except (asyncio.CancelledError, StreamStopped):
                tell("done", stream=stream, made=made, sent=sender.send_count, why=sender.status)
                await asyncio.sleep(LATER)
                tell("late", stream=stream, why=await status_of_sending(sender))
            else:
                tell("done", stream=stream, made=made, sent=sender.send_count, why=0)

        tell("ready")
        await asyncio.to_thread(sys.stdin.read)  # ends when the demo does
        conn.stop()
        await conn.run()
        tell("bye", running=conn.stats()["senders"], online=online_count())


async def status_of_sending(sender: aio.Sender) -> int:
    try:
        await sender.send("too late")
    except PresenceError as error:
        return error.status
    return 0


url, subject, group, pieces, pause_ms = sys.argv[1:]
asyncio.run(main(url, subject, group, int(pieces), int(pause_ms) / 1000))
