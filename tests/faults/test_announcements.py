"""Announcements around a restart of nats-server: late processes receive them, and none takes effect twice."""

from __future__ import annotations

from harness import Connect, Server
from scene import stopped

OPTIONS = ("reconnect_min_ms=10", "reconnect_max_ms=1000")


def test_late_reconnect_receives_missed_announcements(connect: Connect, server: Server) -> None:
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
    # reconnect_max_ms and 2 s after the announcer reconnected.
    assert late.wait(event="OFFLINE")["client"] == "ann"
    # Neither a client that is online again where it was announced, nor one that came online here since the reconnect.
    assert late.ask("is_online bob")["text"] == "yes"
    assert late.ask("is_online cho")["text"] == "yes"
    # A listener that received it in time ignores the repetition: the client has come back since.
    early.do("listen")
    assert early.ask("is_online ann")["text"] == "yes"
