"""nats-server refuses a subscription: an exception at first, an event if it happens later."""

from __future__ import annotations

import asyncio
import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LIMIT, Server

import nats_presence
from nats_presence import ConnectionEvent, DisconnectedError, aio

USER = 'authorization {{ users: [{{ user: u, password: p, permissions: {{ publish: ">", subscribe: [{}] }} }}] }}'
ALWAYS = '"_INBOX.>", "client.offline"'
MORE = f'{ALWAYS}, "work"'


@pytest.fixture
def restricted(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, USER.format(MORE))
    yield server
    server.stop()


def allow(server: Server, subjects: str) -> None:
    (server.directory / "server.conf").write_text(USER.format(subjects))
    server.process.send_signal(signal.SIGHUP)


def of_work(event: ConnectionEvent, kind: str) -> bool:
    return (event.kind, event.subject) == (kind, "work")


def test_a_refused_service_is_accepted_again(restricted: Server) -> None:
    events: queue.Queue[ConnectionEvent] = queue.Queue()
    with nats_presence.connect(
        restricted.url, user="u", password="p", reconnect_max_ms=100, on_event=events.put
    ) as conn:
        with pytest.raises(DisconnectedError, match="Permissions Violation"):
            conn.service("other")(lambda request, sender: None)
        conn.service("work")(lambda request, sender: sender.send("done"))
        for subjects, kind in [(ALWAYS, "disconnected"), (MORE, "connected")]:
            allow(restricted, subjects)
            while not of_work(events.get(timeout=LIMIT), kind):
                pass
        assert list(conn.stream("work", retries=100)) == [b"done"]


def test_a_refused_asyncio_service_is_accepted_again(restricted: Server) -> None:
    async def main() -> None:
        events: asyncio.Queue[ConnectionEvent] = asyncio.Queue()
        url, on_event = restricted.url, events.put_nowait
        async with aio.connect(url, user="u", password="p", reconnect_max_ms=100, on_event=on_event) as conn:

            async def handler(request: nats_presence.Request, sender: aio.Sender) -> None:
                await sender.send("done")

            with pytest.raises(DisconnectedError, match="Permissions Violation"):
                await conn.serve("other", handler)
            await conn.serve("work", handler)
            for subjects, kind in [(ALWAYS, "disconnected"), (MORE, "connected")]:
                allow(restricted, subjects)
                while not of_work(await asyncio.wait_for(events.get(), LIMIT), kind):
                    pass
            assert [message async for message in conn.stream("work", retries=100)] == [b"done"]

    asyncio.run(main())
