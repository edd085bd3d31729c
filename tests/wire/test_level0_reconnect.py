"""Lost connections end streams on level 0 with a clear status at both ends; no stream looks complete when it is not."""

from __future__ import annotations

import signal

import pytest
from conftest import Connect, Shell
from harness import Server
from proxy import Proxy
from raw import INBOX, RawPeer, Subscription, pub

LOST = b"__STREAM_ERROR__:the worker lost its connection to nats-server"
END = b"__STREAM_END__"
LEVEL_0 = "lanes=false"


@pytest.fixture
def worker(connect: Connect, proxy: Proxy) -> Shell:
    """A worker whose connection can be cut."""
    worker = connect(proxy.url, LEVEL_0)
    worker.do("serve llm.generate workers 0")
    return worker


def begin(worker: Shell, raw: RawPeer, client: str) -> tuple[int, Subscription]:
    answers = raw.request("llm.generate", client)
    return worker.wait(event="REQUEST", client=client)["n"], answers


def assert_serves(gateway: Shell, worker: Shell, tag: int) -> None:
    """Checks that a stream between the two goes from its beginning to its end."""
    gateway.do(f"request {tag} llm.generate again{tag} x")
    n = worker.wait(event="REQUEST", client=f"again{tag}")["n"]
    worker.do(f"flood {n} 100")
    worker.do(f"end {n}")
    assert [gateway.wait(event="DATA", tag=tag)["data"] for _ in range(100)] == [str(i) for i in range(100)]
    gateway.wait(event="END", tag=tag)


def test_streams_end_with_a_server_restart(connect: Connect, server: Server) -> None:
    gateway, worker = connect("", LEVEL_0), connect("", LEVEL_0)
    worker.do("serve llm.generate workers 0")
    for tag in [1, 2]:
        gateway.do(f"request {tag} llm.generate c{tag} x")
        worker.wait(event="REQUEST", client=f"c{tag}")
    worker.do("send 1 x")
    assert gateway.wait(event="DATA")["data"] == "x"
    gateway.do("online marked")

    server.kill()
    for end in [gateway, worker]:
        assert end.wait(event="DISCONNECTED")["status"] == "DISCONNECTED"
    for tag in [1, 2]:
        assert gateway.wait(event="ERROR", tag=tag)["status"] == "DISCONNECTED"
        assert worker.wait(event="STOPPED", n=tag)["status"] == "DISCONNECTED"
        assert worker.ask(f"send {tag} y")["status"] == "DISCONNECTED"
        assert worker.ask(f"end {tag}")["status"] == "DISCONNECTED"
    assert gateway.ask("request 3 llm.generate c3 x")["status"] == "DISCONNECTED"
    # Clients of ended streams are offline, marked ones are not.
    assert gateway.ask("is_online c1")["text"] == worker.ask("is_online c1")["text"] == "no"
    assert gateway.ask("is_online marked")["text"] == "yes"

    server.start()
    for end in [gateway, worker]:
        end.wait(event="CONNECTED")
        assert end.ask("stats")["connects"] == 2
    # The worker may reconnect later; when the server has answered, it has the subscription.
    worker.do("listen")
    assert_serves(gateway, worker, 4)
    gateway.do("request 5 llm.generate c5 x")
    n = worker.wait(event="REQUEST", client="c5")["n"]
    gateway.do("offline c5")
    assert worker.wait(event="STOPPED", n=n)["status"] == "OFFLINE"
    # Old streams stay ended.
    assert worker.ask("send 1 y")["status"] == "DISCONNECTED"
    assert gateway.take(event="ERROR", tag=1) is None


def test_blocked_send_ends_with_the_connection(connect: Connect, server: Server, raw: RawPeer) -> None:
    worker = connect("", "send_buffer_bytes=65536")
    worker.do("serve llm.generate workers 0")
    n, _ = begin(worker, raw, "alice")
    server.process.send_signal(signal.SIGSTOP)
    # More than all buffers on the way hold: it blocks.
    worker.send_line(f"flood {n} 100000000")
    server.kill()
    assert worker.wait(event="reply")["status"] == "DISCONNECTED"
    assert worker.wait(event="STOPPED")["status"] == "DISCONNECTED"


