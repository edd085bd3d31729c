"""A network that delays, trickles, resets in mid-message, or loses everything in one direction.

Cuts at a chosen byte, lost messages, and long disconnections: tests/wire/test_*reconnect.py.
"""

from __future__ import annotations

import random
import time

import pytest
from harness import Connect
from proxy import Proxy
from scene import PEER_GONE, Scene, finish, within

each_end = pytest.mark.parametrize("whose", ["gateway", "worker"])
each_way = pytest.mark.parametrize("direction", ["to server", "to client"])

HEARTBEAT = 0.5
LATER = 2.0
"""Seconds that a busy machine may take longer."""


def urls(proxy: Proxy, whose: str) -> tuple[str, str]:
    """The URLs of the gateway and the worker; "" is the server itself."""
    return (proxy.url if whose == "gateway" else "", proxy.url if whose == "worker" else "")


@each_end
def test_slow_network_is_no_death(scene: Scene, proxy: Proxy, connect: Connect, whose: str) -> None:
    """A slow network is not taken for a dead peer, although an answer takes longer than a heartbeat."""
    of_gateway, of_worker = urls(proxy, whose)
    gateway = scene.gateway("c", "heartbeat_ms=400", url=of_gateway)
    worker = scene.worker("c", "heartbeat_ms=400", url=of_worker)
    watching = connect(proxy.url)
    proxy.delay = 0.15
    for client, count in [("ann", 1), ("bob", 2000)]:
        gateway.request("svc", client, f"count {count}")
        assert gateway.wait_for_end(client)["event"] == "end"
        assert gateway.received[client] == count
    assert watching.ask("stats")["connects"] == 1
    assert [worker.wait(event="done")["why"] for _ in range(2)] == [0] * 2
    proxy.delay = 0


@each_end
@pytest.mark.parametrize("piece", [1, 7])
def test_tiny_segments_are_reassembled(scene: Scene, proxy: Proxy, whose: str, piece: int) -> None:
    of_gateway, of_worker = urls(proxy, whose)
    proxy.piece = piece
    gateway, worker = scene.gateway("c", url=of_gateway), scene.worker("c", url=of_worker)
    for client in ["ann", "bob"]:
        gateway.request("svc", client, "count 1000")
    for client in ["ann", "bob"]:
        assert gateway.wait_for_end(client)["event"] == "end"
        assert gateway.received[client] == 1000
        assert worker.wait(event="done", client=client)["why"] == 0


