"""A gateway for server-sent events that needs only nats_presence and the standard library.

    curl -N http://127.0.0.1:8080/events                                    the first event is the client's id
    curl -d 'a question' -H 'X-Connect-ID: <id>' http://127.0.0.1:8080/ask   the answer arrives as events of the first

When the connection to /events ends, the client is offline, and its workers stop. A client that vanishes without closing
its connection is detected, too: the gateway sends a comment every KEEPALIVE seconds, and the kernel closes a connection
whose data is not acknowledged within that time.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), PORT (8080; 0: any free port), KEEPALIVE (15).
"""

import asyncio
import os
import re
import socket
import uuid
from contextlib import suppress

from nats_presence import Client, PresenceError, aio, client

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "answers")
PORT = int(os.environ.get("PORT", "8080"))
KEEPALIVE = float(os.environ.get("KEEPALIVE", "15"))

clients: dict[str, tuple[Client, asyncio.StreamWriter]] = {}


async def write_event(browser: asyncio.StreamWriter, kind: str, data: str) -> None:
    """Sends an event. Each line break starts a new data line; otherwise a message could forge other events."""
    lines = "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", data))
    browser.write(f"event: {kind}\n{lines}\n".encode())
    await browser.drain()


def respond(writer: asyncio.StreamWriter, status: str, body: str = "") -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())


def listen() -> socket.socket:
    """Opens the listening socket. The connections that it accepts inherit its options."""
    listener = socket.create_server(("127.0.0.1", PORT))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(KEEPALIVE)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(KEEPALIVE / 3)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(KEEPALIVE * 1000))
    return listener


async def wait_until_it_leaves(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):  # The client may have reset the connection, or vanished.
        while await reader.read(1024):
            pass


async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Keeps a client's connection until the client leaves."""
    client_id = uuid.uuid4().hex
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n\r\n")
    leaving = asyncio.create_task(wait_until_it_leaves(reader))
    with client(client_id) as connected:
        clients[client_id] = connected, writer
        try:
            await write_event(writer, "connected", client_id)
            while not leaving.done():
                if not writer.transport.get_write_buffer_size():  # Otherwise there is data to acknowledge.
                    writer.write(b": keep-alive\n\n")
                await asyncio.wait([leaving], timeout=KEEPALIVE)
        finally:
            leaving.cancel()
            del clients[client_id]
    print(f"{client_id}: left", flush=True)


async def ask(conn: aio.Connection, connected: Client, browser: asyncio.StreamWriter, question: bytes) -> None:
    """Forwards the answer to the client's connection. If the client has left meanwhile, the request fails."""
    client_id, count = connected.client_id, 0
    try:
        async with connected.stream(conn, SUBJECT, question, timeout=600) as stream:
            async for message in stream:
                await write_event(browser, "message", message.decode(errors="replace"))
                count += 1
        await write_event(browser, "end", "")
        print(f"{client_id}: forwarded all {count}", flush=True)
    except (PresenceError, OSError) as error:
        print(f"{client_id}: forwarded {count}: {error}", flush=True)
        if connected.online:  # An incomplete answer must not look complete.
            with suppress(OSError):
                await write_event(browser, "failure", "the answer is incomplete")


async def main() -> None:
    tasks = set()
    async with aio.connect(URL, name="example gateway", on_event=print) as conn:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, *_ = first.split()
                fields = (line.partition(":") for line in lines)
                headers = {name.strip().lower(): value.strip() for name, _, value in fields}
                if (method, path) == ("GET", "/events"):
                    await events(reader, writer)
                elif (method, path) != ("POST", "/ask"):
                    respond(writer, "404 Not Found")
                elif (asking := clients.get(headers.get("x-connect-id", ""))) is None:
                    respond(writer, "409 Conflict", "X-Connect-ID does not name a connected client\n")
                else:
                    question = await reader.readexactly(int(headers.get("content-length", "0")))
                    task = asyncio.create_task(ask(conn, *asking, question))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    respond(writer, "202 Accepted")
            except (ConnectionError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                pass  # The client left, or does not speak HTTP.
            finally:
                writer.close()

        server = await asyncio.start_server(serve, sock=listen())
        print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            await server.serve_forever()


asyncio.run(main())
