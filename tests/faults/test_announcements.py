"""Announcements around a restart of nats-server: who reconnects late hears of them, and nobody twice."""

from __future__ import annotations

from harness import Connect, Server
from scene import stopped

OPTIONS = ("reconnect_min_ms=10", "reconnect_max_ms=1000")


def test_who_reconnects_late_hears_what_was_announced_meanwhile(connect: Connect, server: Server) -> None:
    announcer, late, early = (connect("", *OPTIONS) for _ in range(3))
    for listener in [late, early]:
        listener.do("listen")
        listener.do("watch")
        for client in ["ann", "bob"]:
            listener.do(f"online {client}")
            assert listener.wait(event="ONLINE")["client"] == client
    with stopped(late):
        server.kill()
        server.start()
        for on_time in [announcer, early]:
            on_time.wait(event="CONNECTED")
        early.do("listen")
        for client in ["bob", "cho", "ann"]:
            announcer.do(f"offline {client}")
        announcer.do("online bob")
        for client in ["bob", "ann"]:
            assert early.wait(event="OFFLINE")["client"] == client
        early.do("online ann")
    late.wait(event="CONNECTED")
    late.do("session cho")
    assert late.wait(event="ONLINE")["client"] == "cho"
    # reconnect_max_ms and 2 s after the announcer came back.
    assert late.wait(event="OFFLINE")["client"] == "ann"
    # Not a client who is back where it was announced, and not what began here since the reconnect.
    assert late.ask("is_online bob")["text"] == "yes"
    assert late.ask("is_online cho")["text"] == "yes"
    # Who heard it at its time is not told once more: the client has come back since.
    early.do("listen")
    assert early.ask("is_online ann")["text"] == "yes"
