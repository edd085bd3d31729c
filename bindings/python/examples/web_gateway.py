"""A gateway for browsers, with Starlette and uvicorn: server-sent events, or one WebSocket for many streams.

    pip install starlette uvicorn wsproto

    curl -N http://127.0.0.1:8080/events                                    the first event is the client's id
    curl -d 'a question' -H 'X-Connect-ID: <id>' http://127.0.0.1:8080/ask   the answer arrives as events of the first

The answer is a sequence of events, and then an event `end` or `failure`. A client has one question answered at a time.

Over the WebSocket at /socket the client sends and receives JSON. It chooses the number of each stream:

    {"type": "ask", "stream": 1, "subject": "answers", "data": "a question"}, {"type": "cancel", "stream": 1}
    {"type": "message", "stream": 1, "data": "..."}, {"type": "end", "stream": 1}
    {"type": "error", "stream": 1, "text": "..."}

When the connection of a client ends, the client is offline, and its workers stop. A client that reads slowly slows
down its own workers: the gateway keeps a few messages of each client in memory.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), PORT (8080; 0: any free port), KEEPALIVE (15).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from nats_presence import Client, PresenceError, aio
from nats_presence.asgi import Event, SSEResponse
from nats_presence.sse import failure_text

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECTS = os.environ.get("SUBJECT", "answers").split(",")
"""What browsers may ask. Never pass on a subject that a browser chose freely."""
PORT = int(os.environ.get("PORT", "8080"))
KEEPALIVE = float(os.environ.get("KEEPALIVE", "15"))
MAX_QUESTION = 64 << 10
MAX_STREAMS = 100


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with aio.connect(URL, name="example web gateway") as app.state.conn:
        yield


# Server-sent events: GET /events keeps the connection of a client, POST /ask asks for it.


class Browser:
    """The connection of a client. A question that arrives when the client has left cannot bring it back online."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.events: asyncio.Queue[Event] = asyncio.Queue(16)
        self.answer: asyncio.Task[None] | None = None


browsers: dict[str, Browser] = {}


async def events(request: Request) -> Response:
    async def events_of_client() -> AsyncIterator[Event]:
        client_id = uuid.uuid4().hex
        with Client(client_id) as client:
            browser = browsers[client_id] = Browser(client)
            try:
                yield Event(client_id, "connected")
                while True:
                    yield await browser.events.get()
            finally:  # The client has left.
                del browsers[client_id]
                if browser.answer is not None:
                    browser.answer.cancel()

    return SSEResponse(events_of_client(), keepalive=KEEPALIVE)


async def ask(request: Request) -> Response:
    subject = request.query_params.get("subject", SUBJECTS[0])
    question = await read_question(request)
    browser = browsers.get(request.headers.get("X-Connect-ID", ""))
    if browser is None:
        raise HTTPException(409, "X-Connect-ID does not name a connected client")
    if subject not in SUBJECTS:
        raise HTTPException(404, "there is no such subject")
    if browser.answer is not None and not browser.answer.done():
        raise HTTPException(429, "the last question is still being answered")
    browser.answer = asyncio.create_task(answer(request.app.state.conn, browser, subject, question))
    return Response(status_code=202)


async def read_question(request: Request) -> bytes:
    """Reads the whole body, because a browser that is answered earlier may not see the answer, and keeps no more than
    is allowed.
    """
    question, size = b"", 0
    async for part in request.stream():
        size += len(part)
        question = question + part if size <= MAX_QUESTION else b""
    if size > MAX_QUESTION:
        raise HTTPException(413, f"the question has {size} bytes; the limit is {MAX_QUESTION}")
    return question


async def answer(conn: aio.Connection, browser: Browser, subject: str, question: bytes) -> None:
    """Forwards the answer to the client's connection."""
    try:
        async with browser.client.stream(conn, subject, question) as stream:
            async for message in stream:
                await browser.events.put(Event(message))
        await browser.events.put(Event("", "end"))
    except PresenceError as error:  # An incomplete answer must not look complete.
        await browser.events.put(Event(failure_text(error), "failure"))


# WebSocket: one connection for all streams of a client.


async def serve_socket(websocket: WebSocket) -> None:
    """Serves one client until it leaves. Its streams are tasks, which are then cancelled."""
    conn: aio.Connection = websocket.app.state.conn
    streams: dict[int, asyncio.Task[None]] = {}
    await websocket.accept()
    with Client(uuid.uuid4().hex) as client:
        try:
            while True:
                await handle_command(conn, client, websocket, streams, await websocket.receive_text())
        except WebSocketDisconnect:
            pass
        except KeyError:  # The client sent bytes.
            await websocket.close(1003)
        finally:
            for task in streams.values():
                task.cancel()


async def handle_command(
    conn: aio.Connection, client: Client, websocket: WebSocket, streams: dict[int, asyncio.Task[None]], text: str
) -> None:
    try:
        command = json.loads(text)
    except (ValueError, RecursionError):
        command = None
    if not (isinstance(command, dict) and type(command.get("stream")) is int):
        await send(websocket, type="error", text="a command is a JSON object with a type and the number of a stream")
        return
    number, kind, subject = command["stream"], command.get("type"), command.get("subject", SUBJECTS[0])
    if kind == "cancel":
        if number in streams:
            streams[number].cancel()
    elif number in streams:
        await send(websocket, type="error", text=f"stream {number} is running")
    elif kind != "ask":
        await send(websocket, type="error", stream=number, text="the type of a command is ask or cancel")
    elif subject not in SUBJECTS:
        await send(websocket, type="error", stream=number, text="there is no such subject")
    elif len(streams) == MAX_STREAMS:
        await send(websocket, type="error", stream=number, text=f"the limit of {MAX_STREAMS} streams is reached")
    else:
        forwarding = forward(conn, client, websocket, number, subject, str(command.get("data", "")))
        streams[number] = asyncio.create_task(forwarding)
        streams[number].add_done_callback(lambda _: streams.pop(number))


async def forward(
    conn: aio.Connection, client: Client, websocket: WebSocket, number: int, subject: str, question: str
) -> None:
    try:
        async with client.stream(conn, subject, question) as stream:
            async for message in stream:
                await send(websocket, type="message", stream=number, data=message.decode(errors="replace"))
        await send(websocket, type="end", stream=number)
    except PresenceError as error:
        await send(websocket, type="error", stream=number, text=failure_text(error))
    except WebSocketDisconnect:
        pass  # serve_socket() notices it, too.


async def send(websocket: WebSocket, **message: Any) -> None:
    await websocket.send_text(json.dumps(message))


app = Starlette(
    routes=[
        Route("/events", events),
        Route("/ask", ask, methods=["POST"]),
        WebSocketRoute("/socket", serve_socket),
    ],
    lifespan=lifespan,
)


def main() -> None:
    listener = socket.create_server(("127.0.0.1", PORT), backlog=2048)
    # The connections that it accepts inherit these options, which detect a client that vanished.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(KEEPALIVE)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(KEEPALIVE * 1000))
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", ws_max_size=MAX_QUESTION + 1024, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
