"""Watching clients come online and go offline. A server is needed only for announcements of other processes."""

from __future__ import annotations

import asyncio
import threading
from queue import Queue

import pytest
from conftest import LIMIT, run_python, until, waits

import nats_presence
from nats_presence import (
    BusyError,
    FullError,
    PresenceEvent,
    aio,
    is_client_online,
    mark_client_offline,
    mark_client_online,
    online_count,
    session,
    watch,
)

MOST = 65_536


def come_and_go() -> list[PresenceEvent]:
    """Lets clients come online and go offline, and returns the expected events."""
    mark_client_online("Ünï")
    mark_client_online("Ünï")
    with session("tab"), session("tab"):
        pass
    mark_client_offline("Ünï")
    mark_client_offline("nobody")
    mark_client_online("")
    return [
        PresenceEvent("Ünï", True),
        PresenceEvent("tab", True),
        PresenceEvent("tab", False),
        PresenceEvent("Ünï", False),
    ]


def overflow() -> None:
    for number in range(MOST // 2 + 5):
        mark_client_online(f"{number}")
        mark_client_offline(f"{number}")


def test_every_watch_gets_all_events_in_order() -> None:
    with watch() as first, watch() as second:
        expected = come_and_go()
        for events in (first, second):
            assert [next(events) for _ in expected] == expected


def test_a_watch_gets_no_earlier_events() -> None:
    with session("before"), watch() as events, session("after"):
        assert next(events) == PresenceEvent("after", True)


def test_close_ends_the_wait_of_another_thread() -> None:
    events = watch()
    got: Queue[list[PresenceEvent]] = Queue()
    reader = threading.Thread(target=lambda: got.put(list(events)))
    reader.start()
    until(lambda: waits(events))
    with pytest.raises(BusyError):
        next(events)
    events.close()
    events.close()
    assert got.get(timeout=LIMIT) == []
    reader.join()


def test_a_watch_that_falls_behind_raises_full() -> None:
    with watch() as events:
        overflow()
        seen = []
        with pytest.raises(FullError, match="dropped"):
            while True:
                seen.append(next(events))
        assert len(seen) == MOST
        mark_client_online("after")
        assert next(events) == PresenceEvent("after", True)
        mark_client_offline("after")


def test_streams_and_announcements_cause_events(url: str) -> None:
    with nats_presence.connect(url) as worker, nats_presence.connect(url) as gateway, watch() as events:
        go = threading.Event()

        @worker.service("answers")
        def handler(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
            go.wait(LIMIT)

        stream = gateway.stream("answers", client_id="tab")
        assert next(events) == PresenceEvent("tab", True)
        code = """
import sys, nats_presence
with nats_presence.connect(sys.argv[1]) as conn:
    nats_presence.mark_client_offline("tab")
"""
        process = run_python(code, url)
        assert next(events) == PresenceEvent("tab", False)
        with pytest.raises(nats_presence.OfflineError):
            next(stream)
        go.set()
        process.communicate(timeout=LIMIT)


def test_an_asyncio_watch() -> None:
    async def main() -> None:
        async with aio.watch() as events, aio.watch() as others:
            waiting = asyncio.create_task(events.__anext__())
            await asyncio.sleep(0)
            expected = come_and_go()
            assert await asyncio.wait_for(waiting, LIMIT) == expected[0]
            assert [await events.__anext__() for _ in expected[1:]] == expected[1:]
            assert [await others.__anext__() for _ in expected] == expected
            waiting = asyncio.create_task(events.__anext__())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            two = [asyncio.create_task(events.__anext__()) for _ in range(2)]
            await asyncio.sleep(0)
            for online, mark in ((True, mark_client_online), (False, mark_client_offline)):
                mark("one")
                done, two = await asyncio.wait(two, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[assignment]
                assert [task.result() for task in done] == [PresenceEvent("one", online)]
            overflow()
            with pytest.raises(FullError, match="dropped"):
                while True:
                    await events.__anext__()
            mark_client_online("after")
            assert await events.__anext__() == PresenceEvent("after", True)
            assert len(others._ready) <= aio.BATCH, "unread events stay in the library's queue, which is bounded"
            mark_client_offline("after")
            reader = asyncio.create_task(all_of(events))
            await asyncio.sleep(0)
        assert await asyncio.wait_for(reader, LIMIT) == [PresenceEvent("after", False)]
        assert await all_of(events) == []
        assert not is_client_online("after")
        assert online_count() == 0

    asyncio.run(main())


async def all_of(events: aio.Watch) -> list[PresenceEvent]:
    return [event async for event in events]


FORKED = """
import asyncio, os, sys, nats_presence
from nats_presence import aio
events = nats_presence.watch()
pid = os.fork()
if pid == 0:
    try:
        next(events)
    except nats_presence.ForkedError:
        with nats_presence.watch() as own:
            nats_presence.mark_client_online("child's")
            sys.exit(7 if next(own) == ("child's", True) else 8)
    sys.exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
nats_presence.mark_client_online("parent's")
print(next(events))
"""


def test_a_forked_child_needs_its_own_watch() -> None:
    process = run_python(FORKED, "")
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err) == (0, """PresenceEvent(client_id="parent's", online=True)\n""", "")
