"""The library's worker on level 0, and a requester driven by hand."""

from __future__ import annotations

import pytest
from conftest import Connect, Shell
from raw import Message, RawPeer, Subscription, pub


@pytest.fixture
def worker(connect: Connect) -> Shell:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    return worker


def begin(worker: Shell, raw: RawPeer, client: str) -> tuple[int, Subscription]:
    """A running stream: its number in the worker, and its answers."""
    answers = raw.request("llm.generate", client)
    n = worker.wait(event="REQUEST", client=client)["n"]
    return n, answers


def test_stream_bytes(worker: Shell, raw: RawPeer) -> None:
    answers = raw.subscribe("_INBOX.by.hand")
    raw.send(b"HPUB llm.generate _INBOX.by.hand 31 36\r\nNATS/1.0\r\nConnect-ID: alice\r\n\r\nhello\r\n")
    request = worker.wait(event="REQUEST")
    assert (request["client"], request["subject"], request["data"]) == ("alice", "llm.generate", "hello")
    for command in ["send 1 one", "send 1 ", "send 1 three", "end 1"]:
        worker.do(command)
    sent = [answers.next() for _ in range(4)]
    assert sent == [
        Message(b"_INBOX.by.hand", b"", b"", payload) for payload in (b"one", b"", b"three", b"__STREAM_END__")
    ]
    # Nothing is left of it: the id is offline.
    assert worker.ask("is_online alice")["text"] == "no"


def test_ten_thousand_messages_keep_their_order(worker: Shell, raw: RawPeer) -> None:
    n, answers = begin(worker, raw, "alice")
    worker.do(f"flood {n} 10000")
    worker.do(f"end {n}")
    assert [answers.payload() for _ in range(10_000)] == [b"%d" % i for i in range(10_000)]
    assert answers.payload() == b"__STREAM_END__"


def test_error_becomes_a_marker(worker: Shell, raw: RawPeer) -> None:
    n, answers = begin(worker, raw, "alice")
    worker.do(f"send {n} one")
    worker.do(f"error {n} no such model: gpt-0")
    message, failed = answers.next(), answers.next()
    assert [message.payload, failed.payload] == [b"one", b"__STREAM_ERROR__:no such model: gpt-0"]
    assert not message.header
    assert not failed.header


def test_code_becomes_a_header_that_others_may_ignore(worker: Shell, raw: RawPeer) -> None:
    n, answers = begin(worker, raw, "alice")
    worker.do(f"send {n} one")
    assert worker.ask(f"code {n} -1 x")["status"] == "INVALID"
    worker.do(f"code {n} 404 no such model: gpt-0")
    message, failed = answers.next(), answers.next()
    assert not message.header
    assert failed.header == b"NATS/1.0\r\nPresence-Error: 404\r\n\r\n"
    # A peer that ignores headers sees what it always saw.
    assert [message.payload, failed.payload] == [b"one", b"__STREAM_ERROR__:no such model: gpt-0"]


def test_freed_sender_ends_with_an_error(worker: Shell, raw: RawPeer) -> None:
    n, answers = begin(worker, raw, "alice")
    worker.do(f"free {n}")
    assert answers.payload().startswith(b"__STREAM_ERROR__:")


def test_request_beyond_max_streams_is_busy(connect: Connect, raw: RawPeer) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 1")
    n, first = begin(worker, raw, "alice")
    refused = raw.request("llm.generate", "bob")
    assert refused.payload() == b"__STREAM_ERROR__:server busy"
    assert worker.ask("is_online bob")["text"] == "no"
    # The first goes on, and frees capacity by its end.
    worker.do(f"end {n}")
    assert first.payload() == b"__STREAM_END__"
    begin(worker, raw, "bob")
    stats = worker.ask("stats")
    assert (stats["requests"], stats["requests_busy"], stats["senders"]) == (3, 1, 1)


