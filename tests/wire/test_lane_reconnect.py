"""Lost connections do not affect streams on a lane, if both ends reconnect in time."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from conftest import Connect, Shell
from harness import Server
from lane_codec import GAP, NEW, PING, PONG, Frame, LaneMessage, cancel, data, encode_frame
from lane_peer import GatewayByHand, WorkerByHand, take_accept
from proxy import Proxy
from raw import RawPeer, Subscription, pub
from test_malformed_messages import LONE_CR


@pytest.fixture
def worker(connect: Connect, proxy: Proxy) -> Shell:
    """A worker whose connection can be cut."""
    worker = connect(proxy.url)
    worker.do("serve llm.generate workers 0")
    return worker


def begin(gateway: Shell, worker: Shell, tag: int) -> int:
    gateway.do(f"request {tag} llm.generate client{tag} x")
    n: int = worker.wait(event="REQUEST", client=f"client{tag}")["n"]
    # The gateway knows that the stream is on a lane when it has a message.
    worker.do(f"send {n} accepted")
    assert gateway.wait(event="DATA", tag=tag)["data"] == "accepted"
    return n


def receive(gateway: Shell, tag: int, first: int, count: int) -> None:
    """Checks the stream's next messages: all of them, in order, once."""
    received = [gateway.wait(event="DATA", tag=tag)["data"] for _ in range(count)]
    assert received == [str(i) for i in range(first, first + count)]


def as_sent(stream: int, text: str) -> bytes:
    """The bytes of a message on the wire."""
    return encode_frame(data(stream, text.encode()))


def test_streams_survive_a_server_restart(connect: Connect, server: Server) -> None:
    gateway, worker = connect(), connect()
    worker.do("serve llm.generate workers 0")
    streams = {tag: begin(gateway, worker, tag) for tag in range(1, 6)}
    for tag, n in streams.items():
        worker.do(f"flood {n} 100")
        receive(gateway, tag, 0, 100)
    # A request that no worker has accepted is not on a lane.
    silent = RawPeer(server.port)
    silent.subscribe("other.subject")
    gateway.do("request 10 other.subject alice x")
    for _ in range(3):
        server.kill()
        for end in [gateway, worker]:
            end.wait(event="DISCONNECTED")
        # Sends are accepted meanwhile.
        for n in streams.values():
            worker.do(f"flood {n} 100")
        assert gateway.ask("request 11 llm.generate carol x")["status"] == "DISCONNECTED"
        server.start()
        for tag in streams:
            receive(gateway, tag, 0, 100)
        for end in [gateway, worker]:
            end.wait(event="CONNECTED")
    assert gateway.wait(event="ERROR")["tag"] == 10
    for tag, n in streams.items():
        worker.do(f"end {n}")
        gateway.wait(event="END", tag=tag)
    assert worker.take(event="STOPPED") is None
    assert gateway.take(event="ERROR") is None
    assert gateway.ask("stats")["lanes"] == worker.ask("stats")["lanes"] == 1


def test_cancel_while_disconnected_arrives_later(connect: Connect, worker: Shell, proxy: Proxy) -> None:
    gateway = connect(proxy.url)
    first, second = begin(gateway, worker, 1), begin(gateway, worker, 2)
    proxy.cut()
    for end in [gateway, worker]:
        end.wait(event="DISCONNECTED")
    gateway.do("cancel 1")
    assert gateway.wait(event="ERROR", tag=1)["status"] == "CANCELLED"
    worker.do(f"flood {first} 100")
    worker.do(f"flood {second} 100")
    proxy.resume()
    assert worker.wait(event="STOPPED")["n"] == first
    receive(gateway, 2, 0, 100)
    assert gateway.take(event="DATA") is None


