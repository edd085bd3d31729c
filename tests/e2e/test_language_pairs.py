"""Every pair of languages for worker and gateway, each in its own process, on lanes and on level 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import GATEWAYS, WORKERS, Program, Server, command

CLIENTS = ["ann", "bob", "cho"]
OFFLINE, NO_RESPONDERS, BUSY, REMOTE = -2, -10, -11, -13


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture(params=["true", "false"], ids=["lanes", "level0"])
def lanes(request: pytest.FixtureRequest) -> str:
    """The `lanes` option of both ends."""
    value: str = request.param
    return value


@pytest.fixture
def gateway(server: Server, gateway_language: str, lanes: str) -> Iterator[Program]:
    with Program(command(gateway_language, is_worker=False), server.url, lanes) as gateway:
        gateway.wait(event="ready")
        yield gateway


@pytest.fixture
def worker(server: Server, worker_language: str, lanes: str) -> Iterator[Program]:
    with Program(command(worker_language, is_worker=True), server.url, "svc", lanes) as worker:
        worker.wait(event="ready")
        yield worker


every_gateway = pytest.mark.parametrize("gateway_language", GATEWAYS)
every_worker = pytest.mark.parametrize("worker_language", WORKERS)


def receive(gateway: Program, client: str, first: int, count: int) -> None:
    """Checks the client's next messages: `count`, numbered from `first`, in order."""
    received = [event["data"] for event in gateway.wait_for_many(count, event="data", client=client)]
    assert received == [f"{client} {i}" for i in range(first, first + count)]


@every_worker
@every_gateway
def test_streams_arrive_complete(gateway: Program, worker: Program) -> None:
    for client in CLIENTS:
        gateway.send_line(f"request svc {client} count 1000")
    for client in CLIENTS:
        receive(gateway, client, 0, 1000)
        gateway.wait(event="end", client=client)
        assert worker.wait(event="done", client=client) == {
            "event": "done", "client": client, "sent": 1000, "why": 0, "accepted": 0
        }  # fmt: skip
    assert gateway.events == []


@every_worker
@every_gateway
def test_departed_client_stops_the_worker(gateway: Program, worker: Program) -> None:
    for client in CLIENTS:
        gateway.send_line(f"request svc {client} endless")
    for client in CLIENTS:
        receive(gateway, client, 0, 100)
    gateway.send_line("leave bob")
    # The worker's sender refuses from then on, and the gateway's stream has ended.
    done = worker.wait(event="done")
    assert (done["client"], done["why"], done["accepted"]) == ("bob", OFFLINE, 0)
    error = gateway.wait(event="error")
    assert (error["client"], error["status"]) == ("bob", OFFLINE)
    # What arrived before is a prefix of what was sent.
    rest = [event["data"] for event in gateway.take_all(event="data", client="bob")]
    assert rest == [f"bob {number}" for number in range(100, 100 + len(rest))]
    assert 100 + len(rest) <= done["sent"]
    # The others go on to their end.
    for client in ["ann", "cho"]:
        receive(gateway, client, 100, 100)
    worker.send_line("finish")
    for client in ["ann", "cho"]:
        done = worker.wait(event="done", client=client)
        assert (done["why"], done["accepted"]) == (0, 0)
        receive(gateway, client, 200, done["sent"] - 200)
        gateway.wait(event="end", client=client)
    assert gateway.events == []


@every_worker
@every_gateway
def test_worker_error_arrives(gateway: Program, worker: Program) -> None:
    gateway.send_line("request svc ann fail no such model: 模型")
    receive(gateway, "ann", 0, 1)
    error = gateway.wait(event="error", client="ann")
    assert (error["status"], error["text"], error["code"]) == (REMOTE, "no such model: 模型", 0)
    done = worker.wait(event="done")
    assert (done["sent"], done["why"], done["accepted"]) == (1, 0, 0)


@every_worker
@every_gateway
def test_worker_error_arrives_with_its_code(gateway: Program, worker: Program) -> None:
    for code, text, status in [(404, "no such model: 模型", REMOTE), (2**31 - 1, "server busy", BUSY)]:
        gateway.send_line(f"request svc ann code {code} {text}")
        receive(gateway, "ann", 0, 1)
        error = gateway.wait(event="error", client="ann")
        assert (error["status"], error["text"], error["code"]) == (status, text, code)
        assert worker.wait(event="done")["why"] == 0


@every_gateway
def test_unserved_subject_has_no_responders(gateway: Program) -> None:
    gateway.send_line("request nobody.here ann count 1")
    assert gateway.wait(event="error", timeout=5)["status"] == NO_RESPONDERS


@every_worker
@every_gateway
@pytest.mark.parametrize("lanes", ["true"], ids=["lanes"], indirect=True)
def test_streams_survive_server_restarts(server: Server, gateway: Program, worker: Program) -> None:
    for client in CLIENTS:
        gateway.send_line(f"request svc {client} endless")
    received = 0
    for _ in range(2):
        for client in CLIENTS:
            receive(gateway, client, received, 100)
        received += 100
        server.kill()
        server.start()
    # On a lane they go on to their end: nothing is lost, duplicated or reordered.
    for client in CLIENTS:
        receive(gateway, client, received, 100)
    received += 100
    worker.send_line("finish")
    for client in CLIENTS:
        done = worker.wait(event="done", client=client)
        assert (done["why"], done["accepted"]) == (0, 0)
        receive(gateway, client, received, done["sent"] - received)
        gateway.wait(event="end", client=client)
    assert gateway.events == []
