"""Handlers of services: which kinds there are, and that none ends a stream in silence that it has not served."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Awaitable, Iterable
from typing import Callable

from ._arguments import encode_text
from .errors import Invalid


class InvalidHandler(Invalid, TypeError):
    """A handler is of a kind that its connection cannot call."""


def check_subject(subject: object) -> None:
    """Refuses what is no subject at all, such as the function below a decorator without parentheses."""
    if callable(subject):
        raise InvalidHandler('service() takes a subject: write @conn.service("subject")')
    encode_text("subject", subject)


def check_sync_handler(subject: str, handler: object) -> None:
    """Refuses what a service with threads cannot call."""
    _check_callable(subject, handler)
    if _is(inspect.iscoroutinefunction, handler) or _is(inspect.isasyncgenfunction, handler):
        raise InvalidHandler(
            f"the handler of subject {subject!r} is async, and nats_presence.connect() serves with threads:"
            " use nats_presence.aio.connect(), or def"
        )


def check_async_handler(subject: str, handler: object) -> None:
    """Refuses what a service with asyncio cannot call."""
    _check_callable(subject, handler)
    if _is(inspect.isgeneratorfunction, handler):
        raise InvalidHandler(
            f"the handler of subject {subject!r} is a generator without async, and would block the loop:"
            " use async def, or nats_presence.connect()"
        )


def check_handler_result(result: object) -> None:
    """Refuses what a handler returned that looks as if it were to be sent, or still to be run."""
    if isinstance(result, Awaitable):
        if inspect.iscoroutine(result):
            result.close()  # Otherwise Python warns that it was never awaited, at some later time.
        raise TypeError(
            "the handler returned an awaitable: nats_presence.connect() serves with threads, and awaits none"
        )
    if isinstance(result, (Iterable, AsyncIterable)):
        raise TypeError(
            f"the handler returned a {type(result).__name__}: send messages with sender.send, or yield them"
        )


def _check_callable(subject: str, handler: object) -> None:
    if not callable(handler):
        raise InvalidHandler(f"the handler of subject {subject!r} must be callable, not {type(handler).__name__}")


def _is(kind: Callable[[object], bool], handler: object) -> bool:
    return kind(handler) or kind(getattr(handler, "__call__", None))  # noqa: B004 -- an object with an async __call__
