"""One client at two gateways. Two sessions of one process: tests/c/offline_marks.c, tests/c/send_after_mark.c."""

from __future__ import annotations

import pytest
from harness import Connect, Shell

every_level = pytest.mark.parametrize("lanes", ["lanes=true", "lanes=false"])


def begin(gateway: Shell, worker: Shell, tag: int, client: str) -> int:
    gateway.do(f"request {tag} svc {client} x")
    n: int = worker.wait(event="REQUEST", client=client)["n"]
    worker.do(f"send {n} first")
    assert gateway.wait(event="DATA", tag=tag)["data"] == "first"
    return n


def goes_on(gateway: Shell, worker: Shell, tag: int, n: int) -> None:
    worker.do(f"send {n} more")
    assert gateway.wait(event="DATA", tag=tag)["data"] == "more"
    worker.do(f"end {n}")
    gateway.wait(event="END", tag=tag)


@every_level
@pytest.mark.parametrize("listens", [True, False], ids=["listens", "does not listen"])
def test_offline_mark_at_one_gateway_reaches_workers_and_listeners(connect: Connect, lanes: str, listens: bool) -> None:
    one, other, worker = connect("", lanes), connect("", lanes), connect("", lanes)
    worker.do("serve svc workers 0")
    other.do("watch")
    if listens:
        other.do("listen")
    other.do("online ann")
    assert other.wait(event="ONLINE")["client"] == "ann"
    mine, theirs, bob = begin(one, worker, 1, "ann"), begin(other, worker, 1, "ann"), begin(other, worker, 2, "bob")

    one.do("offline ann")
    assert one.wait(event="ERROR", tag=1)["status"] == "OFFLINE"
    # Both of ann's senders stop, whichever gateway requested them.
    assert {worker.wait(event="STOPPED", status="OFFLINE")["n"] for _ in range(2)} == {mine, theirs}
    for n in [mine, theirs]:
        assert worker.ask(f"send {n} more")["status"] == "OFFLINE"
    # The other gateway receives it by the announcement or from the worker; it withdraws a mark only if it listens.
    assert other.wait(event="ERROR", tag=1)["status"] == "OFFLINE"
    if listens:
        assert other.wait(event="OFFLINE")["client"] == "ann"
    assert other.ask("is_online ann")["text"] == ("no" if listens else "yes")
    # Other clients are unaffected, and the id may come back at once, at either gateway.
    goes_on(other, worker, 2, bob)
    goes_on(one, worker, 3, begin(one, worker, 3, "ann"))
    goes_on(other, worker, 3, begin(other, worker, 3, "ann"))
    # Each ended exactly once.
    for end, kind in [(one, "ERROR"), (other, "ERROR"), (worker, "STOPPED")]:
        assert end.take(event=kind) is None


def test_cancel_at_one_gateway_spares_the_other(connect: Connect) -> None:
    one, other, worker = connect(), connect(), connect()
    worker.do("serve svc workers 0")
    mine, theirs = begin(one, worker, 1, "ann"), begin(other, worker, 1, "ann")
    one.do("cancel 1")
    assert worker.wait(event="STOPPED")["n"] == mine
    goes_on(other, worker, 1, theirs)
    assert worker.take(event="STOPPED") is None


def test_level_0_cancel_takes_the_client_offline(connect: Connect) -> None:
    """Level 0 has no other message for it."""
    one, other, worker = (connect("", "lanes=false") for _ in range(3))
    worker.do("serve svc workers 0")
    begin(one, worker, 1, "ann")
    begin(other, worker, 1, "ann")
    one.do("cancel 1")
    assert one.wait(event="ERROR")["status"] == "CANCELLED"
    for _ in range(2):
        assert worker.wait(event="STOPPED")["status"] == "OFFLINE"
    error = other.wait(event="ERROR")
    assert (error["status"], error["data"]) == ("OFFLINE", "the client is offline")


def test_dead_gateway_ends_only_its_own_streams(connect: Connect) -> None:
    one, other, worker = (connect("", "peer_grace_ms=200", "heartbeat_ms=500") for _ in range(3))
    worker.do("serve svc workers 0")
    mine, theirs = begin(one, worker, 1, "ann"), begin(other, worker, 1, "ann")
    one.kill()
    stopped = worker.wait(event="STOPPED")
    assert (stopped["n"], stopped["status"]) == (mine, "PEER_GONE")
    assert worker.ask("is_online ann")["text"] == "yes"
    goes_on(other, worker, 1, theirs)
    assert worker.take(event="STOPPED") is None
