"""A worker whose answers come from a program, which reads the question from standard input and writes the answer to
standard output.

    COMMAND="ffmpeg -i pipe: -f mp3 pipe:" python subprocess_worker.py

Each stream has a process of its own. When the client leaves, the handler is cancelled, and the process is terminated
with all the processes that it started. A reader that is slow slows down the program, by its pipe.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), COMMAND (cat),
GRACE (2).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from contextlib import suppress

from nats_presence import Request, aio

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "answers")
COMMAND = shlex.split(os.environ.get("COMMAND", "cat"))
CHUNK = 16 << 10
GRACE = float(os.environ.get("GRACE", "2"))
"""How many seconds a program has, after SIGTERM, until it is killed."""


async def answer(request: Request, sender: aio.Sender) -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=CHUNK,
        start_new_session=True,  # The processes that the program starts are in its process group.
    )
    writing = asyncio.create_task(write(process, request.data))
    try:
        assert process.stdout is not None
        while output := await process.stdout.read(CHUNK):
            await sender.send(output)
        if await process.wait() != 0:  # An incomplete answer must not look complete.
            sender.error(f"the program failed with status {process.returncode}")
    finally:
        writing.cancel()
        await stop(process)
        print(f"{request.client_id}: the program ended with status {process.returncode}", flush=True)


async def write(process: asyncio.subprocess.Process, question: bytes) -> None:
    """Writes the question. A program need not read all of it before it answers."""
    assert process.stdin is not None
    with suppress(ConnectionError):  # The program reads no further.
        process.stdin.write(question)
        await process.stdin.drain()
    process.stdin.close()


async def stop(process: asyncio.subprocess.Process) -> None:
    """Ends the program and the processes that it started."""
    with suppress(ProcessLookupError):  # All of them have ended.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(wait(process), GRACE)
        finally:  # Also if this task is cancelled again.
            os.killpg(process.pid, signal.SIGKILL)
    await wait(process)


async def wait(process: asyncio.subprocess.Process) -> None:
    """Waits for the end of the program. Its output is discarded: asyncio waits for the end of that, too."""
    assert process.stdout is not None
    while await process.stdout.read(CHUNK):
        pass
    await process.wait()


async def main() -> None:
    async with aio.connect(URL, name="example subprocess worker", on_event=print) as conn:
        await conn.serve(SUBJECT, answer, queue="workers", max_streams=os.cpu_count() or 1)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, conn.stop)
        print(f"serving {SUBJECT}", flush=True)
        await conn.run()


if __name__ == "__main__":
    asyncio.run(main())