@pytest.mark.parametrize("whose", ["worker", "gateway", "both"])
def test_streams_survive_repeated_cuts(connect: Connect, proxy: Proxy, whose: str) -> None:
    worker = connect("" if whose == "gateway" else proxy.url)
    gateway = connect("" if whose == "worker" else proxy.url)
    worker.do("serve llm.generate workers 0")
    for tag in range(1, 11):
        n = begin(gateway, worker, tag)
        proxy.cut_after(as_sent(tag, str(tag * 400)))
        worker.send_line(f"flood {n} 5000")
        worker.send_line(f"end {n}")
        cut = gateway if whose == "gateway" else worker
        cut.wait(event="DISCONNECTED")
        proxy.resume()
        receive(gateway, tag, 0, 5000)
        gateway.wait(event="END", tag=tag)
        for end in [worker, gateway] if whose == "both" else [cut]:
            end.wait(event="CONNECTED")
            end.do("listen")
            while end.take(event="DISCONNECTED"):
                pass
        for _ in ["flood", "end"]:
            worker.wait(event="reply", status="OK")
    assert worker.take(event="STOPPED") is None


@pytest.mark.parametrize("last", ["0", "1", "500", "999"])
def test_lost_messages_are_retransmitted(connect: Connect, worker: Shell, proxy: Proxy, last: str) -> None:
    gateway = connect()
    n = begin(gateway, worker, 1)
    # What the worker sends after `last` is lost, the end too; it does not know until the connection is cut.
    proxy.swallow_after(as_sent(1, last))
    worker.do(f"flood {n} 1000")
    worker.do(f"end {n}")
    assert proxy.swallowed.wait(20)
    proxy.cut()
    proxy.resume()
    receive(gateway, 1, 0, 1000)
    gateway.wait(event="END")


def test_lost_accept_is_retransmitted(connect: Connect, worker: Shell, proxy: Proxy) -> None:
    gateway = connect()
    begin(gateway, worker, 1)
    # At first everything of the lane's second stream is lost.
    proxy.swallow_after(b"\x01\x02\x08")  # ACCEPT, stream 2
    gateway.do("request 2 llm.generate client2 x")
    n = worker.wait(event="REQUEST", client="client2")["n"]
    worker.do(f"flood {n} 100")
    assert proxy.swallowed.wait(20)
    proxy.cut()
    proxy.resume()
    receive(gateway, 2, 0, 100)


def test_sends_while_disconnected_fill_the_window(connect: Connect, worker: Shell, proxy: Proxy) -> None:
    gateway = connect()
    gateway.do("option stream_buffer_bytes 10000")
    n = begin(gateway, worker, 1)
    worker.do(f"send {n} x")
    gateway.wait(event="DATA")
    proxy.cut()
    worker.wait(event="DISCONNECTED")
    refused = worker.ask(f"fill {n} 36")
    assert refused["status"] == "FULL"
    assert 98 <= int(refused["text"]) <= 100
    # A blocked send continues.
    worker.send_line(f"flood {n} 1000")
    proxy.resume()
    for _ in range(int(refused["text"])):
        assert gateway.wait(event="DATA")["data"] == "\0" * 36
    receive(gateway, 1, 0, 1000)
    assert worker.wait(event="reply")["status"] == "OK"


def test_after_a_reconnect_only_pings_are_sent_until_a_pong(worker: Shell, raw: RawPeer, proxy: Proxy) -> None:
    gateway = GatewayByHand(raw)
    lane = gateway.lane()
    gateway.request("llm.generate", "alice", key=1)
    take_accept(lane, 1)
    worker.wait(event="REQUEST")
    lane.ask()
    worker.do("send 1 before")
    assert lane.receive().frames == (data(1, b"before"),)  # which is dropped
    proxy.cut()
    worker.wait(event="DISCONNECTED")
    worker.do("send 1 meanwhile")
    lane.send_control(GAP)  # Nobody is there to receive it.
    proxy.resume()
    assert lane.receive() == LaneMessage(PING | GAP, 2, 0)
    for _ in range(5):
        message = lane.receive()
        assert (message.flags & PING, message.frames) == (PING, ())
    lane.send_control(PONG)
    came: list[Frame] = []
    while len(came) < 2:
        came += lane.receive().frames
    assert came == [data(1, b"before"), data(1, b"meanwhile")]


