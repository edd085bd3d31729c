"""Requests and announcements take effect in the order in which they arrive, although their subjects differ."""

from __future__ import annotations

import pytest
from conftest import Connect, Shell
from raw import RawPeer, pub

TIMES = 200


@pytest.fixture
def worker(connect: Connect) -> Shell:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    return worker


def request(reply: str, client: str) -> bytes:
    return pub("llm.generate", reply=reply, header=f"Connect-ID: {client}\r\n".encode())


def offline(client: str) -> bytes:
    return pub("client.offline", client.encode())


def assert_stopped(worker: Shell, client: str) -> None:
    n = worker.wait(event="REQUEST", client=client)["n"]
    assert worker.wait(event="STOPPED", client=client)["n"] == n
    assert worker.ask(f"send {n} x")["status"] == "OFFLINE"


def test_announcement_after_a_request_stops_it(worker: Shell, raw: RawPeer) -> None:
    reply, answers = raw.inbox()
    for i in range(TIMES):
        raw.send(request(reply, f"c{i}") + offline(f"c{i}"))
        assert_stopped(worker, f"c{i}")
        assert answers.payload() == b"__STREAM_ERROR__:the client is offline"


def test_announcement_before_a_request_spares_it(worker: Shell, raw: RawPeer) -> None:
    reply, answers = raw.inbox()
    for i in range(TIMES):
        # The announcement stops the earlier stream, and not the later one.
        raw.send(offline("alice") + request(reply, "alice"))
        n = worker.wait(event="REQUEST", client="alice")["n"]
        if i:
            assert worker.wait(event="STOPPED", client="alice")["n"] < n
            assert answers.payload() == b"__STREAM_ERROR__:the client is offline"
        # When this one has stopped, everything sent before has taken effect.
        raw.send(request(reply, "last") + offline("last"))
        assert_stopped(worker, "last")
        assert answers.payload() == b"__STREAM_ERROR__:the client is offline"
        worker.do(f"send {n} {i}")
        assert answers.payload() == b"%d" % i


def test_many_requests_and_announcements_in_one_write(worker: Shell, raw: RawPeer) -> None:
    reply, answers = raw.inbox()
    raw.send((offline("alice") + request(reply, "alice") + request(reply, "bob") + offline("bob")) * TIMES)
    for _ in range(TIMES):
        assert_stopped(worker, "bob")
    # Each of alice's streams except the last was stopped.
    streams = [worker.wait(event="REQUEST", client="alice")["n"] for _ in range(TIMES)]
    for n in streams[:-1]:
        assert worker.wait(event="STOPPED", client="alice")["n"] == n
    worker.do(f"send {streams[-1]} alive")
    assert [answers.payload() for _ in range(2 * TIMES)] == [
        b"__STREAM_ERROR__:the client is offline" for _ in range(2 * TIMES - 1)
    ] + [b"alive"]
