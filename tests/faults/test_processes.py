"""A gateway or a worker is killed or stopped: the other end detects it in time, not earlier, and once.

The shortest detection times, over hundreds of kills: tests/c/detection_time.c; more in C: tests/c/peer_death.c; within
one language: TestKilledOrStoppedPeerIsGone, test_lanes.py.
"""

from __future__ import annotations

import time

import pytest
from harness import Connect, Program, Server
from proxy import Proxy
from scene import LANGUAGES, PEER_GONE, SOON, Gateway, Scene, finish, stopped, within

OTHER = dict(zip(LANGUAGES, LANGUAGES[1:] + LANGUAGES[:1]))
"""The language of the other end."""

GRACE, HEARTBEAT = 0.4, 0.4
OPTIONS = (f"peer_grace_ms={GRACE * 1000:.0f}", f"heartbeat_ms={HEARTBEAT * 1000:.0f}")
LATER = 2.0
"""Seconds that a busy machine may take longer."""

CLIENTS = ["ann", "bob", "cho"]

every_language = pytest.mark.parametrize("language", LANGUAGES)
each_end = pytest.mark.parametrize("whose", ["gateway", "worker"])


def both(scene: Scene, language: str, whose: str) -> tuple[Gateway, Program]:
    """The end under test is in this language, the other end in another."""
    of_worker = language if whose == "worker" else OTHER[language]
    of_gateway = language if whose == "gateway" else OTHER[language]
    worker = scene.worker(of_worker, *OPTIONS)
    gateway = scene.gateway(of_gateway, *OPTIONS)
    for client in CLIENTS:
        gateway.request("svc", client)
    gateway.all_go_on(*CLIENTS)
    return gateway, worker


def all_are_gone(gateway: Gateway | None, worker: Program | None) -> None:
    for client in CLIENTS:
        if gateway:
            ended = gateway.wait_for_end(client)
            assert (ended["event"], ended["status"]) == ("error", PEER_GONE)
        if worker:
            done = worker.wait(event="done", client=client)
            assert (done["why"], done["accepted"]) == (PEER_GONE, 0)


def nothing_more(worker: Program) -> None:
    assert worker.take(event="done") is None


@each_end
@every_language
def test_killed_peer_is_gone_after_the_grace(scene: Scene, language: str, whose: str) -> None:
    gateway, worker = both(scene, language, whose)
    since = time.monotonic()
    if whose == "worker":
        worker.kill()
        all_are_gone(gateway, None)
        within(GRACE, GRACE + LATER, since)
        # The next worker serves.
        worker = scene.worker(language, *OPTIONS)
    else:
        gateway.kill()
        all_are_gone(None, worker)
        within(GRACE, GRACE + LATER, since)
        nothing_more(worker)
        gateway = scene.gateway(language, *OPTIONS)
    gateway.request("svc", "next")
    gateway.all_go_on("next")
    finish(gateway, worker, "next")


def all_pairs(scene: Scene, *options: str) -> list[tuple[Gateway, Program, list[str]]]:
    """Running streams from each language to another one."""
    pairs = []
    for of_gateway, of_worker in OTHER.items():
        gateway = scene.gateway(of_gateway, *options)
        worker = scene.worker(of_worker, *options, subject=f"svc.{of_worker}")
        for client in CLIENTS:
            gateway.request(f"svc.{of_worker}", client)
        gateway.all_go_on(*CLIENTS)
        pairs.append((gateway, worker, CLIENTS))
    return pairs


def stands_still_within_the_grace(scene: Scene, whose: str, heartbeat: float, rounds: int) -> None:
    pairs = all_pairs(scene, f"heartbeat_ms={heartbeat * 1000:.0f}")
    for _ in range(rounds):
        with stopped(*[gateway if whose == "gateway" else worker for gateway, worker, _ in pairs]):
            time.sleep(1.5 * heartbeat)
        for gateway, _, clients in pairs:
            gateway.all_go_on(*clients)
    for gateway, worker, clients in pairs:
        finish(gateway, worker, *clients)


@each_end
def test_short_stop_is_no_death(scene: Scene, whose: str) -> None:
    stands_still_within_the_grace(scene, whose, heartbeat=1.0, rounds=1)


@pytest.mark.long
@each_end
def test_many_short_stops_are_no_death(scene: Scene, whose: str) -> None:
    stands_still_within_the_grace(scene, whose, heartbeat=0.8, rounds=20)


@each_end
@every_language
def test_stopped_peer_is_gone_after_three_heartbeats(scene: Scene, language: str, whose: str) -> None:
    gateway, worker = both(scene, language, whose)
    since = time.monotonic()
    with stopped(gateway if whose == "gateway" else worker):
        if whose == "gateway":
            all_are_gone(None, worker)
        else:
            all_are_gone(gateway, None)
        # The first of three heartbeats may have begun before.
        within(2 * HEARTBEAT, 3 * HEARTBEAT + LATER, since)
    # The stopped end learns of it, too, and both go on.
    if whose == "gateway":
        all_are_gone(gateway, None)
    else:
        all_are_gone(None, worker)
    gateway.request("svc", "next")
    gateway.all_go_on("next")
    nothing_more(worker)
    finish(gateway, worker, "next")


@each_end
def test_grace_that_expires_while_stopped_is_no_death(scene: Scene, proxy: Proxy, connect: Connect, whose: str) -> None:
    """The other end was away and is back in time: this one reads its messages before it judges."""
    options = ("peer_grace_ms=1500", *SOON)
    worker = scene.worker("c", *options, url=proxy.url if whose == "gateway" else "")
    gateway = scene.gateway("c", *options, url=proxy.url if whose == "worker" else "")
    other_way = connect(proxy.url, *SOON)
    gateway.request("svc", "ann")
    gateway.all_go_on("ann")
    proxy.cut()
    other_way.wait(event="DISCONNECTED")
    # Time for the 503.
    time.sleep(0.2)
    with stopped(gateway if whose == "gateway" else worker):
        proxy.resume()
        other_way.wait(event="CONNECTED")
        time.sleep(1.8)
    gateway.all_go_on("ann", count=100)
    finish(gateway, worker, "ann")


def is_suspended(server: Server, scene: Scene, order: str, heartbeat: float, rounds: int) -> None:
    pairs = all_pairs(scene, f"heartbeat_ms={heartbeat * 1000:.0f}", "peer_grace_ms=200")
    gateways, workers = [gateway for gateway, _, _ in pairs], [worker for _, worker, _ in pairs]
    orders: dict[str, list[Program | Server]] = {
        "server first": [server, *gateways, *workers],
        "workers first": [*workers, server, *gateways],
        "gateways first": [*gateways, *workers, server],
    }
    for _ in range(rounds):
        with stopped(*orders[order]):
            time.sleep(4 * heartbeat)
        for gateway, _, clients in pairs:
            gateway.all_go_on(*clients)
    for gateway, worker, clients in pairs:
        finish(gateway, worker, *clients)


@pytest.mark.parametrize("order", ["server first", "workers first", "gateways first"])
def test_suspended_machine_causes_no_death(server: Server, scene: Scene, order: str) -> None:
    """All are stopped for longer than three heartbeats and resumed in this order: one late heartbeat, no death."""
    is_suspended(server, scene, order, heartbeat=0.5, rounds=1)


@pytest.mark.long
def test_often_suspended_machine_causes_no_death(server: Server, scene: Scene) -> None:
    is_suspended(server, scene, "gateways first", heartbeat=0.5, rounds=15)
