"""Servers in a cluster: an end whose server dies goes on at another one."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import TIMEOUT, Connect, Server, Shell, steady_port
from scene import PEER_GONE, SOON, Gateway, Scene, begin, finish, stopped, within

CLIENTS = ["ann", "bob", "cho"]
GRACE = 0.4
ONLY_503 = (f"peer_grace_ms={GRACE * 1000:.0f}", "heartbeat_ms=60000")
LEAVING = [f"leaving{i}" for i in range(10)]
LATER = 2.0
"""Seconds that a busy machine may take longer."""


class Cluster:
    """`count` servers that are all connected to each other."""

    def __init__(self, count: int, stack: ExitStack, *arguments: str) -> None:
        routes = [f"nats://127.0.0.1:{steady_port()}" for _ in range(count)]
        self.servers = [
            Server(
                "--cluster_name",
                "test",
                "--cluster",
                route,
                "--routes",
                ",".join(routes),
                "-D",
                *arguments,
                port=steady_port(),
            )
            for route in routes
        ]
        for server in self.servers:
            stack.callback(server.kill)
        for server in self.servers:
            self.wait_for_routes(server, count - 1)

    def wait_for_routes(self, server: Server, count: int) -> None:
        """Waits until the server's log names `count` other servers."""
        deadline = time.monotonic() + TIMEOUT
        while len(set(re.findall(r'Registering remote route "(\w+)"\n', "".join(server.log)))) < count:
            assert time.monotonic() < deadline, "".join(server.log)
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(getattr(request, "param", 2), stack)


@pytest.fixture
def scene(cluster: Cluster) -> Iterator[Scene]:
    with Scene(cluster.url) as scene:
        yield scene


@pytest.mark.parametrize("whose", ["gateway", "worker", "both"])
def test_streams_move_to_another_server(cluster: Cluster, scene: Scene, whose: str) -> None:
    """The end goes on at the other server, which the first has advertised."""
    dies, stays = cluster.servers
    worker = scene.worker("c", *SOON, url=dies.url if whose != "gateway" else stays.url)
    gateway = scene.gateway("python", *SOON, url=dies.url if whose != "worker" else stays.url)
    late = begin(gateway)
    for client in CLIENTS:
        gateway.request("svc", client)
    gateway.all_go_on(*CLIENTS)
    dies.kill()
    gateway.all_go_on(late, *CLIENTS, count=100)
    finish(gateway, worker, late, *CLIENTS)


def test_streams_survive_unresponsive_servers(cluster: Cluster) -> None:
    """With defaults, neither end gives the other up while it looks for a server that answers."""
    dies, stays = cluster.servers
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        urls = [dies.url, *(f"nats://127.0.0.1:{listener.getsockname()[1]}" for listener in silent), stays.url]
        scene = stack.enter_context(Scene(",".join(urls)))
        worker, gateway = scene.worker("c"), scene.gateway("python")
        client = begin(gateway)
        dies.kill()
        gateway.all_go_on(client, count=100)
        finish(gateway, worker, client)


@pytest.mark.parametrize("whose", ["gateway", "worker"])
def test_level_0_streams_end_with_their_server(cluster: Cluster, connect: Connect, whose: str) -> None:
    dies, stays = cluster.servers
    options = ("lanes=false", *SOON)
    worker = connect((dies if whose == "worker" else stays).url, *options)
    gateway = connect((dies if whose == "gateway" else stays).url, *options)
    worker.do("serve svc workers 0")
    n = ask(gateway, worker, 1)
    for end in [gateway, worker]:
        end.do("online marked")
    dies.kill()
    moved = worker if whose == "worker" else gateway
    assert moved.wait(event="CONNECTED")["data"] == f"127.0.0.1:{stays.port}"
    # The end that was cut off ends the stream, and informs the other end.
    error = gateway.wait(event="ERROR")
    assert error["status"] == ("REMOTE" if whose == "worker" else "DISCONNECTED")
    assert worker.wait(event="STOPPED", n=n)["status"] == ("DISCONNECTED" if whose == "worker" else "OFFLINE")
    for end in [gateway, worker]:
        assert end.ask("is_online marked")["text"] == "yes"
    n = ask(gateway, worker, 2)
    worker.do(f"end {n}")
    gateway.wait(event="END", tag=2)
    assert gateway.take(event="ERROR") is worker.take(event="STOPPED") is None


def ask(gateway: Shell, worker: Shell, tag: int) -> int:
    """Starts a stream and returns its number."""
    gateway.do("option retries 200")
    gateway.do("option retry_delay_ms 20")
    gateway.do(f"request {tag} svc c{tag} x")
    n: int = worker.wait(event="REQUEST", client=f"c{tag}")["n"]
    worker.do(f"send {n} first")
    assert gateway.wait(event="DATA", tag=tag)["data"] == "first"
    return n


