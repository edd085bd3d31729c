"""nats-server is restarted under load, is stopped, becomes a lame duck, or starts late.

A restart in every pair of languages: tests/e2e. Twenty restarts under 200 streams: test_lanes.py and process_test.go of
the bindings, tests/c/restarts_under_load.c. Exact bytes, and losses on level 0: tests/wire/test_*reconnect.py.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from harness import Connect, Server, run, server_binary
from scene import DISCONNECTED, LANGUAGES, PEER_GONE, SOON, Scene, begin, finish, stopped, within


def restarts_under_load(server: Server, scene: Scene, connect: Connect, count: int) -> None:
    # From each language to another one.
    pairs = []
    for gateway_language, worker_language in zip(LANGUAGES, LANGUAGES[1:] + LANGUAGES[:1]):
        subject = f"svc.{worker_language}"
        pairs.append(
            (
                scene.gateway(gateway_language, *SOON),
                scene.worker(worker_language, *SOON, subject=subject),
                [f"{worker_language}{i}" for i in range(3)],
            )
        )
        gateway, _, clients = pairs[-1]
        for client in clients:
            gateway.request(subject, client)
    # One gateway and one worker on level 0; the gateway has clients marked online.
    old_gateway, old_worker = connect("", "lanes=false", *SOON), connect("", "lanes=false", *SOON)
    old_worker.do("serve old workers 0")
    for end in [old_gateway, old_worker]:
        end.do("online marked")
        end.do("session open")
        end.do("watch")

    for gateway, _, clients in pairs:
        gateway.all_go_on(*clients)
    for tag in range(1, count + 1):
        old_gateway.do(f"request {tag} old old{tag} x")
        n = old_worker.wait(event="REQUEST")["n"]
        old_worker.do(f"flood {n} 10")
        server.kill()
        server.start()
        # Level 0: the stream ends with a clear status at both ends; what arrived is a prefix of what was sent.
        assert old_gateway.wait(event="ERROR")["status"] == "DISCONNECTED"
        assert old_worker.wait(event="STOPPED", n=n)["status"] == "DISCONNECTED"
        data = []
        while message := old_gateway.take(event="DATA", tag=tag):
            data.append(message["data"])
        assert data == [str(i) for i in range(len(data))]
        for end in [old_gateway, old_worker]:
            end.wait(event="CONNECTED")
            end.do("listen")
        for gateway, _, clients in pairs:
            gateway.all_go_on(*clients)
    for end in [old_gateway, old_worker]:
        assert end.ask("stats")["connects"] == count + 1
        assert end.ask("is_online marked")["text"] == end.ask("is_online open")["text"] == "yes"
        # Only the clients of the ended streams went offline, once each.
        gone = [event["client"] for event in end.events if event["event"] == "OFFLINE"]
        assert gone == [f"old{tag}" for tag in range(1, count + 1)]
    for kind in ["ERROR", "END", "STOPPED"]:
        assert old_gateway.take(event=kind) is old_worker.take(event=kind) is None
    for gateway, worker, clients in pairs:
        finish(gateway, worker, *clients)


def test_no_false_death_in_20_restarts_under_load(server: Server, scene: Scene, connect: Connect) -> None:
    restarts_under_load(server, scene, connect, 20)


@pytest.mark.long
def test_no_false_death_in_100_restarts_under_load(server: Server, scene: Scene, connect: Connect) -> None:
    restarts_under_load(server, scene, connect, 100)


@pytest.mark.parametrize("language", LANGUAGES)
def test_level_0_streams_end_with_a_clear_status(server: Server, scene: Scene, language: str) -> None:
    gateway, worker = scene.gateway(language, lanes=False), scene.worker(language, lanes=False)
    clients = ["ann", "bob", "cho"]
    for client in clients:
        gateway.request("svc", client)
    gateway.all_go_on(*clients)
    server.kill()
    for client in clients:
        ended = gateway.wait_for_end(client)
        assert (ended["event"], ended["status"]) == ("error", DISCONNECTED)
        done = worker.wait(event="done", client=client)
        assert (done["why"], done["accepted"]) == (DISCONNECTED, 0)
        assert gateway.received[client] <= done["sent"]
    server.start()
    finish(gateway, worker, begin(gateway))


# A stopped server -----------------------------------------------------------------------------------------------------


def test_short_server_stop_loses_nothing(server: Server, scene: Scene, connect: Connect) -> None:
    options = ("heartbeat_ms=1000", "ping_interval_ms=1500")
    gateway, worker = scene.gateway("go", *options), scene.worker("python", *options)
    old_gateway, old_worker = connect("", "lanes=false", *options), connect("", "lanes=false", *options)
    old_worker.do("serve old workers 0")
    old_gateway.do("request 1 old old x")
    n = old_worker.wait(event="REQUEST")["n"]
    gateway.request("svc", "ann")
    gateway.all_go_on("ann")
    with stopped(server):
        old_worker.do(f"flood {n} 1000")
        old_worker.do(f"end {n}")
        time.sleep(1.5)
    # It was slow; nothing is lost, on either level.
    gateway.all_go_on("ann", count=100)
    assert [old_gateway.wait(event="DATA")["data"] for _ in range(1000)] == [str(i) for i in range(1000)]
    old_gateway.wait(event="END")
    for end in [old_gateway, old_worker]:
        assert end.ask("stats")["connects"] == 1
    finish(gateway, worker, "ann")


def test_stopped_server_is_lost_after_two_pings(server: Server, scene: Scene, connect: Connect) -> None:
    stands_still_until_lost(server, scene, connect, ping=0.3, heartbeat=5.0, most=2.0)


@pytest.mark.long
def test_stopped_server_is_lost_after_30_seconds(server: Server, scene: Scene, connect: Connect) -> None:
    stands_still_until_lost(server, scene, connect, ping=8.0, heartbeat=15.0, most=30.0)


def stands_still_until_lost(
    server: Server, scene: Scene, connect: Connect, ping: float, heartbeat: float, most: float
) -> None:
    """It is lost after two unanswered pings: events report it, level 0 ends, and lanes go on when it resumes."""
    options = (f"heartbeat_ms={heartbeat * 1000:.0f}", f"ping_interval_ms={ping * 1000:.0f}", "connect_timeout_ms=500")
    gateway, worker = scene.gateway("python", *options), scene.worker("go", *options)
    old_gateway, old_worker = connect("", "lanes=false", *options), connect("", "lanes=false", *options)
    old_worker.do("serve old workers 0")
    old_gateway.do("request 1 old old x")
    old_worker.wait(event="REQUEST")
    gateway.request("svc", "ann")
    gateway.all_go_on("ann")
    since = time.monotonic()
    with stopped(server):
        for end in [old_gateway, old_worker]:
            end.wait(event="DISCONNECTED", timeout=most)
        # The first PING may have been sent before, and the second is missed in the third interval.
        within(ping, 3 * ping + 1, since)
        assert old_gateway.wait(event="ERROR")["status"] == "DISCONNECTED"
        assert old_worker.wait(event="STOPPED")["status"] == "DISCONNECTED"
        assert old_gateway.ask("request 2 old old x")["status"] == "DISCONNECTED"
        time.sleep(max(0.0, most - (time.monotonic() - since)))
        assert not gateway.ended
    for end in [old_gateway, old_worker]:
        end.wait(event="CONNECTED")
    gateway.all_go_on("ann", count=100)
    finish(gateway, worker, "ann")


def test_stopped_server_ends_streams_after_three_heartbeats(server: Server, scene: Scene) -> None:
    """Neither end can tell this from a dead peer: streams end, as documented; afterwards new streams work."""
    options = ("heartbeat_ms=300",)
    gateway, worker = scene.gateway("c", *options), scene.worker("asyncio", *options)
    gateway.request("svc", "ann")
    gateway.all_go_on("ann")
    since = time.monotonic()
    with stopped(server):
        assert gateway.wait_for_end("ann")["status"] == PEER_GONE
        assert worker.wait(event="done")["why"] == PEER_GONE
        within(0.6, 2, since)
    gateway.request("svc", "bob")
    gateway.all_go_on("bob")
    finish(gateway, worker, "bob")


def test_close_times_out_while_the_server_is_stopped(server: Server, connect: Connect) -> None:
    end = connect()
    end.do("offline somebody")
    with stopped(server):
        since = time.monotonic()
        assert end.ask("close 300")["status"] == "TIMEOUT"
        within(0.25, 2, since)


# A lame duck, and a late server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["signal", "command"])
def test_streams_survive_a_lame_duck(server: Server, scene: Scene, connect: Connect, tmp_path: Path, how: str) -> None:
    """It announces its end, accepts no connections, and closes one a second: so one end is away for longer."""
    settings = tmp_path / "server.conf"
    settings.write_text("lame_duck_grace_period: 100ms\nlame_duck_duration: 30s\n")
    server.kill()
    server.start("-c", str(settings))
    options = ("peer_grace_ms=10000", *SOON)
    gateway, worker = scene.gateway("python", *options), scene.worker("c", *options)
    old = connect("", "lanes=false", *SOON)
    gateway.request("svc", "ann")
    gateway.all_go_on("ann")
    if how == "signal":
        server.process.send_signal(signal.SIGUSR2)
    else:
        run(server_binary(), "--signal", f"ldm={server.process.pid}")
    while "lame duck" not in old.wait(event="LOG")["data"]:
        pass
    old.wait(event="DISCONNECTED")
    server.process.wait(20)
    server.start()
    old.wait(event="CONNECTED")
    gateway.all_go_on("ann", count=100)
    finish(gateway, worker, "ann")


@pytest.mark.parametrize("language", LANGUAGES)
def test_processes_wait_for_a_late_server(server: Server, scene: Scene, connect: Connect, language: str) -> None:
    server.kill()
    options = ("retry_on_initial_connect=true", *SOON)
    since = time.monotonic()
    gateway, worker = scene.gateway(language, *options), scene.worker(language, *options)
    watching = connect("", *options)
    # Connecting does not wait; without the option it would fail at once.
    assert watching.ask("request 1 svc early x")["status"] == "DISCONNECTED"
    within(0, 10, since)
    assert watching.take(event="CONNECTED") is None
    server.start()
    watching.wait(event="CONNECTED")
    finish(gateway, worker, begin(gateway))
