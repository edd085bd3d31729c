"""An SSE gateway, with the standard library's asyncio only.

    curl -N http://127.0.0.1:8080/events                                    first event: the id of this client
    curl -d 'a question' -H 'X-Connect-ID: <id>' http://127.0.0.1:8080/ask   its answer comes as events there

When the connection of /events ends, the client is offline, and whoever works for it stops.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), PORT (8080; 0: a free one).
"""

import asyncio
import os
import uuid

from nats_presence import PresenceError, aio, session

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "answers")
PORT = int(os.environ.get("PORT", "8080"))

Client = asyncio.StreamWriter
clients: dict[str, Client] = {}


async def write_event(client: Client, kind: str, data: str) -> None:
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    client.write(f"event: {kind}\n{lines}\n".encode())
    await client.drain()


def respond(writer: asyncio.StreamWriter, status: str, body: str = "") -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())


async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Keeps a client's connection, until it leaves."""
    client_id = uuid.uuid4().hex
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n\r\n")
    with session(client_id):
        clients[client_id] = writer
        try:
            await write_event(writer, "connected", client_id)
            while await reader.read(1024):
                pass
        finally:
            del clients[client_id]
    print(f"{client_id}: left", flush=True)


async def ask(conn: aio.Connection, client_id: str, question: bytes) -> None:
    """Forwards the answer to the client's connection."""
    client, count = clients[client_id], 0
    try:
        async for message in conn.stream(SUBJECT, question, client_id=client_id, timeout=600):
            await write_event(client, "message", message.decode())
            count += 1
        await write_event(client, "end", "")
        print(f"{client_id}: forwarded all {count}", flush=True)
    except PresenceError as error:
        print(f"{client_id}: forwarded {count}: {error}", flush=True)
        if client_id in clients:
            await write_event(client, "error", str(error))


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
                elif (client_id := headers.get("x-connect-id", "")) not in clients:
                    respond(writer, "409 Conflict", "X-Connect-ID is no connected client\n")
                else:
                    question = await reader.readexactly(int(headers.get("content-length", "0")))
                    task = asyncio.create_task(ask(conn, client_id, question))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    respond(writer, "202 Accepted")
            except (ConnectionError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                pass  # It left, or does not speak HTTP.
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", PORT)
        print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            await server.serve_forever()


asyncio.run(main())
