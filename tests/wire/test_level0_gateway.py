"""The library's gateway on level 0, and a worker driven by hand."""

from __future__ import annotations

import pytest
from conftest import Connect, Shell
from proxy import Proxy
from raw import INBOX, LANE, ORIGIN, RawPeer, Subscription, pub


@pytest.fixture
def gateway(connect: Connect) -> Shell:
    return connect()


@pytest.fixture
def requests(raw: RawPeer) -> Subscription:
    """The requests that arrive at the worker."""
    return raw.subscribe("llm.generate", "workers")


@pytest.fixture
def announcements(raw: RawPeer) -> Subscription:
    return raw.subscribe("client.offline")


def begin(gateway: Shell, requests: Subscription, tag: int, client: str) -> str:
    """Requests a stream; returns the subject to which its worker answers."""
    gateway.do(f"request {tag} llm.generate {client} hello")
    return requests.next().reply.decode()


@pytest.mark.parametrize("client", ["alice", "客户端-Ü", "_-.*>$", "a:b", "x" * 1024])
def test_request_bytes(connect: Connect, proxy: Proxy, requests: Subscription, client: str) -> None:
    gateway = connect(proxy.url, "lanes=false")
    gateway.do(f"request 1 llm.generate {client} hello")
    block = f"NATS/1.0\r\nConnect-ID: {client}\r\n\r\n".encode()
    message = requests.next()
    assert (message.subject, message.header, message.payload) == (b"llm.generate", block, b"hello")
    assert INBOX.fullmatch(message.reply)
    # The bytes that the gateway sent, before the server processed them.
    sizes = b"%d %d" % (len(block), len(block) + 5)
    assert b"HPUB llm.generate %s %s\r\n%shello\r\n" % (message.reply, sizes, block) in proxy.sent


def test_anonymous_request_bytes(connect: Connect, proxy: Proxy, requests: Subscription) -> None:
    gateway = connect(proxy.url, "lanes=false")
    gateway.do("request 1 llm.generate - hello")
    message = requests.next()
    assert (message.header, message.payload) == (b"", b"hello")
    assert b"PUB llm.generate %s 5\r\nhello\r\n" % message.reply in proxy.sent


def test_lane_offer_bytes(gateway: Shell, requests: Subscription) -> None:
    gateway.do("request 1 llm.generate alice hello")
    message = requests.next()
    lines = sorted(message.header.split(b"\r\n"))
    assert lines[:4] == [b"", b"", b"Connect-ID: alice", b"NATS/1.0"]
    assert LANE.fullmatch(lines[4])
    assert len(lines) == 5
    assert message.payload == b"hello"


def test_custom_headers_are_sent(connect: Connect, requests: Subscription) -> None:
    gateway = connect("", "lanes=false")
    gateway.do("option header.X-Model gpt: 0")
    gateway.do("request 1 llm.generate alice hello")
    lines = requests.next().header.split(b"\r\n")
    assert lines[0] == b"NATS/1.0"
    assert lines[-2:] == [b"", b""]
    assert sorted(lines[1:-2]) == [b"Connect-ID: alice", b"X-Model: gpt: 0"]


def test_each_stream_has_its_own_inbox(gateway: Shell, requests: Subscription) -> None:
    assert len({begin(gateway, requests, tag, "alice") for tag in range(1, 6)}) == 5


def test_inbox_prefix_is_configurable(connect: Connect, raw: RawPeer, requests: Subscription) -> None:
    gateway = connect("", "inbox_prefix=_MINE.here")
    inbox = begin(gateway, requests, 1, "alice")
    assert inbox.startswith("_MINE.here.")
    raw.send(pub(inbox, b"x") + pub(inbox, b"__STREAM_END__"))
    assert gateway.wait(event="DATA")["data"] == "x"
    gateway.wait(event="END")


