"""A worker that answers each request with PIECES messages, one every DELAY seconds, and stops when its client leaves.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), QUEUE (workers), PIECES (100), DELAY (0.1).
"""

import asyncio
import os
import signal

from nats_presence import Request, StreamStoppedError, aio

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "answers")
QUEUE = os.environ.get("QUEUE", "workers")
PIECES = int(os.environ.get("PIECES", "100"))
DELAY = float(os.environ.get("DELAY", "0.1"))


async def answer(request: Request, sender: aio.Sender) -> None:
    try:
        for number in range(PIECES):
            await sender.send(f"piece {number} of {request.data.decode()}")
            await asyncio.sleep(DELAY)
        print(f"{request.client_id}: sent all {sender.send_count}", flush=True)
    except (StreamStoppedError, asyncio.CancelledError) as why:
        print(f"{request.client_id}: stopped after {sender.send_count}: {why}", flush=True)
        raise


async def main() -> None:
    async with aio.connect(URL, name="example worker", on_event=print) as conn:
        await conn.serve(SUBJECT, answer, queue=QUEUE)
        # At SIGTERM the worker takes no more requests, and exits when the running handlers have returned.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, conn.stop)
        print(f"serving {SUBJECT}", flush=True)
        await conn.run()


asyncio.run(main())
