"""worker_async.py URL SUBJECT LANES [KEY=VALUE]...: worker.c in Python, with asyncio."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress

from nats_presence import PresenceError, Request, aio

FURTHER = 100


def emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def main(url: str, subject: str, lanes: str, *options: str) -> None:
    finishing = asyncio.Event()
    async with aio.connect(url, lanes=lanes, **dict(option.split("=", 1) for option in options)) as conn:

        async def answer(request: Request, sender: aio.Sender) -> None:
            what, _, argument = request.data.decode().partition(" ")
            count = {"fail": 1, "code": 1, "endless": sys.maxsize}.get(what) or int(argument)
            why = 0
            try:
                while sender.send_count < count and not (what == "endless" and finishing.is_set()):
                    await sender.send(f"{request.client_id} {sender.send_count}")
                    if what == "endless":
                        await asyncio.sleep(0.001)
                if what == "fail":
                    sender.error(argument)
                elif what == "code":
                    code, _, text = argument.partition(" ")
                    sender.error(text, code=int(code))
                else:
                    sender.end()
            except asyncio.CancelledError:
                why = sender.status
            except PresenceError as error:
                why = error.status
            sent = sender.send_count
            for _ in range(FURTHER):
                with suppress(PresenceError):
                    await sender.send("more")
            emit(event="done", client=request.client_id, sent=sent, why=why, accepted=sender.send_count - sent)

        await conn.serve(subject, answer, queue="workers")
        emit(event="ready")
        while await asyncio.to_thread(sys.stdin.readline):  # "finish" is the only command
            finishing.set()


asyncio.run(main(*sys.argv[1:]))