@pytest.mark.parametrize("header", [b"", b"Connect-ID: \r\n", b"Connect-ID:\r\n", b"X-Other: x\r\n"])
def test_anonymous_request_is_served(worker: Shell, raw: RawPeer, header: bytes) -> None:
    reply, answers = raw.inbox()
    raw.send(pub("llm.generate", b"hello", reply=reply, header=header))
    request = worker.wait(event="REQUEST")
    assert request.get("client", "") == ""
    # It is anonymous: no announcement stops it.
    stop_another(worker, raw)
    worker.do("send 1 x")
    worker.do("end 1")
    assert [answers.payload(), answers.payload()] == [b"x", b"__STREAM_END__"]


def stop_another(worker: Shell, raw: RawPeer) -> None:
    """Has another client's stream stopped: everything the worker received before has been processed and answered."""
    _, answers = begin(worker, raw, "another")
    raw.send(pub("client.offline", b"another"))
    worker.wait(event="STOPPED", client="another")
    assert answers.payload() == b"__STREAM_ERROR__:the client is offline"


def test_custom_headers_reach_the_worker(worker: Shell, raw: RawPeer) -> None:
    reply, _ = raw.inbox()
    header = b"X-Model: gpt\r\nConnect-ID:alice\r\nX-Model: second\r\nX-Empty:\r\n"
    raw.send(pub("llm.generate", reply=reply, header=header))
    assert worker.wait(event="REQUEST")["client"] == "alice"
    assert worker.ask("header 1 X-Model")["text"] == "gpt"
    assert worker.ask("header 1 X-Empty")["text"] == ""
    assert "text" not in worker.ask("header 1 X-None")


@pytest.mark.parametrize("reply", ["", "client.offline", "$SYS.REQ.ACCOUNT.PING", "answers.*", "answers.>"])
def test_request_with_a_forbidden_reply_subject_is_ignored(worker: Shell, raw: RawPeer, reply: str) -> None:
    everything = raw.subscribe(">")
    raw.send(pub("llm.generate", b"hello", reply=reply, header=b"Connect-ID: alice\r\n"))
    raw.flush()
    assert everything.payload() == b"hello"
    begin(worker, raw, "bob")  # Nothing came before it: it is the first.
    stats = worker.ask("stats")
    assert (stats["requests"], stats["requests_ignored"], stats["senders"]) == (2, 1, 1)
    assert worker.ask("is_online alice")["text"] == "no"
    assert "reply" in worker.wait(event="LOG")["data"]
    # Nothing was sent to anyone: the worker's next message is the one that the test sends next.
    assert everything.payload() == b""  # bob's request
    worker.do("send 1 x")
    assert everything.payload() == b"x"


@pytest.mark.parametrize("identity", [b"x" * 1025, b"a\tb", b"a\x7fb", "a\u0085b".encode()])
def test_invalid_client_id_is_answered_with_an_error(worker: Shell, raw: RawPeer, identity: bytes) -> None:
    reply, answers = raw.inbox()
    raw.send(pub("llm.generate", reply=reply, header=b"Connect-ID: " + identity + b"\r\n"))
    assert answers.payload().startswith(b"__STREAM_ERROR__:invalid Connect-ID: ")
    n, _ = begin(worker, raw, "bob")
    assert n == 1
    stats = worker.ask("stats")
    assert (stats["requests_ignored"], stats["senders"]) == (1, 1)


@pytest.mark.parametrize("client", ["alice", "x" * 1024, "a b", "Ünïcødé-客户端", "_-.*>$", "a:b"])
def test_announcement_stops_the_sender(worker: Shell, raw: RawPeer, client: str) -> None:
    answers = raw.request("llm.generate", client)
    worker.wait(event="REQUEST", client=client.encode().decode("latin-1"))
    worker.do("send 1 before")
    assert answers.payload() == b"before"
    raw.send(pub("client.offline", client.encode()))
    assert worker.wait(event="STOPPED")["status"] == "OFFLINE"
    for command in ["send 1 after", "flood 1 1", "end 1", "error 1 x", "send 1 after"]:
        assert worker.ask(command)["status"] == "OFFLINE", command
    assert worker.ask(f"is_online {client}")["text"] == "no"
    # Nothing follows the error that ended it.
    stop_another(worker, raw)
    assert answers.payload() == b"__STREAM_ERROR__:the client is offline"
    assert answers.payloads() == []
    assert worker.ask("stats")["offline_in"] == 2