def test_gateway_requests_missed_messages_after_a_reconnect(connect: Connect, raw: RawPeer, proxy: Proxy) -> None:
    gateway = connect(proxy.url)
    worker = WorkerByHand(raw, "llm.generate")
    gateway.do("request 1 llm.generate alice x")
    lane = worker.accept()
    lane.ask()
    proxy.cut()
    gateway.wait(event="DISCONNECTED")
    lost = [lane.send(data(1, b"%d" % i)) for i in range(10)]
    gateway.do("cancel 1")
    proxy.resume()
    asked = lane.wait_for(PING)
    assert (asked.flags, asked.ack, asked.frames) == (PING | GAP, 1, ())
    for message in lost:
        lane.post(message)
    lane.send_control(PONG)
    assert lane.take() == cancel(1, 4)
    assert lane.ask().ack == 11


@pytest.mark.parametrize("whose", ["worker", "gateway"])
def test_streams_survive_a_malformed_message(connect: Connect, raw: RawPeer, whose: str) -> None:
    gateway, worker = connect(), connect()
    worker.do("serve llm.generate workers 0")
    end = worker if whose == "worker" else gateway
    gateway.do("listen")
    requests: Subscription = raw.subscribe("llm.generate")
    n = begin(gateway, worker, 1)
    header = requests.next().header.decode()
    offer = header.split("Presence-Lane: 1 ")[1].split(" ")[0]
    target = "llm.generate" if whose == "worker" else offer
    for _ in range(20):
        raw.send(pub(target, b"poison", reply="some.where", header=LONE_CR))
        worker.do(f"flood {n} 200")
        receive(gateway, 1, 0, 200)
        end.wait(event="DISCONNECTED")
        end.wait(event="CONNECTED")
        end.do("listen")
    worker.do(f"end {n}")
    gateway.wait(event="END")
    # Each of them ended a NATS client; otherwise this test shows nothing.
    assert end.ask("stats")["connects"] == 21


def test_small_max_payload(connect: Connect, server: Server, tmp_path: Path) -> None:
    server.kill()
    settings = tmp_path / "server.conf"
    settings.write_text("max_payload: 2048")
    server.start("-c", str(settings))
    gateway, worker = connect(), connect()
    worker.do("serve llm.generate workers 0")
    n = begin(gateway, worker, 1)
    largest = 2048 - 64
    assert worker.ask(f"fill {n} {largest + 1}")["status"] == "TOO_LARGE"
    for size in [1, 100, 1000, largest]:
        sent = int(worker.ask(f"fill {n} {size}")["text"])
        assert sent > 0
        for _ in range(sent):
            assert len(gateway.wait(event="DATA")["data"]) == size
    worker.do(f"end {n}")
    gateway.wait(event="END")
    assert worker.ask("stats")["connects"] == 1


def test_max_payload_shrinks_at_a_reconnect(connect: Connect, server: Server, tmp_path: Path) -> None:
    gateway, worker = connect(), connect()
    worker.do("serve llm.generate workers 0")
    n = begin(gateway, worker, 1)
    server.kill()
    for end in [gateway, worker]:
        end.wait(event="DISCONNECTED")
    worker.do(f"send {n} {'x' * 5000}")
    settings = tmp_path / "server.conf"
    settings.write_text("max_payload: 2048")
    server.start("-c", str(settings))
    # That message can never be sent: the lane ends, and both ends are informed.
    assert worker.wait(event="STOPPED")["status"] == "PEER_GONE"
    assert gateway.wait(event="ERROR")["status"] == "PEER_GONE"
    n = begin(gateway, worker, 2)
    worker.do(f"flood {n} 1000")
    receive(gateway, 2, 0, 1000)
    assert worker.ask(f"send {n} {'x' * 5000}")["status"] == "TOO_LARGE"


