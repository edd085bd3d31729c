"""An app for the server that `leave.py` starts: each way in which a FastAPI or Starlette app can forward a stream.

The garbage collector is off, so that the app does not depend on it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse
from starlette.middleware.base import RequestResponseEndpoint
from starlette.responses import Response, StreamingResponse

from nats_presence import aio
from nats_presence.asgi import SSEResponse

gc.disable()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with aio.connect(os.environ["NATS_URL"]) as conn:
        app.state.conn = conn
        yield


app = FastAPI(lifespan=lifespan)


if os.environ.get("MIDDLEWARE"):

    @app.middleware("http")
    async def middleware(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


def stream(subject: str, client: str) -> aio.Stream:
    conn: aio.Connection = app.state.conn
    return conn.stream(subject, client_id=client)


@app.get("/response/{subject}/{client}")
async def response(subject: str, client: str) -> SSEResponse:
    return SSEResponse(stream(subject, client))


@app.get("/bare/{subject}/{client}")
async def bare(subject: str, client: str) -> Response:
    return StreamingResponse(stream(subject, client), media_type="text/event-stream")


@app.get("/loop/{subject}/{client}")
async def loop(subject: str, client: str) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async for message in stream(subject, client):
            yield message

    return StreamingResponse(body(), media_type="text/event-stream")


@app.get("/block/{subject}/{client}")
async def block(subject: str, client: str) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async with stream(subject, client) as messages:
            async for message in messages:
                yield message

    return StreamingResponse(body(), media_type="text/event-stream")


@app.get("/closing/{subject}/{client}")
async def closing(subject: str, client: str) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async with aclosing(stream(subject, client)) as messages:
            async for message in messages:
                yield message

    return StreamingResponse(body(), media_type="text/event-stream")


@app.get("/expression/{subject}/{client}")
async def expression(subject: str, client: str) -> Response:
    return StreamingResponse((m async for m in stream(subject, client)), media_type="text/event-stream")


@app.get("/sse-bare/{subject}/{client}")
async def sse_bare(subject: str, client: str) -> Response:
    return EventSourceResponse(stream(subject, client))


@app.get("/sse/{subject}/{client}")
async def sse(subject: str, client: str) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async with stream(subject, client) as messages:
            async for message in messages:
                yield message

    return EventSourceResponse(body())