def test_streams_leave_a_stopped_server(cluster: Cluster, scene: Scene) -> None:
    """It is lost after two unanswered pings; lanes go on at the other server."""
    still, well = cluster.servers
    options = (*SOON, "ping_interval_ms=300", "heartbeat_ms=5000", "connect_timeout_ms=300")
    worker = scene.worker("go", *options, url=still.url)
    gateway = scene.gateway("c", *options, url=well.url)
    client = begin(gateway)
    with stopped(still):
        # More than was in flight.
        gateway.all_go_on(client, count=500)
        finish(gateway, worker, client)


def test_streams_leave_a_lame_duck(tmp_path: Path) -> None:
    """It closes one connection a second; each of them goes on at the other server at once."""
    settings = tmp_path / "server.conf"
    settings.write_text("lame_duck_grace_period: 100ms\nlame_duck_duration: 30s\n")
    with ExitStack() as stack:
        cluster = Cluster(2, stack, "-c", str(settings))
        scene = stack.enter_context(Scene(cluster.url))
        leaves, _ = cluster.servers
        worker, gateway = scene.worker("go", *SOON, url=leaves.url), scene.gateway("c", *SOON, url=leaves.url)
        client = begin(gateway)
        leaves.process.send_signal(signal.SIGUSR2)
        leaves.process.wait(TIMEOUT)
        gateway.all_go_on(client, count=100)
        finish(gateway, worker, client)


def rolling_restarts(cluster: Cluster, scene: Scene, rounds: int) -> None:
    """One server after the other is killed and restarted; another one is always available."""
    pairs = []
    for of_gateway, of_worker in [("c", "python"), ("go", "c"), ("asyncio", "go")]:
        worker = scene.worker(of_worker, *SOON, subject=f"svc.{of_worker}")
        gateway = scene.gateway(of_gateway, *SOON)
        pairs.append((gateway, worker, begin(gateway, f"svc.{of_worker}")))
    for server in cluster.servers * rounds:
        server.kill()
        for gateway, _, client in pairs:
            gateway.all_go_on(client, count=100)
        server.start()
        cluster.wait_for_routes(server, len(cluster.servers) - 1)
    for gateway, worker, client in pairs:
        finish(gateway, worker, client)


@pytest.mark.parametrize("cluster", [2, 3], indirect=True)
def test_streams_survive_rolling_restarts(cluster: Cluster, scene: Scene) -> None:
    rolling_restarts(cluster, scene, 1)


@pytest.mark.long
@pytest.mark.parametrize("cluster", [2, 3], indirect=True)
def test_streams_survive_ten_rolling_restarts(cluster: Cluster, scene: Scene) -> None:
    rolling_restarts(cluster, scene, 10)


@pytest.mark.parametrize("whose", ["gateway", "worker"])
def test_killed_peer_on_another_server_is_gone(cluster: Cluster, scene: Scene, whose: str) -> None:
    """The other server's 503 comes over the route, and means the same."""
    one, other = cluster.servers
    worker = scene.worker("c", *ONLY_503, url=one.url)
    gateway = scene.gateway("c", *ONLY_503, url=other.url)
    client = begin(gateway)
    for leaving in LEAVING:
        gateway.request("svc", leaving)
    gateway.all_go_on(*LEAVING)
    since = time.monotonic()
    if whose == "worker":
        worker.kill()
        leave(gateway)
        assert gateway.wait_for_end(client)["status"] == PEER_GONE
    else:
        gateway.kill()
        assert worker.wait(event="done", client=client)["why"] == PEER_GONE
    within(GRACE, GRACE + LATER, since)


def leave(gateway: Gateway) -> None:
    """Makes the gateway send to the worker for some time: only a message can be answered with a 503."""
    for leaving in LEAVING:
        gateway.send_line(f"leave {leaving}")
        time.sleep(0.05)


def test_peer_that_dies_with_its_server_is_gone(cluster: Cluster, scene: Scene) -> None:
    dies, stays = cluster.servers
    worker = scene.worker("go", *ONLY_503, url=dies.url)
    gateway = scene.gateway("python", *ONLY_503, url=stays.url)
    client = begin(gateway)
    for leaving in LEAVING:
        gateway.request("svc", leaving)
    gateway.all_go_on(*LEAVING)
    since = time.monotonic()
    dies.kill()
    worker.kill()
    leave(gateway)
    assert gateway.wait_for_end(client)["status"] == PEER_GONE
    within(GRACE, GRACE + LATER, since)


def test_unserved_subject_has_no_responders_in_a_cluster(cluster: Cluster, connect: Connect) -> None:
    gateway = connect(cluster.url)
    gateway.do("request 1 nobody.here ann x")
    assert gateway.wait(event="ERROR")["status"] == "NO_RESPONDERS"
