"""Checks the handlers of services, and what they return.

A handler that the connection cannot call, or whose result nobody would send, must not look like a stream that ended
well.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Awaitable, Iterable
from typing import Callable

from ._arguments import encode_text
from .errors import InvalidError


class InvalidHandlerError(InvalidError, TypeError):
    """The connection cannot call a handler of this kind."""


def check_subject(subject: object) -> None:
    """Raises InvalidError unless `subject` is text. A decorator without parentheses passes the function."""
    if callable(subject):
        raise InvalidHandlerError('service() needs a subject: write @conn.service("subject")')
    encode_text("subject", subject)


def check_sync_handler(subject: str, handler: object) -> None:
    """Raises InvalidHandlerError if a service with threads cannot call the handler."""
    _check_callable(subject, handler)
    if is_async_handler(handler):
        raise InvalidHandlerError(
            f"the handler of subject {subject!r} is async, but nats_presence.connect() calls handlers in threads:"
            " use nats_presence.aio.connect(), or define the handler without async"
        )


def check_async_handler(subject: str, handler: object) -> None:
    """Raises InvalidHandlerError if a service with asyncio cannot call the handler."""
    _check_callable(subject, handler)
    if _matches(inspect.isgeneratorfunction, handler):
        raise InvalidHandlerError(
            f"the handler of subject {subject!r} is a generator without async, and would block the event loop:"
            " define it with async def, or use nats_presence.connect()"
        )


def is_async_handler(handler: object) -> bool:
    """Returns whether the handler is a coroutine function or an asynchronous generator."""
    return _matches(inspect.iscoroutinefunction, handler) or _matches(inspect.isasyncgenfunction, handler)


def check_handler_result(result: object) -> None:
    """Raises TypeError if the handler returned something that it probably meant to send, or that still has to run."""
    if isinstance(result, Awaitable):
        if inspect.iscoroutine(result):
            result.close()  # Otherwise Python warns later that it was never awaited.
        raise TypeError("the handler returned an awaitable, which nats_presence.connect() cannot await")
    if isinstance(result, (Iterable, AsyncIterable)):
        raise TypeError(
            f"the handler returned a {type(result).__name__}: send messages with sender.send(), or yield them"
        )


def _check_callable(subject: str, handler: object) -> None:
    if not callable(handler):
        raise InvalidHandlerError(f"the handler of subject {subject!r} must be callable, not {type(handler).__name__}")


def _matches(is_kind: Callable[[object], bool], handler: object) -> bool:
    return is_kind(handler) or is_kind(getattr(handler, "__call__", None))  # noqa: B004 -- its __call__ may be async