def is_reset(scene: Scene, proxy: Proxy, whose: str, count: int) -> None:
    """At any byte of whatever is in flight: handshake, subscriptions, PINGs, data."""
    of_gateway, of_worker = urls(proxy, whose)
    # Ten resets in a row may let nothing through: the grace must cover that.
    options = ("reconnect_min_ms=10", "reconnect_max_ms=100", "peer_grace_ms=10000")
    gateway = scene.gateway("go", *options, url=of_gateway)
    worker = scene.worker("c", *options, url=of_worker)
    clients = ["ann", "bob", "cho"]
    for client in clients:
        gateway.request("svc", client)
    gateway.all_go_on(*clients)
    places = random.Random(whose)
    for _ in range(count // 10):
        for _ in range(10):
            proxy.reset_after(places.choice([1, 100, 1000, 10000]) + places.randrange(1000))
            assert proxy.wait_for_reset(20)
        gateway.all_go_on(*clients)
    finish(gateway, worker, *clients)


@each_end
def test_streams_survive_resets(scene: Scene, proxy: Proxy, whose: str) -> None:
    is_reset(scene, proxy, whose, 20)


@pytest.mark.long
@each_end
def test_streams_survive_many_resets(scene: Scene, proxy: Proxy, whose: str) -> None:
    is_reset(scene, proxy, whose, 100)


@each_end
def test_resets_end_level_0_streams_once(proxy: Proxy, connect: Connect, whose: str) -> None:
    """Each stream ends once, with an error and a clear status; what arrived is a prefix."""
    of_gateway, of_worker = urls(proxy, whose)
    options = ("lanes=false", "reconnect_min_ms=10", "reconnect_max_ms=100")
    gateway, worker = connect(of_gateway, *options), connect(of_worker, *options)
    worker.do("serve svc workers 0")
    cut, expected = (gateway, "DISCONNECTED") if whose == "gateway" else (worker, "REMOTE")
    places = random.Random(whose)
    for tag in range(1, 11):
        gateway.do(f"request {tag} svc c{tag} x")
        n = worker.wait(event="REQUEST", client=f"c{tag}")["n"]
        proxy.reset_after(places.randrange(500, 10000))
        worker.send_line(f"flood {n} 5000")
        worker.send_line(f"end {n}")
        assert proxy.wait_for_reset(20)
        received = 0
        while (event := gateway.wait(tag=tag))["event"] == "DATA":
            assert event["data"] == str(received)
            received += 1
        assert (event["event"], event["status"]) == ("ERROR", expected)
        assert received < 5000
        for _ in ["flood", "end"]:
            worker.wait(event="reply")
        cut.wait(event="CONNECTED")
        cut.do("listen")
    for tag in range(1, 11):
        assert gateway.take(tag=tag) is None


# A black hole in one direction ----------------------------------------------------------------------------------------


@each_way
@each_end
def test_one_way_black_hole_ends_the_streams(
    scene: Scene, proxy: Proxy, connect: Connect, whose: str, direction: str
) -> None:
    """Both ends detect it in the promised time; the end in the black hole also loses its connection."""
    of_gateway, of_worker = urls(proxy, whose)
    options = [f"heartbeat_ms={HEARTBEAT * 1000:.0f}"]
    gateway = scene.gateway("c", *options, url=of_gateway)
    worker = scene.worker("c", *options, url=of_worker)
    watching = connect(proxy.url, "ping_interval_ms=300")
    gateway.request("svc", "ann")
    gateway.all_go_on("ann")
    since = time.monotonic()
    proxy.hold(direction)
    assert gateway.wait_for_end("ann")["status"] == PEER_GONE
    done = worker.wait(event="done")
    assert (done["why"], done["accepted"]) == (PEER_GONE, 0)
    # Three heartbeats; the later end may be informed by the other, or detects it by itself.
    within(2 * HEARTBEAT, 3 * HEARTBEAT + LATER, since)
    watching.wait(event="DISCONNECTED")
    within(0.3, 4 * HEARTBEAT + LATER, since)
    assert gateway.received["ann"] <= done["sent"]
    # What was held arrives later, and has no effect.
    proxy.let_go()
    watching.wait(event="CONNECTED")
    gateway.request("svc", "bob")
    gateway.all_go_on("bob")
    assert worker.take(event="done") is None
    finish(gateway, worker, "bob")


@each_way
@each_end
def test_short_black_hole_is_no_death(scene: Scene, proxy: Proxy, connect: Connect, whose: str, direction: str) -> None:
    of_gateway, of_worker = urls(proxy, whose)
    options = ["heartbeat_ms=1000", "peer_grace_ms=200"]
    gateway = scene.gateway("c", *options, url=of_gateway)
    worker = scene.worker("c", *options, url=of_worker)
    clients = ["ann", "bob"]
    for client in clients:
        gateway.request("svc", client)
    gateway.all_go_on(*clients)
    proxy.hold(direction)
    time.sleep(1.2)
    proxy.let_go()
    gateway.all_go_on(*clients, count=100)
    finish(gateway, worker, *clients)


@each_end
def test_streams_survive_disconnections_within_the_grace(scene: Scene, proxy: Proxy, whose: str) -> None:
    """The connection breaks again and again; each time nats-server answers 503."""
    of_gateway, of_worker = urls(proxy, whose)
    options = ["peer_grace_ms=3000", "heartbeat_ms=2000", "reconnect_min_ms=10", "reconnect_max_ms=100"]
    gateway = scene.gateway("python", *options, url=of_gateway)
    worker = scene.worker("go", *options, url=of_worker)
    clients = ["ann", "bob"]
    for client in clients:
        gateway.request("svc", client)
    gateway.all_go_on(*clients)
    for _ in range(3):
        proxy.cut()
        time.sleep(0.2)
        proxy.resume()
        gateway.all_go_on(*clients)
    finish(gateway, worker, *clients)
