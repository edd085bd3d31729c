"""A status that the peer reports raises the same exception as if it had occurred in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from conftest import LIMIT, run_python
from test_process import SETUP, ready

import nats_presence
from nats_presence import BusyError, OfflineError, PresenceError, aio

WORKER = """
with nats_presence.connect(url, announce="never", lanes={lanes}) as conn:
    @conn.service("offline")
    def offline(request, sender):
        nats_presence.mark_client_offline(request.client_id)
    @conn.service("busy", max_streams=1)
    def busy(request, sender):
        sender.send("begun")
        while not sender.closed:
            time.sleep(0.01)
    print("ready", flush=True)
    conn.run()
"""


@pytest.fixture
def worker(url: str, lanes: bool) -> Iterator[None]:
    """A worker in a process of its own, which does not announce clients offline."""
    process = ready(run_python(SETUP + WORKER.format(lanes=lanes), url))
    yield
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(("subject", "kind"), [("offline", OfflineError), ("busy", BusyError)])
def test_the_peers_status_is_raised_in_threads(url: str, lanes: bool, subject: str, kind: type[PresenceError]) -> None:
    with nats_presence.connect(url, lanes=lanes) as conn:
        first = conn.stream(subject, client_id="tab", timeout=LIMIT)
        if kind is BusyError:
            assert next(first) == b"begun"
        with pytest.raises(kind):
            list(conn.stream(subject, client_id="other tab", timeout=LIMIT))


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(("subject", "kind"), [("offline", OfflineError), ("busy", BusyError)])
def test_the_peers_status_is_raised_in_asyncio(url: str, lanes: bool, subject: str, kind: type[PresenceError]) -> None:
    async def main() -> None:
        async with aio.connect(url, lanes=lanes) as conn:
            first = conn.stream(subject, client_id="tab", timeout=LIMIT)
            if kind is BusyError:
                assert await first.next() == b"begun"
            with pytest.raises(kind):
                await conn.stream(subject, client_id="other tab", timeout=LIMIT).next()

    asyncio.run(main())
