"""worker.py URL SUBJECT GROUP PIECES PAUSE_MS: a worker that sends pieces, and stops when the client leaves."""

import asyncio
import sys

from nats_presence import PresenceError, Request, StreamStoppedError, aio, online_count
from report import report

RETRY_DELAY = 0.3
"""Seconds after which the worker tries to send once more on a stopped sender."""


async def main(url: str, subject: str, group: str, pieces: int, pause: float) -> None:
    async with aio.connect(url) as conn:

        async def answer(request: Request, sender: aio.Sender) -> None:
            """Serves one request, in a task that is cancelled when the client leaves."""
            stream = request.data.decode()
            report("begin", stream=stream)
            made = 0
            try:
                while made < pieces:
                    piece = f"{stream} piece {made}"
                    made += 1
                    await sender.send(piece)
                    await asyncio.sleep(pause)
                sender.end()
            except (asyncio.CancelledError, StreamStoppedError):
                report("done", stream=stream, made=made, sent=sender.send_count, status=sender.status)
                await asyncio.sleep(RETRY_DELAY)
                report("late", stream=stream, status=await status_of_sending(sender))
            else:
                report("done", stream=stream, made=made, sent=sender.send_count, status=0)

        await conn.serve(subject, answer, queue=group)
        report("ready")
        await asyncio.to_thread(sys.stdin.read)  # returns when the demo ends
        conn.stop()
        await conn.run()
        report("totals", running=conn.stats()["senders"], online=online_count())


async def status_of_sending(sender: aio.Sender) -> int:
    try:
        await sender.send("too late")
    except PresenceError as error:
        return error.status
    return 0


url, subject, group, pieces, pause_ms = sys.argv[1:]
asyncio.run(main(url, subject, group, int(pieces), int(pause_ms) / 1000))
