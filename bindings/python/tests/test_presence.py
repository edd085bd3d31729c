"""Marks and sessions, which need no server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

import nats_presence
from nats_presence import (
    InvalidError,
    is_client_online,
    mark_client_offline,
    mark_client_online,
    mark_clients_offline,
    mark_clients_online,
    online_count,
    session,
)

BAD_IDS = [None, 7, b"id", "x" * 1025, "é" * 513, "a\ud800", "a\nb", "a\x85", "\0", "a\0b"]


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    assert online_count() == 0
    yield
    assert online_count() == 0


def test_marks_are_idempotent() -> None:
    for client in ("a", "x" * 1024, "Ünïcødé-客户端", "with space"):
        assert not is_client_online(client)
        mark_client_online(client)
        mark_client_online(client)
        assert is_client_online(client)
        assert online_count() == 1
        mark_client_offline(client)
        mark_client_offline(client)
        assert not is_client_online(client)


def test_the_empty_id_is_always_online() -> None:
    mark_client_online("")
    mark_client_offline("")
    with session(""):
        assert online_count() == 0
    assert is_client_online("")


def test_many_clients_are_marked_in_one_call() -> None:
    clients = [*(f"client {number}" for number in range(1000)), "", "Ünï", "x" * 1024, "Ünï"]
    mark_clients_online(iter(clients))
    assert online_count() == 1002
    assert all(map(is_client_online, clients))
    mark_clients_online([])
    mark_clients_offline(clients[1:])
    assert is_client_online(clients[0])
    mark_clients_offline(clients[:1])
    with pytest.raises(InvalidError, match="pass a list"):
        mark_clients_online("abc")


def test_an_invalid_id_among_many_is_named_and_no_client_is_marked() -> None:
    mark_client_online("b")
    for function in (mark_clients_online, mark_clients_offline):
        with pytest.raises(InvalidError, match=r"^id 2: .*control character"):
            function(["a", "b", "c\n", "d"])
        with pytest.raises(InvalidError, match="client id"):
            function(["a", "b", "\ud800"])
        assert not is_client_online("a")
        assert is_client_online("b")
    mark_client_offline("b")


@pytest.mark.parametrize("client", BAD_IDS)
def test_invalid_client_ids_are_refused(client: str) -> None:
    for function in (mark_client_online, mark_client_offline, session):
        with pytest.raises(InvalidError) as caught:
            function(client)
        assert f"client id {client!r:.80}" in caught.value.message
        assert "1 to 1024 bytes of UTF-8 without control characters" in caught.value.message
        assert isinstance(caught.value, ValueError)
    assert not is_client_online(client)


def test_a_client_is_online_while_a_session_is_open() -> None:
    with session("c") as first:
        assert first.client_id == "c"
        second = session("c")
        assert online_count() == 1
        second.close()
        second.close()
        assert is_client_online("c")
    assert not is_client_online("c")


def test_a_mark_outlives_the_sessions_and_an_offline_mark_ends_them() -> None:
    with session("c"):
        mark_client_online("c")
    assert is_client_online("c")
    old = session("c")
    mark_client_offline("c")
    with session("c"):
        old.close()
        assert is_client_online("c")


def test_a_session_that_is_dropped_is_closed() -> None:
    kept = session("c")
    assert is_client_online("c")
    del kept
    assert not is_client_online("c")


def test_a_session_in_asyncio() -> None:
    async def main() -> None:
        async with session("c"):
            assert is_client_online("c")
        assert not is_client_online("c")

    asyncio.run(main())


def test_marks_from_many_threads() -> None:
    def work(number: int) -> None:
        for n in range(500):
            client = f"{number} {n}"
            mark_client_online(client)
            assert is_client_online(client)
            with session(client):
                mark_client_offline(client)
            assert not is_client_online(client)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_everything_public_has_a_docstring() -> None:
    for name in nats_presence.__all__:
        assert getattr(nats_presence, name).__doc__, name
