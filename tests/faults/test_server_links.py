"""The link between two nats-servers is reset; both ends keep their own connections."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import TIMEOUT, Server, steady_port
from proxy import Link
from scene import DISCONNECTED, NO_RESPONDERS, Gateway, Scene, finish

ROUTE = (
    'cluster {{ name: test, listen: "127.0.0.1:{first}", no_advertise: true, pool_size: -1 }}',
    'cluster {{ name: test, listen: "127.0.0.1:{second}", no_advertise: true, pool_size: -1,'
    ' routes: ["nats://127.0.0.1:{link}"] }}',
)
LEAF = (
    'leafnodes {{ listen: "127.0.0.1:{first}" }}',
    'leafnodes {{ remotes: [{{ url: "nats://127.0.0.1:{link}" }}] }}',
)
SUPERCLUSTER = (
    'gateway {{ name: one, listen: "127.0.0.1:{first}", advertise: "127.0.0.1:{link}" }}',
    'gateway {{ name: other, listen: "127.0.0.1:{second}", advertise: "127.0.0.1:{back}",'
    ' gateways: [{{ name: one, url: "nats://127.0.0.1:{link}" }}] }}',
)


class Linked:
    """Two servers whose links pass through proxies."""

    def __init__(self, settings: tuple[str, str], folder: Path, stack: ExitStack) -> None:
        first, second = steady_port(), steady_port()
        self.links = [Link(first), Link(second)]
        ports = {"first": first, "second": second, "link": self.links[0].port, "back": self.links[1].port}
        self.servers: list[Server] = []
        for number, text in enumerate(settings):
            file = folder / f"{number}.conf"
            file.write_text(f"server_name: s{number}\n" + text.format(**ports))
            server = Server("-c", str(file), port=steady_port())
            stack.callback(server.kill)
            self.servers.append(server)

    def reset(self) -> None:
        for link in self.links:
            link.reset()


@pytest.fixture
def linked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Linked]:
    with ExitStack() as stack:
        yield Linked(request.param, tmp_path, stack)


def begin(gateway: Gateway) -> str:
    """Starts a stream, once the servers know each other's subscriptions; returns its client."""
    deadline = time.monotonic() + TIMEOUT
    for client in (f"early{attempt}" for attempt in range(1000)):
        gateway.request("svc", client)
        gateway.until(lambda: client in gateway.received or client in gateway.ended, "an answer comes")  # noqa: B023
        if client in gateway.received:
            return client
        assert gateway.ended[client]["status"] in [DISCONNECTED, NO_RESPONDERS]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    raise AssertionError("the servers are not connected")


@pytest.mark.parametrize("linked", [ROUTE, LEAF, SUPERCLUSTER], indirect=True, ids=["route", "leaf", "supercluster"])
def test_streams_survive_a_server_link_reset(linked: Linked) -> None:
    """With the defaults the streams go on."""
    one, other = linked.servers
    with Scene(one.url) as scene:
        worker, gateway = scene.worker("c", url=one.url), scene.gateway("c", url=other.url)
        client = begin(gateway)
        for name in ["ann", "bob"]:
            gateway.request("svc", name)
        gateway.all_go_on(client, "ann", "bob")
        linked.reset()
        gateway.all_go_on(client, "ann", "bob", count=2000)
        finish(gateway, worker, client, "ann", "bob")
