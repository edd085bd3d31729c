"""Malformed messages, which anyone may send to a subscribed subject, and which end the NATS client inside the library.
The library replaces the client, and works again within a second."""

from __future__ import annotations

import time

import pytest
from conftest import Connect, Shell
from raw import RawPeer, Subscription, pub

TIMES = 100
LONE_CR = b"X: a\rb\r\n"


def assert_serving(worker: Shell, raw: RawPeer, since: float) -> None:
    """Checks that a new stream is served less than a second after `since`."""
    probes: dict[str, Subscription] = {}
    while True:
        data = f"{since:f} {len(probes)}"
        probes[data] = raw.request("svc.generate", "probe", data.encode())
        try:
            request = worker.wait(event="REQUEST", client="probe", timeout=0.01)
        except AssertionError:
            assert time.monotonic() - since < 1, "no stream is served within a second"
            continue
        # The first answer to arrive, also one to an earlier request.
        if request["data"] in probes:
            break
    worker.do(f"send {request['n']} served")
    worker.do(f"end {request['n']}")
    answers = probes[request["data"]]
    assert [answers.payload(), answers.payload()] == [b"served", b"__STREAM_END__"]
    assert time.monotonic() - since < 1


def test_worker_survives_a_hundred_lone_crs(connect: Connect, raw: RawPeer) -> None:
    worker = connect()
    worker.do("serve svc.* workers 0")
    announcements = raw.subscribe("client.offline")
    for i in range(TIMES):
        answers = raw.request("svc.generate", "alice")
        n = worker.wait(event="REQUEST", client="alice")["n"]
        since = time.monotonic()
        raw.send(pub(["svc.generate", "client.offline"][i % 2], b"poison", reply="some.where", header=LONE_CR))
        assert_serving(worker, raw, since)
        # The stream that was cut has ended at both ends.
        assert worker.wait(event="STOPPED", n=n)["status"] == "DISCONNECTED"
        assert answers.payload() == b"__STREAM_ERROR__:the worker lost its connection to nats-server"
        worker.wait(event="DISCONNECTED")
        worker.wait(event="CONNECTED")
    # Each of them ended a NATS client; otherwise this test shows nothing.
    assert worker.ask("stats")["connects"] == TIMES + 1
    # Announcements are received again, and none was made up.
    raw.request("svc.generate", "bob")
    worker.wait(event="REQUEST", client="bob")
    raw.send(pub("client.offline", b"bob"))
    assert worker.wait(event="STOPPED", client="bob")["status"] == "OFFLINE"
    received = [announcements.payload() for _ in range(TIMES // 2 + 1)]
    assert received == [b"poison"] * (TIMES // 2) + [b"bob"]


@pytest.mark.parametrize("target", ["inbox", "client.offline"])
def test_gateway_survives_a_hundred_lone_crs(connect: Connect, raw: RawPeer, target: str) -> None:
    requests = raw.subscribe("llm.generate")
    announcements = raw.subscribe("client.offline")
    gateway = connect()
    gateway.do("listen")
    for tag in range(1, TIMES + 1):
        inbox = request(gateway, requests, tag, "alice")
        # The worker's first answer shows that it is on level 0: it is stopped by an announcement.
        raw.send(pub(inbox, b"first"))
        gateway.wait(event="DATA", tag=tag)
        since = time.monotonic()
        raw.send(pub(inbox if target == "inbox" else target, b"poison", header=LONE_CR))
        assert gateway.wait(event="ERROR", tag=tag)["status"] == "DISCONNECTED"
        inbox = request(gateway, requests, 500 + tag, "bob", since)
        raw.send(pub(inbox, b"x") + pub(inbox, b"__STREAM_END__"))
        assert gateway.wait(event="DATA", tag=500 + tag)["data"] == "x"
        gateway.wait(event="END", tag=500 + tag)
        assert time.monotonic() - since < 1
        # The worker of the stream that was cut receives the announcement.
        while announcements.payload() != b"alice":
            pass
    assert gateway.ask("stats")["connects"] == TIMES + 1


def request(gateway: Shell, requests: Subscription, tag: int, client: str, since: float = 0) -> str:
    """Requests a stream, again while there is no connection; returns the subject to which its worker answers."""
    since = since or time.monotonic()
    while gateway.ask(f"request {tag} llm.generate {client} hello")["status"] == "DISCONNECTED":
        assert time.monotonic() - since < 1, "no connection within a second"
    return requests.next().reply.decode()


def message(subject: bytes, block: bytes, payload: bytes = b"x") -> bytes:
    """A message with exactly these headers, however malformed."""
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (subject, len(block), len(block) + len(payload), block, payload)


MALFORMED = {
    "subject that is not UTF-8": b"PUB svc.\xff\xfe 1\r\nx\r\n",
    "reply that is not UTF-8": b"PUB svc.generate _INBOX.\xff 1\r\nx\r\n",
    "header value that is not UTF-8": message(b"svc.generate", b"NATS/1.0\r\nConnect-ID: \xff\xfe\r\n\r\n"),
    "header name that is not UTF-8": message(b"svc.generate", b"NATS/1.0\r\n\xff: x\r\n\r\n"),
    "header without a colon": message(b"svc.generate", b"NATS/1.0\r\nConnect-ID alice\r\n\r\n"),
    "header without a name": message(b"svc.generate", b"NATS/1.0\r\n: alice\r\n\r\n"),
    "header name with a space": message(b"svc.generate", b"NATS/1.0\r\nConnect ID: alice\r\n\r\n"),
    "header with a NUL": message(b"svc.generate", b"NATS/1.0\r\nConnect-ID: a\x00b\r\n\r\n"),
    "header with a lone LF": message(b"svc.generate", b"NATS/1.0\r\nConnect-ID: a\nb\r\n\r\n"),
    "headers without an end": message(b"svc.generate", b"NATS/1.0\r\nConnect-ID: alice"),
    "no version": message(b"svc.generate", b"Connect-ID: alice\r\n\r\n"),
    "another version": message(b"svc.generate", b"NATS/9.9\r\nConnect-ID: alice\r\n\r\n"),
    "status that is no number": message(b"svc.generate", b"NATS/1.0 5x3\r\n\r\n"),
    "status out of range": message(b"svc.generate", b"NATS/1.0 99999\r\n\r\n"),
    "status that is negative": message(b"svc.generate", b"NATS/1.0 -1\r\n\r\n"),
    "status with nothing behind it": message(b"svc.generate", b"NATS/1.0 "),
    "status that is not UTF-8": message(b"svc.generate", b"NATS/1.0 503 \xff\r\n\r\n"),
    "announcement that is not UTF-8": message(b"client.offline", b"NATS/1.0\r\nPresence-Origin: \xff\r\n\r\n", b"\xff"),
    "announcement with a bad status": message(b"client.offline", b"NATS/1.0 x\r\n\r\n", b"alice"),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED.keys())
def test_worker_survives_malformed_messages(connect: Connect, raw: RawPeer, malformed: bytes) -> None:
    worker = connect()
    worker.do("serve svc.* workers 0")
    for _ in range(3):
        since = time.monotonic()
        raw.send(malformed)
        raw.flush()
        assert_serving(worker, raw, since)
