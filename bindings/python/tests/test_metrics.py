"""metrics() is valid OpenMetrics and counts what streams do. WSGI and ASGI servers can serve it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from conftest import ROOT, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import nats_presence
from nats_presence import Sender, metrics, metrics_asgi, metrics_wsgi
from nats_presence._metrics import CONTENT_TYPE

SECRET = "SECRET-ID"
ODD = 'odd\\"{subject=,}'
WORKER = {"role": "worker", "subject": ODD}
GATEWAY = {"role": "gateway", "subject": ""}


class Samples:
    """The samples of the present metrics, read by a parser that refuses what OpenMetrics does not allow."""

    def __init__(self) -> None:
        self.text = metrics().decode()
        self.families = list(text_string_to_metric_families(self.text))  # type: ignore[no-untyped-call]
        samples = [sample for family in self.families for sample in family.samples]
        self.values = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        assert len(self.values) == len(samples)

    def get(self, name: str, **labels: str) -> float:
        return float(self.values[f"nats_presence_{name}", frozenset(labels.items())])


def serve_one(conn: nats_presence.Connection, **options: Any) -> threading.Event:
    """Serves ODD: a stream has two messages, and ends when this event is set or it is stopped."""
    go_on = threading.Event()

    def handler(request: nats_presence.Request, sender: Sender) -> None:
        sender.send(b"one")
        sender.send(b"two")
        while not go_on.wait(0.005):
            sender.send(b"more")

    conn.serve(ODD, handler, **options)
    return go_on


def test_text_is_valid_without_a_connection() -> None:
    samples = Samples()
    assert samples.text.endswith("# EOF\n")
    assert all(family.documentation and family.type != "unknown" for family in samples.families)
    assert all(family.name.startswith("nats_presence_") for family in samples.families)


def test_streams_are_counted(url: str, lanes: bool) -> None:
    with nats_presence.connect(url, lanes=lanes) as worker, nats_presence.connect(url, lanes=lanes) as gateway:
        go_on = serve_one(worker, max_streams=1)
        before = Samples()

        def more(name: str, **labels: str) -> float:
            return Samples().get(name, **labels) - before.get(name, **labels)

        with gateway.stream(ODD, client_id=SECRET) as stream:
            assert next(stream) == b"one"
            with pytest.raises(nats_presence.BusyError), gateway.stream(ODD, client_id="ANOTHER-ID") as refused:
                next(refused)
            during = Samples()
            assert during.get("streams_running", **WORKER) == 1
            assert during.get("streams_running", **GATEWAY) == 1
            assert during.get("clients_online") == 1
            assert SECRET not in during.text
            assert "ANOTHER-ID" not in during.text
            assert more("requests_refused_total", subject=ODD, status="busy") == 1
            assert more("streams_ended_total", **GATEWAY, status="busy") == 1
            nats_presence.mark_client_offline(SECRET)
        until(lambda: more("stop_latency_seconds_count", subject=ODD) == 1)
        assert more("streams_ended_total", **WORKER, status="offline") == 1
        assert more("streams_ended_total", **GATEWAY, status="offline") == 1
        go_on.set()
        with gateway.stream(ODD, client_id=SECRET) as stream:
            assert list(stream)[:2] == [b"one", b"two"]
        until(lambda: more("streams_ended_total", **WORKER, status="ok") == 1)
        for role in (WORKER, GATEWAY):
            assert more("stream_duration_seconds_count", **role) == (2 if role is WORKER else 3)
            assert more("first_message_seconds_count", **role) == 2
            assert Samples().get("streams_running", **role) == 0
        assert SECRET not in Samples().text


def test_invalid_requests_are_refused(url: str) -> None:
    server = urlsplit(url)
    assert server.hostname
    assert server.port
    with nats_presence.connect(url) as worker, socket.create_connection((server.hostname, server.port)) as stranger:
        serve_one(worker)
        before = Samples().get("requests_refused_total", subject=ODD, status="invalid")
        stranger.sendall(b"CONNECT {}\r\nPUB %b 0\r\n\r\n" % ODD.encode())  # no subject for an answer
        until(lambda: Samples().get("requests_refused_total", subject=ODD, status="invalid") == before + 1)


def test_documents_name_the_metrics() -> None:
    names = {family.name + "_total" * (family.type == "counter") for family in Samples().families}
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE)
    assert sorted(f"nats_presence_{row}" for row in rows) == sorted(names)
    for file, most in (("alerts.yaml", 5), ("grafana.json", len(names))):
        text = (ROOT / "docs/metrics" / file).read_text()
        used = {re.sub("_bucket$", "", name) for name in re.findall(r"nats_presence_\w+", text)}
        assert 4 < len(used) <= most
        assert used <= names


def test_many_threads_read(url: str) -> None:
    failures: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(2):  # Each is parsed in Python, slowly.
                Samples()
        except Exception as error:
            failures.append(error)

    with nats_presence.connect(url) as conn:
        serve_one(conn).set()
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with conn.stream(ODD, client_id="client") as stream:
                assert next(stream) == b"one"
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 200), ("POST", 405)])
def test_wsgi_answers(method: str, status: int) -> None:
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    started: list[Any] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], error: object = None, /
    ) -> Callable[[bytes], object]:
        started.append((status, headers))
        return print  # The deprecated way to write a body.

    result = validator(metrics_wsgi)(environ, start_response)
    body = b"".join(result)
    result.close()  # type: ignore[attr-defined]
    [(line, headers)] = started
    check_answer(int(line.split()[0]), dict(headers), body, method, status)


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 200), ("POST", 405)])
def test_asgi_answers(method: str, status: int) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("it has no reason to read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(metrics_asgi({"type": "http", "method": method}, receive, send))
    start, body = sent
    headers = {name.decode().title(): value.decode() for name, value in start["headers"]}
    check_answer(start["status"], headers, body["body"], method, status)


def check_answer(status: int, headers: dict[str, str], body: bytes, method: str, expected: int) -> None:
    assert status == expected
    assert int(headers["Content-Length"]) == len(body) or method == "HEAD"
    if status == 405:
        assert headers["Allow"] == "GET, HEAD"
    else:
        assert headers["Content-Type"] == CONTENT_TYPE
        assert body.endswith(b"# EOF\n") or (method == "HEAD" and not body)


def test_asgi_refuses_websockets() -> None:
    async def unused(*args: Any) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match="websocket"):
        asyncio.run(metrics_asgi({"type": "websocket"}, unused, unused))