def test_announcement_of_another_client_stops_nothing(worker: Shell, raw: RawPeer) -> None:
    n, answers = begin(worker, raw, "alice")
    for other in [b"alic", b"alice2", b"Alice", b"alice ", b"bob"]:
        raw.send(pub("client.offline", other))
    stop_another(worker, raw)
    worker.do(f"send {n} x")
    worker.do(f"end {n}")
    assert [answers.payload(), answers.payload()] == [b"x", b"__STREAM_END__"]
    assert worker.take(event="STOPPED") is None


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe", b"a\nb", b"x" * 1025])
def test_empty_announcement_is_ignored(worker: Shell, raw: RawPeer, payload: bytes) -> None:
    n, _ = begin(worker, raw, "alice")
    anonymous, _ = begin(worker, raw, "")
    raw.send(pub("client.offline", payload))
    stop_another(worker, raw)
    worker.do(f"send {n} x")
    worker.do(f"send {anonymous} x")
    assert worker.take(event="STOPPED") is None
    stats = worker.ask("stats")
    assert (stats["offline_in"], stats["messages_ignored"], stats["connects"]) == (1, 1, 1)


def test_announcements_may_have_headers_and_a_reply_subject(worker: Shell, raw: RawPeer) -> None:
    n, _ = begin(worker, raw, "alice")
    header = b"Presence-Origin: 0123456789abcdef0123456789abcdef\r\n"
    raw.send(pub("client.offline", b"alice", reply="some.where", header=header))
    assert worker.wait(event="STOPPED")["n"] == n


def test_announcement_stops_all_streams_of_the_client(worker: Shell, raw: RawPeer) -> None:
    streams = [begin(worker, raw, "alice") for _ in range(10)]
    raw.send(pub("client.offline", b"alice"))
    for _, answers in streams:
        assert answers.payload() == b"__STREAM_ERROR__:the client is offline"
    assert {worker.wait(event="STOPPED")["n"] for _ in streams} == {n for n, _ in streams}


def test_offline_subject_is_configurable(connect: Connect, raw: RawPeer) -> None:
    worker = connect("", "offline_subject=gone.away")
    worker.do("serve llm.generate workers 0")
    begin(worker, raw, "alice")
    raw.send(pub("client.offline", b"alice"))
    bob, _ = begin(worker, raw, "bob")
    raw.send(pub("gone.away", b"bob"))
    assert worker.wait(event="STOPPED")["n"] == bob
    worker.do("send 1 x")
    # Uses the configured subject.
    raw.send(pub("llm.generate", reply="gone.away", header=b"Connect-ID: carol\r\n"))
    raw.send(pub("llm.generate", reply="client.offline", header=b"Connect-ID: dave\r\n"))
    assert worker.wait(event="REQUEST")["client"] == "dave"


def test_offline_mark_at_the_worker_is_announced(worker: Shell, raw: RawPeer) -> None:
    announcements = raw.subscribe("client.offline")
    _, answers = begin(worker, raw, "alice")
    worker.do("offline alice")
    assert worker.wait(event="STOPPED")["status"] == "OFFLINE"
    assert answers.payload() == b"__STREAM_ERROR__:the client is offline"
    assert announcements.payload() == b"alice"


def test_close_ends_the_streams_with_an_error(worker: Shell, raw: RawPeer) -> None:
    _, answers = begin(worker, raw, "alice")
    worker.do("send 1 x")
    worker.do("close 900")
    assert answers.payload() == b"x"
    assert answers.payload().startswith(b"__STREAM_ERROR__:")
    assert worker.wait(event="STOPPED")["status"] == "CLOSED"
    assert worker.ask("send 1 y")["status"] == "CLOSED"


def test_reserved_data_is_refused(worker: Shell, raw: RawPeer) -> None:
    n, answers = begin(worker, raw, "alice")
    for data in ["__STREAM_END__", "__STREAM_END__x", "__STREAM_ERROR__:x", "__STREAM_ERROR__"]:
        assert worker.ask(f"send {n} {data}")["status"] == "RESERVED"
    worker.do(f"send {n} __STREAM_END_")
    worker.do(f"end {n}")
    assert [answers.payload(), answers.payload()] == [b"__STREAM_END_", b"__STREAM_END__"]