def test_long_disconnection_ends_the_lane(connect: Connect, proxy: Proxy) -> None:
    worker = connect(proxy.url)
    worker.do("serve llm.generate workers 0")
    gateway = connect("", "heartbeat_ms=100", "peer_grace_ms=300")
    n = begin(gateway, worker, 1)
    worker.do(f"send {n} 0")
    receive(gateway, 1, 0, 1)
    # Unacknowledged messages would begin a new lane. No request belongs to it, so the answer would be CANCEL.
    while worker.ask("stats")["bytes_waiting"]:
        pass
    proxy.cut()
    assert gateway.wait(event="ERROR")["status"] == "PEER_GONE"
    assert worker.ask(f"send {n} 1")["status"] == "OK"
    # The worker learns of it when it reconnects: the lane is unknown by then.
    proxy.resume()
    assert worker.wait(event="STOPPED")["status"] == "PEER_GONE"
    assert worker.ask(f"send {n} 2")["status"] == "PEER_GONE"
    n = begin(gateway, worker, 2)
    worker.do(f"flood {n} 10")
    receive(gateway, 2, 0, 10)


@pytest.mark.parametrize("whose", ["worker", "gateway"])
def test_killed_peer_ends_the_lane(connect: Connect, whose: str) -> None:
    options = ["peer_grace_ms=0", "heartbeat_ms=200"]
    gateway, worker = connect("", *options), connect("", *options)
    worker.do("serve llm.generate workers 0")
    n = begin(gateway, worker, 1)
    worker.do(f"flood {n} 10")
    receive(gateway, 1, 0, 10)
    dying, left = (worker, gateway) if whose == "worker" else (gateway, worker)
    dying.kill()
    ended = left.wait(event="ERROR" if whose == "worker" else "STOPPED", timeout=2)
    assert ended["status"] == "PEER_GONE"


@pytest.mark.parametrize("whose", ["worker", "gateway"])
def test_stopped_peer_ends_the_lane(connect: Connect, whose: str) -> None:
    options = ["heartbeat_ms=200"]
    gateway, worker = connect("", *options), connect("", *options)
    worker.do("serve llm.generate workers 0")
    n = begin(gateway, worker, 1)
    worker.do(f"flood {n} 10")
    receive(gateway, 1, 0, 10)
    stopped, left = (worker, gateway) if whose == "worker" else (gateway, worker)
    kind = "ERROR" if whose == "worker" else "STOPPED"
    # A short stop: the stream goes on.
    stopped.process.send_signal(signal.SIGSTOP)
    left.do("stats")
    stopped.process.send_signal(signal.SIGCONT)
    worker.do(f"flood {n} 10")
    receive(gateway, 1, 0, 10)
    stopped.process.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    assert left.wait(event=kind)["status"] == "PEER_GONE"
    # Three heartbeats, or 3 s if no PING was answered yet.
    assert 0.3 < time.monotonic() - since < 6
    # It learns of it when it is resumed.
    stopped.process.send_signal(signal.SIGCONT)
    assert stopped.wait(event="STOPPED" if whose == "worker" else "ERROR")["status"] == "PEER_GONE"


def test_new_flag_is_sent_until_an_ack(worker: Shell, raw: RawPeer, proxy: Proxy) -> None:
    gateway = GatewayByHand(raw)
    lane = gateway.lane()
    gateway.request("llm.generate", "alice", key=1)
    first = lane.receive()
    assert first.flags == NEW
    proxy.cut()
    worker.wait(event="DISCONNECTED")
    proxy.resume()
    assert lane.receive() == LaneMessage(PING | GAP | NEW, 1, 0)
    lane.send_control(PONG)
    # The lane's first message was lost.
    while (again := lane.receive()).frames == ():
        pass
    assert (again.sequence, again.frames) == (1, first.frames)
    lane.apply(again)
    assert not lane.ask().flags & NEW