def test_cut_worker_connection_ends_the_stream(connect: Connect, worker: Shell, proxy: Proxy) -> None:
    gateway = connect()
    gateway.do("request 1 llm.generate alice x")
    worker.wait(event="REQUEST")
    worker.do("send 1 x")
    assert gateway.wait(event="DATA")["data"] == "x"
    proxy.cut()
    assert worker.wait(event="STOPPED")["status"] == "DISCONNECTED"
    proxy.resume()
    error = gateway.wait(event="ERROR")
    assert (error["status"], error["data"]) == ("REMOTE", "the worker lost its connection to nats-server")
    worker.wait(event="CONNECTED")
    worker.do("listen")
    assert_serves(gateway, worker, 2)


def test_request_is_retried_until_the_worker_reconnects(connect: Connect, worker: Shell, proxy: Proxy) -> None:
    gateway = connect()
    proxy.cut()
    worker.wait(event="DISCONNECTED")
    # Until the server notices the cut, it keeps the request for the dead connection.
    gateway.do("option retries 100")
    gateway.do("option retry_delay_ms 10")
    gateway.do("request 1 llm.generate alice x")
    proxy.resume()
    n = worker.wait(event="REQUEST")["n"]
    worker.do(f"end {n}")
    gateway.wait(event="END")


@pytest.mark.parametrize("last", [b"0", b"1", b"500", b"998", b"999"])
def test_lost_messages_are_never_followed_by_the_end(worker: Shell, raw: RawPeer, proxy: Proxy, last: bytes) -> None:
    n, answers = begin(worker, raw, "alice")
    # What the worker sends after `last` is lost, the end too; it does not know until the connection is cut.
    proxy.swallow_after(b"\r\n" + last + b"\r\n")
    worker.do(f"flood {n} 1000")
    worker.do(f"end {n}")
    assert proxy.swallowed.wait(20)
    assert [answers.payload() for _ in range(int(last) + 1)] == [b"%d" % i for i in range(int(last) + 1)]
    proxy.cut()
    proxy.resume()
    assert answers.payload() == LOST
    assert_nothing_follows(worker, raw, answers)


def assert_nothing_follows(worker: Shell, raw: RawPeer, answers: Subscription) -> None:
    """Checks that the worker sent nothing more before a later stream ended."""
    worker.wait(event="CONNECTED")
    worker.do("listen")
    n, later = begin(worker, raw, "later")
    worker.do(f"end {n}")
    assert later.payload() == END
    assert answers.payloads() == []


def test_received_end_stays_the_end(connect: Connect, worker: Shell, raw: RawPeer, proxy: Proxy) -> None:
    gateway = connect()
    observed = raw.subscribe("_INBOX.>")
    gateway.do("request 1 llm.generate alice x")
    n = worker.wait(event="REQUEST")["n"]
    # The end passes, but nothing after it: the worker cannot know that.
    proxy.swallow_after(END + b"\r\n")
    worker.do(f"flood {n} 10")
    worker.do(f"end {n}")
    gateway.wait(event="END")
    assert proxy.swallowed.wait(20)
    proxy.cut()
    proxy.resume()
    # Messages without a payload are the worker's own, to itself.
    payloads = filter(None, iter(observed.payload, None))
    assert [next(payloads) for _ in range(12)] == [b"%d" % i for i in range(10)] + [END, LOST]
    # The gateway received the error, and ignored it.
    worker.wait(event="CONNECTED")
    worker.do("listen")
    assert_serves(gateway, worker, 2)
    assert gateway.take(event="ERROR") is None
    assert gateway.ask("stats")["messages_ignored"] == 1


def test_confirmed_end_is_not_revoked(worker: Shell, raw: RawPeer, proxy: Proxy) -> None:
    n, answers = begin(worker, raw, "alice")
    inboxes = raw.subscribe("_INBOX.*.*")
    worker.do(f"end {n}")
    assert answers.payload() == END
    # The worker's message to itself, after the end. It has come back when a later one has.
    assert inboxes.payload() == END
    assert INBOX.fullmatch(inboxes.next().subject)
    worker.do("listen")
    proxy.cut()
    proxy.resume()
    assert_nothing_follows(worker, raw, answers)


