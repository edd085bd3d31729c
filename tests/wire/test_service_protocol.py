"""A worker answers NATS's service protocol (ADR-32), and serves as well where it may not."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Connect, Shell
from harness import Server
from raw import RawPeer, pub


def ask(raw: RawPeer, subject: str, *, payload: bytes = b"", timeout: float = 10) -> dict[str, Any] | None:
    """The answer to a request; None if nobody is there."""
    inbox, answers = raw.inbox()
    raw.send(pub(subject, payload, reply=inbox))
    answer = answers.next(timeout)
    if answer.header.startswith(b"NATS/1.0 503"):
        return None
    found: dict[str, Any] = json.loads(answer.payload)
    return found


def must_ask(raw: RawPeer, subject: str) -> dict[str, Any]:
    answer = ask(raw, subject)
    assert answer, subject
    return answer


@pytest.fixture
def worker(connect: Connect) -> Shell:
    worker = connect("", "name=llm.worker")
    worker.do("serve llm.generate workers 1")
    worker.do("listen")  # nats-server has all subscriptions when this returns.
    return worker


def test_all_requests_are_answered(worker: Shell, raw: RawPeer) -> None:
    ping = must_ask(raw, "$SRV.PING")
    name, own = ping["name"], ping["id"]
    assert (name, ping["type"]) == ("llm_worker", "io.nats.micro.v1.ping_response")
    for verb in ["PING", "INFO", "STATS"]:
        answers = [must_ask(raw, f"$SRV.{verb}{rest}") for rest in ["", f".{name}", f".{name}.{own}"]]
        assert answers[0] == answers[1] == answers[2]
        assert answers[0]["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
        assert (answers[0]["name"], answers[0]["id"]) == (name, own)
        # Others may be asked, too: nobody answers in their place, not even by silence.
        assert ask(raw, f"$SRV.{verb}.other") is None
        assert ask(raw, f"$SRV.{verb}.{name}.other") is None
    info = must_ask(raw, "$SRV.INFO")
    endpoint = {"name": "llm_generate", "subject": "llm.generate", "queue_group": "workers", "metadata": {}}
    assert info["endpoints"] == [endpoint]


def test_statistics_count_requests_and_errors(worker: Shell, raw: RawPeer) -> None:
    for n, command in [(1, "end 1"), (2, "code 2 7 secret"), (3, "end 3")]:
        answers = raw.request("llm.generate", "alice")
        worker.wait(event="REQUEST", n=n)
        if n == 3:
            assert raw.request("llm.generate", "bob").payload() == b"__STREAM_ERROR__:server busy"
        worker.do(command)
        answers.next()
    answer = must_ask(raw, "$SRV.STATS")
    (stats,) = answer["endpoints"]
    assert (stats["num_requests"], stats["num_errors"]) == (4, 2)
    assert 0 < stats["average_processing_time"] <= stats["processing_time"]
    assert "secret" not in json.dumps(answer)
    assert worker.ask("stats")["requests"] == 4


def test_requests_that_must_not_be_answered_are_ignored(worker: Shell, raw: RawPeer) -> None:
    offline = raw.subscribe("client.offline")
    raw.send(pub("$SRV.PING") + pub("$SRV.PING", reply="client.offline") + pub("$SRV.PING", reply="$SRV.PING"))
    assert must_ask(raw, "$SRV.PING")
    assert offline.payloads() == []


def test_gateways_are_not_shown(connect: Connect, raw: RawPeer) -> None:
    gateway = connect()
    gateway.do("listen")
    assert ask(raw, "$SRV.PING") is None


def test_discovery_can_be_switched_off(connect: Connect, raw: RawPeer) -> None:
    worker = connect("", "discovery=false")
    worker.do("serve llm.generate workers 0")
    worker.do("listen")
    assert ask(raw, "$SRV.PING") is None


def test_each_connection_is_one_service(connect: Connect, raw: RawPeer) -> None:
    for _ in range(3):
        worker = connect()
        worker.do("serve a.* workers 0")
        worker.do("serve b workers 0")
        worker.do("listen")
    inbox, answers = raw.inbox()
    raw.send(pub("$SRV.INFO", reply=inbox))
    found = [json.loads(answers.payload()) for _ in range(3)]
    assert len({info["id"] for info in found}) == 3
    assert {info["name"] for info in found} == {"nats-presence"}
    assert all([one["subject"] for one in info["endpoints"]] == ["a.*", "b"] for info in found)
    with pytest.raises(queue.Empty):
        answers.next(0.1)


def test_service_is_shown_again_after_a_reconnect(connect: Connect, server: Server) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    server.kill()
    server.start()
    worker.wait(event="DISCONNECTED")
    worker.wait(event="CONNECTED")
    worker.do("listen")
    raw = RawPeer(server.port)
    assert must_ask(raw, "$SRV.INFO")["endpoints"]
    raw.close()


@contextmanager
def configured(path: Path, permissions: str, more: str = "") -> Iterator[tuple[Server, str]]:
    """A server with these rights of the worker, whose URL it yields. Everybody else may do all."""
    file = path / "server.conf"
    file.write_text(
        f"authorization {{ users: [ {{ user: worker, password: p, permissions: {{ {permissions} }} }},"
        f" {{ user: other, password: p }} ] }}\nno_auth_user: other\n{more}\n"
    )
    server = Server("-c", str(file))
    try:
        yield server, f"nats://worker:p@127.0.0.1:{server.port}"
    finally:
        server.kill()


def assert_serves(worker: Shell, raw: RawPeer, subject: str, n: int) -> None:
    answers = raw.request(subject, "alice")
    worker.wait(event="REQUEST", n=n)
    worker.do(f"send {n} one")
    worker.do(f"end {n}")
    assert [answers.payload(), answers.payload()] == [b"one", b"__STREAM_END__"]


@pytest.mark.parametrize("denied", ["$SRV.>", "$SRV.*", "$SRV.*.nats-presence"])
def test_refused_subscriptions_disturb_nothing(connect: Connect, tmp_path: Path, denied: str) -> None:
    with configured(tmp_path, f'subscribe: {{ deny: "{denied}" }}') as (server, url):
        worker, raw = connect(url, "reconnect_min_ms=1", "reconnect_max_ms=1"), RawPeer(server.port)
        worker.do("serve llm.generate workers 0")
        for n in range(1, 4):
            assert_serves(worker, raw, "llm.generate", n)
            worker.do("listen")  # A round trip.
        assert (ask(raw, "$SRV.PING") is None) == (denied != "$SRV.*.nats-presence")
        # It is neither reported nor tried again.
        assert [event for event in worker.events if event["event"] != "CONNECTED"] == []
        raw.close()


def test_refused_answers_disturb_nothing(connect: Connect, tmp_path: Path) -> None:
    with configured(tmp_path, 'publish: { deny: "forbidden.>" }') as (server, url):
        worker, raw = connect(url), RawPeer(server.port)
        worker.do("serve llm.generate workers 0")
        worker.do("listen")
        raw.send(pub("$SRV.PING", reply="forbidden.inbox"))
        assert "Permissions Violation" in worker.wait(event="LOG")["data"]
        assert_serves(worker, raw, "llm.generate", 1)
        raw.close()


def test_services_come_first_where_subscriptions_are_limited(connect: Connect, tmp_path: Path) -> None:
    # Two for answers, one for announcements, and two services.
    with configured(tmp_path, 'subscribe: ">"', "max_subscriptions: 5") as (server, url):
        worker = connect(url, "reconnect_min_ms=1", "reconnect_max_ms=1")
        worker.do("serve first workers 0")
        worker.do("serve second workers 0")
        server.kill()
        server.start()
        worker.wait(event="DISCONNECTED")
        worker.wait(event="CONNECTED")
        worker.do("listen")
        raw = RawPeer(server.port)
        for n, subject in enumerate(["first", "second"], 1):
            assert_serves(worker, raw, subject, n)
        assert worker.take(event="DISCONNECTED", subject="second") is None
        raw.close()