def test_messages_and_end_become_events(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    assert gateway.ask("is_online alice")["text"] == "yes"
    payloads = [b"one", b"", bytes(range(256)), b"x" * 100_000]
    raw.send(b"".join(pub(inbox, payload) for payload in payloads) + pub(inbox, b"__STREAM_END__"))
    received = [gateway.wait(event="DATA", tag=1)["data"].encode("latin-1") for _ in payloads]
    assert received == payloads
    gateway.wait(event="END", tag=1)
    assert gateway.ask("is_online alice")["text"] == "no"
    assert gateway.ask("stats")["streams"] == 0


def test_streams_stay_separate(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    inboxes = {tag: begin(gateway, requests, tag, "alice") for tag in range(1, 6)}
    for i in range(20):
        raw.send(b"".join(pub(inbox, b"%d %d" % (tag, i)) for tag, inbox in inboxes.items()))
    for tag in inboxes:
        received = [gateway.wait(event="DATA", tag=tag)["data"] for _ in range(20)]
        assert received == [f"{tag} {i}" for i in range(20)]


STATUSES = {"server busy": "BUSY", "the client is offline": "OFFLINE"}


@pytest.mark.parametrize("text", ["no such model", "", *STATUSES, "__STREAM_END__", ": x"])
def test_error_marker_ends_the_stream(gateway: Shell, raw: RawPeer, requests: Subscription, text: str) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    raw.send(pub(inbox, b"one") + pub(inbox, b"__STREAM_ERROR__:" + text.encode()))
    assert gateway.wait(event="DATA")["data"] == "one"
    error = gateway.wait(event="ERROR")
    assert (error["status"], error["data"], error.get("code")) == (STATUSES.get(text, "REMOTE"), text, None)


LIES = ["", "0", "-1", "+1", "007", "4 2", "1.5", "0x2a", "2147483648", "4294967297", "9" * 1000, "one", "\u0664"]


@pytest.mark.parametrize("text", ["no such model", *STATUSES])
@pytest.mark.parametrize(
    ("value", "code"), [("1", 1), ("42", 42), ("2147483647", 2**31 - 1), *((lie, None) for lie in LIES)]
)
def test_header_of_an_error_is_its_code(
    gateway: Shell, raw: RawPeer, requests: Subscription, text: str, value: str, code: int | None
) -> None:
    header = f"X-Other: 7\r\nPresence-Error: {value}\r\n".encode()
    inbox = begin(gateway, requests, 1, "alice")
    # It means nothing with a message.
    raw.send(pub(inbox, b"one", header=header) + pub(inbox, b"__STREAM_ERROR__:" + text.encode(), header=header))
    assert gateway.wait(event="DATA")["data"] == "one"
    error = gateway.wait(event="ERROR")
    assert (error["status"], error["data"], error.get("code")) == (STATUSES.get(text, "REMOTE"), text, code)


def test_header_of_an_end_means_nothing(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    raw.send(pub(inbox, b"__STREAM_END__", header=b"Presence-Error: 42\r\n"))
    assert "code" not in gateway.wait(event="END")


@pytest.mark.parametrize(
    "payload",
    [b"__STREAM_END__x", b"__STREAM_END__ ", b"__STREAM_END__\n", b" __STREAM_END__", b"__STREAM_END_",
     b"__stream_end__", b"__STREAM_ERROR__", b"__STREAM_ERROR__x", b"x__STREAM_ERROR__:x", b"__STREAM_"],
)  # fmt: skip
def test_near_markers_are_data(gateway: Shell, raw: RawPeer, requests: Subscription, payload: bytes) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    raw.send(pub(inbox, payload) + pub(inbox, b"__STREAM_END__"))
    assert gateway.wait(event="DATA")["data"].encode() == payload
    gateway.wait(event="END")


@pytest.mark.parametrize("last", [b"__STREAM_END__", b"__STREAM_ERROR__:x"])
def test_messages_after_the_end_are_ignored(gateway: Shell, raw: RawPeer, requests: Subscription, last: bytes) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    follow = [b"late", b"__STREAM_END__", b"__STREAM_ERROR__:late"]
    raw.send(b"".join(pub(inbox, payload) for payload in [last, *follow]))
    # When another stream's end has arrived, everything sent before has been processed.
    raw.send(pub(begin(gateway, requests, 2, "bob"), b"__STREAM_END__"))
    gateway.wait(event="END", tag=2)
    assert [event["event"] for event in gateway.events] == ["END" if last == b"__STREAM_END__" else "ERROR"]
    assert gateway.ask("stats")["messages_ignored"] == 3


def test_answers_may_have_headers_and_reply_subjects(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    raw.send(
        pub(inbox, b"x", reply="some.where", header=b"X: y\r\n") + pub(inbox, b"__STREAM_END__", header=b"X: y\r\n")
    )
    assert gateway.wait(event="DATA")["data"] == "x"
    gateway.wait(event="END")


def test_unserved_subject_has_no_responders(gateway: Shell) -> None:
    gateway.do("request 1 nobody.here alice hello")
    # At once: the server answers, no timeout is needed.
    error = gateway.wait(event="ERROR", timeout=1)
    assert error["status"] == "NO_RESPONDERS"
    assert "nobody.here" in error["data"]
    assert gateway.ask("is_online alice")["text"] == "no"


def test_503_in_mid_stream_is_ignored(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    raw.send(pub(inbox, b"one"))
    gateway.wait(event="DATA")
    status = b"NATS/1.0 503\r\n\r\n"
    raw.send(b"HPUB %s %d %d\r\n%s\r\n" % (inbox.encode(), len(status), len(status), status))
    raw.send(pub(inbox, b"__STREAM_END__"))
    gateway.wait(event="END")


def test_offline_announcement_bytes(connect: Connect, proxy: Proxy, announcements: Subscription) -> None:
    gateway = connect(proxy.url)
    for client in ["alice", "客户端 1", "x" * 1024]:
        gateway.do(f"offline {client}")  # A client unknown here: other processes may know it.
        message = announcements.next()
        assert (message.subject, message.reply, message.payload) == (b"client.offline", b"", client.encode())
        assert ORIGIN.fullmatch(message.header)
        sizes = b"%d %d" % (len(message.header), len(message.header) + len(message.payload))
        assert b"HPUB client.offline %s\r\n%s%s\r\n" % (sizes, message.header, message.payload) in proxy.sent


def test_all_connections_of_a_process_share_an_origin(connect: Connect, announcements: Subscription) -> None:
    origins = []
    for process in [connect(), connect()]:
        for client in ["alice", "bob"]:
            process.do(f"offline {client}")
            origin = ORIGIN.fullmatch(announcements.next().header)
            assert origin
            origins.append(origin[1])
    assert origins[0] == origins[1] != origins[2] == origins[3]


def test_empty_id_is_not_announced(gateway: Shell, announcements: Subscription) -> None:
    gateway.do("offline ")
    gateway.do("offline alice")
    assert announcements.payload() == b"alice"


def test_offline_mark_ends_the_streams(
    gateway: Shell, raw: RawPeer, requests: Subscription, announcements: Subscription
) -> None:
    inbox = begin(gateway, requests, 1, "alice")
    other = begin(gateway, requests, 2, "bob")
    gateway.do("offline alice")
    assert gateway.wait(event="ERROR", tag=1)["status"] == "OFFLINE"
    assert announcements.payload() == b"alice"
    raw.send(pub(inbox, b"late") + pub(other, b"x"))
    assert gateway.wait(event="DATA")["tag"] == 2
    # Announced once, not again for the stream that it ended.
    gateway.do("offline carol")
    assert announcements.payload() == b"carol"


def test_peer_announcement_ends_the_streams(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    gateway.do("listen")
    announcements = raw.subscribe("client.offline")
    begin(gateway, requests, 1, "alice")
    begin(gateway, requests, 2, "bob")
    gateway.do("online alice")
    raw.send(pub("client.offline", b"alice"))
    assert announcements.payload() == b"alice"
    assert gateway.wait(event="ERROR")["tag"] == 1
    assert gateway.ask("is_online alice")["text"] == "no"
    assert gateway.ask("is_online bob")["text"] == "yes"
    # It is not announced again.
    gateway.do("offline carol")
    assert announcements.payload() == b"carol"


def test_own_announcement_echo_spares_newer_streams(
    gateway: Shell, raw: RawPeer, requests: Subscription, announcements: Subscription
) -> None:
    gateway.do("listen")
    for i in range(1, 101):
        gateway.do("offline alice")
        inbox = begin(gateway, requests, i, "alice")
        # Another process's, sent later: when it has taken effect, ours has come back.
        assert announcements.payload() == b"alice"
        bob = begin(gateway, requests, 500 + i, "bob")
        raw.send(pub("client.offline", b"bob"))
        assert announcements.payload() == b"bob"
        gateway.wait(event="ERROR", tag=500 + i)
        raw.send(pub(bob, b"late") + pub(inbox, b"__STREAM_END__"))
        gateway.wait(event="END", tag=i)


@pytest.mark.parametrize("how", ["cancel", "drop"])
def test_cancel_announces_the_client(
    gateway: Shell, requests: Subscription, announcements: Subscription, how: str
) -> None:
    begin(gateway, requests, 1, "alice")
    gateway.do(f"{how} 1")
    message = announcements.next()
    assert message.payload == b"alice"
    assert ORIGIN.fullmatch(message.header)
    assert gateway.ask("is_online alice")["text"] == "no"
    if how == "cancel":
        assert gateway.wait(event="ERROR")["status"] == "CANCELLED"
        assert gateway.ask("cancel 1")["status"] == "CLOSED"


def test_cancel_of_one_of_two_streams_is_not_announced(
    gateway: Shell, requests: Subscription, announcements: Subscription
) -> None:
    begin(gateway, requests, 1, "alice")
    begin(gateway, requests, 2, "alice")
    gateway.do("cancel 1")
    gateway.do("offline between")
    gateway.do("cancel 2")
    assert [announcements.payload(), announcements.payload()] == [b"between", b"alice"]


def test_cancel_of_a_marked_client_is_not_announced(
    gateway: Shell, requests: Subscription, announcements: Subscription
) -> None:
    gateway.do("online alice")
    begin(gateway, requests, 1, "alice")
    gateway.do("cancel 1")
    assert gateway.ask("is_online alice")["text"] == "yes"
    gateway.do("offline after")
    assert announcements.payload() == b"after"


def test_cancel_of_an_anonymous_stream_is_not_announced(
    gateway: Shell, requests: Subscription, announcements: Subscription
) -> None:
    begin(gateway, requests, 1, "-")
    gateway.do("cancel 1")
    gateway.do("offline after")
    assert announcements.payload() == b"after"


def test_ended_stream_is_not_announced(
    gateway: Shell, raw: RawPeer, requests: Subscription, announcements: Subscription
) -> None:
    raw.send(pub(begin(gateway, requests, 1, "alice"), b"__STREAM_END__"))
    gateway.wait(event="END")
    gateway.do("drop 1")
    raw.send(pub(begin(gateway, requests, 2, "bob"), b"__STREAM_ERROR__:x"))
    gateway.wait(event="ERROR")
    gateway.do("drop 2")
    gateway.do("offline after")
    assert announcements.payload() == b"after"


def test_timeout_is_announced(gateway: Shell, requests: Subscription, announcements: Subscription) -> None:
    gateway.do("option timeout_ms 50")
    begin(gateway, requests, 1, "alice")
    assert gateway.wait(event="ERROR")["status"] == "TIMEOUT"
    assert announcements.payload() == b"alice"


def test_close_announces_clients_with_running_streams(
    gateway: Shell, requests: Subscription, announcements: Subscription
) -> None:
    for tag, client in [(1, "alice"), (2, "bob")]:
        begin(gateway, requests, tag, client)
    gateway.do("close 900")
    assert {announcements.payload(), announcements.payload()} == {b"alice", b"bob"}
    assert {gateway.wait(event="ERROR")["status"] for _ in range(2)} == {"CLOSED"}


def test_offline_subject_is_configurable(connect: Connect, raw: RawPeer) -> None:
    everywhere = raw.subscribe(">")
    gateway = connect("", "offline_subject=gone.away")
    gateway.do("offline alice")
    assert everywhere.next()[::3] == (b"gone.away", b"alice")
    gateway.do("listen")
    gateway.do("online bob")
    gateway.do("online carol")
    gateway.do("watch")
    raw.send(pub("client.offline", b"bob") + pub("gone.away", b"carol"))
    assert gateway.wait(event="OFFLINE")["client"] == "carol"


@pytest.mark.parametrize(("announce", "expected"), [("streams", b"with"), ("never", b"by hand")])
def test_announce_option_selects_announcements(
    connect: Connect, raw: RawPeer, requests: Subscription, announce: str, expected: bytes
) -> None:
    announcements = raw.subscribe("client.offline")
    gateway = connect("", f"announce={announce}")
    begin(gateway, requests, 1, "with")
    gateway.do("offline without")
    gateway.do("offline with")
    # Any announcement would have arrived before the next request.
    begin(gateway, requests, 2, "another")
    raw.send(pub("client.offline", b"by hand"))
    assert announcements.payload() == expected


def test_busy_worker_is_retried(gateway: Shell, raw: RawPeer, requests: Subscription) -> None:
    gateway.do("option retries 2")
    gateway.do("option retry_delay_ms 1")
    gateway.do("request 1 llm.generate alice hello")
    asked = []
    for _ in range(3):
        asked.append(requests.next())
        raw.send(pub(asked[-1].reply.decode(), b"__STREAM_ERROR__:server busy"))
    assert asked[0] == asked[1] == asked[2]
    assert gateway.wait(event="ERROR")["data"] == "server busy"