@pytest.mark.parametrize("whose", ["worker", "gateway"])
def test_repeated_cuts_end_each_stream_once(connect: Connect, proxy: Proxy, whose: str) -> None:
    worker = connect(proxy.url if whose == "worker" else "", LEVEL_0)
    gateway = connect(proxy.url if whose == "gateway" else "", LEVEL_0)
    worker.do("serve llm.generate workers 0")
    for tag in range(1, 11):
        last = tag * 200
        gateway.do(f"request {tag} llm.generate alice{tag} x")
        n = worker.wait(event="REQUEST")["n"]
        proxy.cut_after(b"\r\n%d\r\n" % last)
        worker.send_line(f"flood {n} 5000")
        worker.send_line(f"end {n}")
        cut = worker if whose == "worker" else gateway
        cut.wait(event="DISCONNECTED")
        proxy.resume()
        received = 0
        while (event := gateway.wait(tag=tag))["event"] == "DATA":
            assert event["data"] == str(received)
            received += 1
        assert received <= last + 1
        assert (event["event"], event["status"]) == ("ERROR", "REMOTE" if whose == "worker" else "DISCONNECTED")
        for _ in ["flood", "end"]:
            worker.wait(event="reply")
        cut.wait(event="CONNECTED")
        cut.do("listen")


def test_lost_error_is_sent_again(worker: Shell, raw: RawPeer, proxy: Proxy) -> None:
    n, answers = begin(worker, raw, "alice")
    proxy.swallow_after(b"\r\none\r\n")
    worker.do(f"send {n} one")
    worker.do(f"error {n} no such model")
    assert proxy.swallowed.wait(20)
    proxy.cut()
    proxy.resume()
    assert [answers.payload(), answers.payload()] == [b"one", b"__STREAM_ERROR__:no such model"]


def test_announcements_while_disconnected_arrive_later(connect: Connect, raw: RawPeer, proxy: Proxy) -> None:
    announcements = raw.subscribe("client.offline")
    gateway = connect(proxy.url)
    proxy.cut()
    gateway.wait(event="DISCONNECTED")
    clients = [f"c{i}" for i in range(1000)]
    for client in clients:
        gateway.do(f"offline {client}")
    proxy.resume()
    assert [announcements.payload().decode() for _ in clients] == clients


def test_lost_announcements_are_sent_again(connect: Connect, raw: RawPeer, proxy: Proxy) -> None:
    announcements = raw.subscribe("client.offline")
    gateway = connect(proxy.url)
    proxy.swallow_after(b"\r\nfirst\r\n")
    gateway.do("offline first")
    assert announcements.payload() == b"first"
    gateway.do("offline second")
    assert proxy.swallowed.wait(20)
    proxy.cut()
    proxy.resume()
    while (client := announcements.payload()) != b"second":
        assert client == b"first"  # Its arrival was not confirmed, so it may come twice.


def test_reconnected_gateway_stops_the_worker(connect: Connect, raw: RawPeer, proxy: Proxy) -> None:
    requests = raw.subscribe("llm.generate")
    announcements = raw.subscribe("client.offline")
    gateway = connect(proxy.url)
    gateway.do("request 1 llm.generate alice x")
    inbox = requests.next().reply.decode()
    raw.send(pub(inbox, b"x"))
    gateway.wait(event="DATA")
    proxy.cut()
    assert gateway.wait(event="ERROR")["status"] == "DISCONNECTED"
    raw.send(pub(inbox, b"lost"))
    proxy.resume()
    assert announcements.payload() == b"alice"
    # What the worker sends until it is stopped is ignored: no data, and no end after the missing part.
    raw.send(pub(inbox, b"late") + pub(inbox, END))
    gateway.do("request 2 llm.generate bob x")
    raw.send(pub(requests.next().reply.decode(), END))
    gateway.wait(event="END", tag=2)
    assert gateway.take(event="DATA") is None
    assert gateway.take(event="END") is None


def test_max_reconnects_closes_the_connection(connect: Connect, proxy: Proxy) -> None:
    gateway = connect(proxy.url, "max_reconnects=2", "reconnect_min_ms=1")
    proxy.cut()
    assert gateway.wait(event="DISCONNECTED")["status"] == "DISCONNECTED"
    assert gateway.wait(event="DISCONNECTED")["status"] == "CLOSED"
    assert gateway.ask("request 1 llm.generate alice x")["status"] == "CLOSED"
