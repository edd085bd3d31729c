"""A worker that computes its answer token by token, in threads or in other processes, while its event loop goes on.

The tokens are the digits of pi; each takes a little longer than the one before. Replace `next_token` by a step of your
model. When the client leaves, the handler is cancelled: a step that has begun ends, and no further one begins.

Threads suit a step that releases the GIL, as numpy, torch and llama.cpp do. For a step in Python choose processes: the
state goes to a process and back with each step, so it has to be small.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), EXECUTOR (threads or processes), TOKENS (1000).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Callable, NamedTuple, Optional, TypeVar

from nats_presence import Request, aio

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "answers")
EXECUTOR = os.environ.get("EXECUTOR", "threads")
TOKENS = int(os.environ.get("TOKENS", "1000"))

State = TypeVar("State")
Step = Callable[[State], tuple[Optional[str], State]]


async def tokens(executor: Executor, step: Step[State], state: State) -> AsyncIterator[str]:
    """Yields the tokens of the steps, until one is None."""
    loop = asyncio.get_running_loop()
    while True:
        token, state = await loop.run_in_executor(executor, step, state)
        if token is None:
            return
        yield token


class Pi(NamedTuple):
    """The state of Gibbons's spigot algorithm, and the number of digits so far."""

    digits: int = 0
    q: int = 1
    r: int = 0
    t: int = 1
    k: int = 1
    n: int = 3
    m: int = 3


def next_token(state: Pi) -> tuple[str | None, Pi]:
    """Computes the next digit of pi."""
    digits, q, r, t, k, n, m = state
    if digits == TOKENS:
        return None, state
    while 4 * q + r - t >= n * t:
        n = (q * (7 * k + 2) + r * m) // (t * m)
        q, r, t, k, m = q * k, (2 * q + r) * m, t * m, k + 1, m + 2
    return str(n), Pi(digits + 1, 10 * q, 10 * (r - n * t), t, k, 10 * (3 * q + r) // t - 10 * n, m)


def exit_with_parent() -> None:
    """Ends this process when its parent is killed. It would otherwise wait for the next step for ever."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def new_executor() -> Executor:
    if EXECUTOR == "threads":
        return ThreadPoolExecutor()
    context = multiprocessing.get_context("spawn")  # A process that has threads should not fork.
    return ProcessPoolExecutor(mp_context=context, initializer=exit_with_parent)


async def main() -> None:
    executor = new_executor()

    async def answer(request: Request, sender: aio.Sender) -> None:
        try:
            async for token in tokens(executor, next_token, Pi()):
                await sender.send(token)
        finally:
            print(f"{request.client_id}: {sender.send_count} of {TOKENS} tokens", flush=True)

    try:
        async with aio.connect(URL, name="example token worker", on_event=print) as conn:
            await conn.serve(SUBJECT, answer, queue="workers")
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, conn.stop)
            print(f"serving {SUBJECT}", flush=True)
            await conn.run()
    finally:
        executor.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
