"""Calls functions that block in threads, so that the event loop goes on."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Callable, TypeVar

T = TypeVar("T")


class OwnerLoop:
    """The event loop that an object belongs to. The object's events arrive in this loop only."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def check(self, what: str) -> None:
        """Raises RuntimeError in another loop or thread, where waiting for an event would never end."""
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop or (running is None and threading.get_ident() == self._thread):
            return
        where = "a thread without a loop" if running is None else repr(running)
        raise RuntimeError(
            f"the {what} belongs to the loop in which it was made, {self.loop!r}; it is used from {where}"
        )


def start_in_thread(function: Callable[..., T], *arguments: object) -> Future[T]:
    """Calls a function in a new thread. The loop's executor could have all its threads busy with calls that block."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as raised:
            future.set_exception(raised)

    threading.Thread(target=run, name="nats_presence wait").start()
    return future


def wrap_future(future: Future[T]) -> asyncio.Future[T]:
    """Returns a future of the loop with the same result.

    Unlike asyncio.wrap_future(), cancelling it does not cancel the thread's future, and the loop may be closed before
    the thread's future is done.
    """
    loop = asyncio.get_running_loop()
    wrapped: asyncio.Future[T] = loop.create_future()

    def copy_result(done: Future[T]) -> None:
        if wrapped.done():
            return  # It was cancelled.
        if (failure := done.exception()) is not None:
            wrapped.set_exception(failure)
        else:
            wrapped.set_result(done.result())

    def call_loop(done: Future[T]) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(copy_result, done)

    future.add_done_callback(call_loop)
    return wrapped


def run_in_thread(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Calls a function in a new thread, and returns a future of the loop for its result."""
    return wrap_future(start_in_thread(function, *arguments))
