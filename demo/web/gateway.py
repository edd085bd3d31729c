"""gateway.py URL LISTEN ORIGIN: a gateway between browsers and workers, over server-sent events and WebSocket.

GET /sse?client=ID&QUESTION    one stream as server-sent events: messages, then "end" or "failure"
GET /ws?client=ID              a WebSocket with any number of streams of one client

Only pages of ORIGIN may use it. README.md in this folder has the protocol.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl

import uvicorn
from nats_presence import PresenceError, aio
from nats_presence.asgi import SSEResponse
from report import report
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

HEARTBEAT_MS = 1000
"""More often than by default, so that a frozen worker is noticed after 3 s instead of 15."""
KEEPALIVE = 10
USER_TIMEOUT = 20
"""Seconds after which a connection is closed whose data is not acknowledged, or not read."""
SOCKET_BUFFER = 32 << 10
"""The size of the kernel's send buffer. Its messages are computed even if the browser does not read them."""
MAX_MESSAGE = 4096
MAX_STREAMS = 100
"""For each WebSocket."""
MAX_PROMPT, MAX_LENGTH, MAX_PAUSE = 1000, 100_000, 1000
CANCELLED = -4
WAYS = ("presence", "plain")
WORKERS = ("any", "c", "go", "python")


class BadQuestionError(Exception):
    """Its text is for the client."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Question(NamedTuple):
    stream: str
    subject: str
    payload: str

    @classmethod
    def parse(cls, values: Mapping[str, str], client: str) -> Question:
        """Checks all parameters."""
        stream, way, worker = (values.get(name, "") for name in ("stream", "mode", "worker"))
        prompt = values.get("prompt", "")
        check_id("client", client)
        check_id("stream", stream)
        if way not in WAYS or worker not in WORKERS:
            raise BadQuestionError(f'no worker serves "{way}.{worker}"'[:120], 404)
        length = check_number("length", values, 1, MAX_LENGTH)
        pause = check_number("pause", values, 0, MAX_PAUSE)
        if (size := len(prompt.encode(errors="replace"))) > MAX_PROMPT:
            raise BadQuestionError(f"prompt is {size} bytes long; the limit is {MAX_PROMPT}")
        name = f"{client}.{stream}"
        text = " ".join(prompt.encode(errors="replace").decode().split())
        return cls(name, f"{way}.{worker}", f"{name} {length} {pause} {text}")


def check_id(what: str, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", value):
        raise BadQuestionError(f'{what} is "{value[:80]}", not 1 to 32 letters, digits, - or _')


def check_number(what: str, values: Mapping[str, str], least: int, most: int) -> int:
    text = values.get(what, "")
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise BadQuestionError(f'{what} is "{text[:80]}", not a number from {least} to {most}')
    return int(text)


class Gateway:
    def __init__(self, conn: aio.Connection, origin: str) -> None:
        self.conn = conn
        self.origin = origin

    def app(self) -> ASGIApp:
        app = Starlette(routes=[Route("/sse", self.sse, methods=["GET"]), WebSocketRoute("/ws", self.ws)])
        return Guard(app, self.origin)

    async def follow(self, question: Question, client: str) -> AsyncIterator[bytes]:
        """Yields the messages of a stream, and reports its life to the supervisor."""
        report("ask", stream=question.stream)
        status = 0
        try:
            async with self.conn.stream(question.subject, question.payload, client_id=client) as stream:
                async for message in stream:
                    yield message
        except PresenceError as error:
            status = error.status
            raise
        except (asyncio.CancelledError, GeneratorExit):
            report("left", stream=question.stream)
            status = CANCELLED
            raise
        finally:
            report("ended", stream=question.stream, status=status)

    async def sse(self, request: Request) -> Response:
        client = request.query_params.get("client", "")
        try:
            question = Question.parse(request.query_params, client)
        except BadQuestionError as error:
            return PlainTextResponse(f"{error}\n", error.status)
        return SSEResponse(
            self.follow(question, client),
            keepalive=KEEPALIVE,
            write_timeout=USER_TIMEOUT,
            headers={"Access-Control-Allow-Origin": self.origin},
        )

    async def ws(self, socket: WebSocket) -> None:
        client = socket.query_params.get("client", "")
        try:
            check_id("client", client)
        except BadQuestionError as error:
            await socket.send_denial_response(PlainTextResponse(f"{error}\n", error.status))
            return
        await socket.accept()
        session = Session(self, socket, client)
        try:
            while True:
                session.handle(await socket.receive_text())
        except (WebSocketDisconnect, KeyError):  # KeyError: the browser sent bytes.
            pass
        except BadQuestionError as error:
            await socket.close(1008, str(error))
        finally:
            session.leave()


class Session:
    """A browser with a WebSocket."""

    def __init__(self, gateway: Gateway, socket: WebSocket, client: str) -> None:
        self.gateway, self.socket, self.client = gateway, socket, client
        self.streams: dict[str, asyncio.Task[None]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        """One that was cancelled runs for another moment."""

    def leave(self) -> None:
        for task in self.tasks:
            task.cancel()

    def handle(self, message: str) -> None:
        """Handles "ask QUESTION" and "leave STREAM"."""
        verb, _, rest = message.partition(" ")
        if verb == "leave":
            if task := self.streams.pop(rest, None):
                task.cancel()
        elif verb == "ask":
            self.ask(dict(parse_qsl(rest, keep_blank_values=True)))
        else:
            raise BadQuestionError('a message is not "ask QUESTION" or "leave STREAM"')

    def ask(self, values: Mapping[str, str]) -> None:
        name = values.get("stream", "")
        try:
            question = Question.parse(values, self.client)
            if name in self.streams:
                raise BadQuestionError(f"stream {name} runs already")
            if len(self.streams) == MAX_STREAMS:
                raise BadQuestionError(f"{MAX_STREAMS} streams run already, which is the limit")
        except BadQuestionError as error:
            known = name if re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name) else "-"
            self.start(self.write("failure", known, str(error)))
            return
        self.streams[name] = self.start(self.forward(name, question))

    def start(self, work: object) -> asyncio.Task[None]:
        task = asyncio.create_task(work)  # type: ignore[arg-type]
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def forward(self, name: str, question: Question) -> None:
        messages = self.gateway.follow(question, self.client)
        try:
            async for message in messages:
                await self.write("message", name, message.decode(errors="replace"))
            last = ("end", name, "")
        except PresenceError as error:
            last = ("failure", name, str(error))
        finally:
            await messages.aclose()  # type: ignore[attr-defined]
            if self.streams.get(name) is asyncio.current_task():
                del self.streams[name]
        await self.write(*last)

    async def write(self, kind: str, stream: str, text: str) -> None:
        """Waits while the browser does not read."""
        try:
            await self.socket.send_text(f"{kind} {stream} {text}")
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise asyncio.CancelledError from None  # The browser has left.


class Guard:
    """Lets only pages of the origin use the gateway, and refuses bodies."""

    def __init__(self, app: ASGIApp, origin: str) -> None:
        self.app, self.origin = app, origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            origin = headers.get(b"origin", b"").decode("latin-1")
            answer = None
            if origin and origin != self.origin:
                answer = PlainTextResponse(f'pages of "{origin[:80]}" may not use this gateway\n', 403)
            elif headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
                text = "a request has no body: the prompt is a parameter\n"
                answer = PlainTextResponse(text, 413, {"Connection": "close"})
            if answer and scope["type"] == "websocket":
                await WebSocket(scope, receive, send).send_denial_response(answer)
                return
            if answer:
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


def listen(address: str) -> socket.socket:
    """Opens the listening socket. The connections that it accepts inherit its options."""
    host, _, port = address.rpartition(":")
    listener = socket.create_server((host, int(port)), backlog=2048)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT * 1000)
    return listener


async def main(url: str, address: str, origin: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with aio.connect(url, name="Python gateway", heartbeat_ms=HEARTBEAT_MS) as conn:
        await conn.listen_offline()
        listener = listen(address)
        config = uvicorn.Config(
            Gateway(conn, origin).app(),
            log_level="critical",
            http="h11",
            ws="wsproto",
            ws_max_size=MAX_MESSAGE,
            ws_ping_interval=KEEPALIVE,
            ws_ping_timeout=USER_TIMEOUT,
            lifespan="off",
        )
        server = uvicorn.Server(config)
        report("ready", port=listener.getsockname()[1])
        serving = asyncio.create_task(server.serve([listener]))
        await asyncio.to_thread(sys.stdin.read)  # returns when the demo ends
        server.should_exit = server.force_exit = True
        await serving


asyncio.run(main(*sys.argv[1:]))
