"""The library's worker, and a gateway that speaks lanes, driven by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from conftest import Connect, Shell
from harness import Server
from lane_codec import (
    DATA,
    ERROR,
    GAP,
    HEADER,
    NEW,
    OVERHEAD,
    PING,
    PONG,
    RESET,
    Frame,
    LaneMessage,
    accept,
    cancel,
    code,
    credit,
    data,
    decode,
    encode,
    end,
    enlarged,
    error,
)
from lane_peer import OWN, GatewayByHand, LaneEnd, no_responders, take_accept
from raw import RawPeer, pub

OFFLINE, CANCELLED = 2, 4
"""Reasons in a CANCEL."""


@pytest.fixture
def worker(connect: Connect) -> Shell:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    return worker


@pytest.fixture
def gateway(raw: RawPeer) -> GatewayByHand:
    return GatewayByHand(raw)


@pytest.fixture
def lane(gateway: GatewayByHand) -> LaneEnd:
    return gateway.lane()


def begin(worker: Shell, gateway: GatewayByHand, lane: LaneEnd, client: str, window: int = 65536) -> tuple[int, int]:
    """A running stream: its number in the worker, and on the lane."""
    key = hash(client) % 2**64
    gateway.request("llm.generate", client, key=key, window=window)
    n = worker.wait(event="REQUEST", client=client)["n"]
    return n, take_accept(lane, key)


def ignored(worker: Shell) -> int:
    count: int = worker.ask("stats")["messages_ignored"]
    return count


def assert_goes_on(worker: Shell, lane: LaneEnd, n: int, stream: int) -> None:
    """Checks that the stream carries a message, and ends it."""
    worker.do(f"send {n} still here")
    assert lane.take() == data(stream, b"still here")
    worker.do(f"end {n}")
    assert lane.take() == end(stream)


def test_messages_and_end_become_frames(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    answers = gateway.request("llm.generate", "alice", key=7)
    request = worker.wait(event="REQUEST")
    assert (request["client"], request["data"]) == ("alice", "hello")
    first = lane.receive()
    # NEW is set until something is acknowledged.
    assert first == LaneMessage(NEW, 1, 0, (accept(1, 7),))
    worker.do("send 1 one")
    assert lane.receive() == LaneMessage(NEW, 2, 0, (data(1, b"one"),))
    lane.received = 2
    lane.send_control()
    assert lane.ask() == LaneMessage(PONG, 2, 0)
    worker.do("send 1 ")
    # Reserved texts, which level 0 cannot send.
    worker.do("send 1 __STREAM_END__")
    worker.do("end 1")
    assert [lane.take() for _ in range(3)] == [data(1, b""), data(1, b"__STREAM_END__"), end(1)]
    # Nothing arrived on level 0, and after the acknowledgement nothing is pending.
    lane.ask()
    assert answers.payloads() == []
    stats = worker.ask("stats")
    assert (stats["lanes"], stats["senders"], stats["bytes_waiting"], stats["messages_ignored"]) == (1, 0, 0, 0)


def test_lane_inbox_has_128_random_bits(worker: Shell, raw: RawPeer) -> None:
    inboxes = set()
    for key in range(20):
        gateway = GatewayByHand(raw)
        lane = gateway.lane()
        gateway.request("llm.generate", "alice", key=key)
        take_accept(lane, key)
        assert OWN.fullmatch(lane.peer.encode())
        inboxes.add(lane.peer.split(".")[-1])
    assert len(inboxes) == 20
    # No bit is the same in all of them.
    numbers = [int(inbox, 16) for inbox in inboxes]
    always = zeros = 2**128 - 1
    for number in numbers:
        always &= number
        zeros &= ~number
    assert (bin(always).count("1"), bin(zeros).count("1")) < (4, 4)
    assert worker.ask("stats")["lanes"] == 20


def test_streams_of_a_gateway_share_a_lane(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    streams = dict(begin(worker, gateway, lane, f"c{i}") for i in range(10))
    assert sorted(streams.values()) == list(range(1, 11))
    for i in range(20):
        for n in streams:
            worker.do(f"send {n} {i}")
    came: dict[int, list[bytes]] = {}
    for _ in range(200):
        frame = lane.take(DATA)
        came.setdefault(frame.stream, []).append(frame.body)
    assert came == {stream: [b"%d" % i for i in range(20)] for stream in streams.values()}
    assert worker.ask("stats")["lanes"] == 1


def test_queued_frames_share_a_message(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, _ = begin(worker, gateway, lane, "alice", window=1 << 22)
    worker.do(f"flood {n} 50000")
    got: list[bytes] = []
    messages = 0
    while len(got) < 50_000:
        message = lane.receive()
        assert len(encode(message)) <= 65536
        lane.apply(message)
        messages += bool(message.frames)
        got += [frame.body for frame in message.frames]
    assert got == [b"%d" % i for i in range(50_000)]
    # The exact number depends on how busy the machine is.
    assert messages < 25_000


def test_error_becomes_a_frame(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    worker.do(f"send {n} one")
    worker.do(f"error {n} no such model")
    assert [lane.take(), lane.take()] == [data(stream, b"one"), error(stream, b"no such model")]


def test_code_becomes_a_frame_before_the_error(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    worker.do(f"send {n} one")
    worker.do(f"code {n} 404 no such model")
    # A gateway of an earlier release skips the second frame, by its length, and reads the others.
    frames = [lane.take() for _ in range(3)]
    assert frames == [data(stream, b"one"), code(stream, 404), error(stream, b"no such model")]


def test_freed_sender_ends_with_an_error(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    worker.do(f"free {n}")
    assert lane.take() == error(stream, b"the worker left the stream unfinished")


@pytest.mark.parametrize(
    ("reason", "status"), [(CANCELLED, "CANCELLED"), (OFFLINE, "OFFLINE"), (0, "CANCELLED"), (255, "CANCELLED")]
)
def test_cancel_stops_only_its_sender(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, reason: int, status: str
) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    other, others = begin(worker, gateway, lane, "alice")
    lane.send(cancel(stream, reason))
    stopped = worker.wait(event="STOPPED")
    assert (stopped["n"], stopped["status"]) == (n, status)
    for command in [f"send {n} x", f"end {n}", f"error {n} x"]:
        assert worker.ask(command)["status"] == status
    # Nothing follows for it, and the client's other stream goes on.
    assert_goes_on(worker, lane, other, others)


def test_cancel_without_a_reason(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.send(Frame(cancel(1, 0).kind, stream))
    assert worker.wait(event="STOPPED", n=n)["status"] == "CANCELLED"


def test_announcement_stops_the_sender(worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    raw.send(pub("client.offline", b"alice"))
    assert worker.wait(event="STOPPED", n=n)["status"] == "OFFLINE"
    assert lane.take() == error(stream, b"the client is offline")


def test_request_beyond_max_streams_is_busy(connect: Connect, gateway: GatewayByHand, lane: LaneEnd) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 1")
    n, stream = begin(worker, gateway, lane, "alice")
    # A refusal needs no lane.
    assert gateway.request("llm.generate", "bob", key=2).payload() == b"__STREAM_ERROR__:server busy"
    assert_goes_on(worker, lane, n, stream)


# The window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "size", "count"),
    [
        (1000, 36, 10),  # 100 each: exactly full
        (1000, 37, 9),  # 101 each: the tenth would exceed the window, with more than half of it used
        (1000, 436, 2),  # 500 each: with half of the window used, a message still fits
        (1000, 600, 1),
        (1000, 5000, 1),  # larger than the window
        (127, 0, 1),  # 64 each: more than half is used, and another does not fit
        (128, 0, 2),
        (1, 100, 1),
        (0, 100, 1),
    ],
)
def test_window_limits_outstanding_bytes(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, window: int, size: int, count: int
) -> None:
    n, stream = begin(worker, gateway, lane, "alice", window)
    refused = worker.ask(f"fill {n} {size}")
    assert (refused["status"], refused["text"]) == ("FULL", str(count))
    for _ in range(count):
        assert lane.take() == data(stream, bytes(size))
    # An acknowledgement is no credit.
    lane.ask()
    assert worker.ask(f"fill {n} {size}")["text"] == "0"
    lane.send(credit(stream, count * (size + OVERHEAD)))
    lane.ask()
    assert worker.wait(event="WRITABLE")["n"] == n
    assert worker.ask(f"fill {n} {size}")["text"] == str(count)


def test_half_of_the_window_admits_a_message_of_any_size(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice", 1000)
    worker.ask(f"fill {n} 36")
    lane.send(credit(stream, 499))
    lane.ask()
    assert worker.ask(f"fill {n} 5000")["text"] == "0"
    lane.send(credit(stream, 1))
    lane.ask()
    assert worker.ask(f"fill {n} 5000")["text"] == "1"


@pytest.mark.parametrize("weight", [2**64 - 1, 2**63, 65537])
def test_excess_credit_opens_the_whole_window(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, weight: int
) -> None:
    n, stream = begin(worker, gateway, lane, "alice", 1000)
    other, _ = begin(worker, gateway, lane, "bob", 1000)
    worker.ask(f"fill {n} 36")
    lane.send(credit(stream, weight), credit(stream, weight))
    lane.ask()
    assert worker.ask(f"fill {n} 36")["text"] == "10"
    assert worker.ask(f"fill {other} 36")["text"] == "10"


def test_enlarged_window_admits_more(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice", 1000)
    assert worker.ask(f"fill {n} 36")["text"] == "10"
    lane.send(enlarged(stream, 2000))
    lane.ask()
    assert worker.wait(event="WRITABLE")["n"] == n
    assert worker.ask(f"fill {n} 36")["text"] == "10"
    # All of the larger window can be returned.
    lane.send(credit(stream, 2000))
    lane.ask()
    assert worker.ask(f"fill {n} 36")["text"] == "20"


def test_blocked_stream_does_not_delay_others(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    slow, _ = begin(worker, gateway, lane, "slow", 1000)
    quick, stream = begin(worker, gateway, lane, "quick")
    assert worker.ask(f"fill {slow} 36")["text"] == "10"
    for _ in range(10):
        lane.take(DATA)
    assert_goes_on(worker, lane, quick, stream)


def test_unacknowledged_bytes_are_limited(connect: Connect, gateway: GatewayByHand, lane: LaneEnd) -> None:
    worker = connect("", "send_buffer_bytes=65536")
    worker.do("serve llm.generate workers 0")
    n, _ = begin(worker, gateway, lane, "alice", 1 << 22)
    lane.acknowledges = lane.answers_pings = False
    refused = worker.ask(f"fill {n} 1000")
    assert (refused["status"], refused["text"]) == ("FULL", "65")  # of 1004 bytes each, with their frames
    assert worker.ask("stats")["bytes_waiting"] >= 65 * 1004
    # The congestion window limits what is in flight: acknowledgements open it.
    lane.acknowledges = lane.answers_pings = True
    for _ in range(65):
        lane.take(DATA)
    assert worker.wait(event="WRITABLE")["n"] == n


def test_largest_message_fits(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice", 1 << 22)
    largest = (1 << 20) - 64
    assert worker.ask(f"fill {n} {largest + 1}")["status"] == "TOO_LARGE"
    assert int(worker.ask(f"fill {n} {largest}")["text"]) > 0
    assert lane.take() == data(stream, bytes(largest))


# Numbers, acknowledgements, gaps -------------------------------------------------------------------------------------


def test_gap_causes_retransmission(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    for i in range(5):
        worker.do(f"send {n} {i}")
        assert lane.receive().frames == (data(stream, b"%d" % i),)
    # Acknowledge two of them.
    lane.received = 3
    lane.send_control(GAP)
    again = [lane.receive() for _ in range(3)]
    assert [(message.sequence, message.frames) for message in again] == [
        (4, (data(stream, b"2"),)), (5, (data(stream, b"3"),)), (6, (data(stream, b"4"),))
    ]  # fmt: skip
    # The same GAP twice counts once.
    lane.send_control(GAP)
    lane.received = 6
    assert lane.ask() == LaneMessage(PONG, 6, 0)
    assert_goes_on(worker, lane, n, stream)


def test_unacknowledged_frames_cause_a_ping(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.acknowledges = lane.answers_pings = False
    worker.do(f"send {n} lost")
    assert lane.receive().frames == (data(stream, b"lost"),)
    # The message and the first PING were lost, or the PONG was.
    assert lane.receive() == LaneMessage(PING, 2, 0)
    assert lane.receive() == LaneMessage(PING, 2, 0)
    lane.send_control(PONG)
    assert lane.receive() == LaneMessage(0, 2, 0, (data(stream, b"lost"),))
    lane.received = 2
    lane.send_control(PONG)
    assert_goes_on(worker, lane, n, stream)


def test_duplicates_are_dropped(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice", 1000)
    worker.ask(f"fill {n} 36")
    again = lane.send(credit(stream, 500))
    for _ in range(5):
        lane.post(again)
    assert lane.ask().ack == 1
    # Credit of 500 once, not six times.
    assert worker.ask(f"fill {n} 36")["text"] == "5"


def test_out_of_order_messages_cause_a_gap(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    other, others = begin(worker, gateway, lane, "bob")
    messages = [LaneMessage(0, 1, lane.received, (cancel(stream, OFFLINE),)),
                LaneMessage(0, 2, lane.received, (credit(others, 100),)),
                LaneMessage(0, 3, lane.received, (cancel(others, OFFLINE),))]  # fmt: skip
    lane.post(messages[2])
    message = lane.wait_for(GAP)
    assert message.ack == 0
    assert worker.take(event="STOPPED") is None
    # Reported once, not for each message that follows.
    lane.post(messages[1])
    lane.sent = 3
    assert lane.ask().ack == 0
    for message in messages:
        lane.post(message)
    assert worker.wait(event="STOPPED", n=n)["status"] == "OFFLINE"
    assert worker.wait(event="STOPPED", n=other)["status"] == "OFFLINE"
    assert lane.ask().ack == 3


def test_message_without_frames_reveals_a_gap(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.sent = 1  # Lost on the way.
    lane.send_control()
    assert lane.wait_for(GAP).ack == 0
    lane.sent = 0
    lane.send(cancel(stream, OFFLINE))
    assert worker.wait(event="STOPPED", n=n)["status"] == "OFFLINE"


def test_ping_is_answered(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.send(credit(stream, 1))
    assert lane.ask() == LaneMessage(PONG, 1, 1)
    assert_goes_on(worker, lane, n, stream)


# New and invalid content ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offer",
    ["", "1", "2 {inbox} {key} 65536", "0 {inbox} {key} 65536", "-1 {inbox} {key} 65536", "256 {inbox} {key} 65536",
     "x {inbox} {key} 65536", "1 {inbox}", "1 {inbox} {key}", "1 {inbox} xyz 65536", "1 {inbox} 1{key} 65536",
     "1 {inbox} {key} -1", "1 {inbox} {key} x", "1 {inbox} {key} 99999999999999999999", "1  {inbox} {key} 65536",
     "1 client.offline {key} 65536", "1 $SYS.REQ.SERVER.PING {key} 65536", "1 $JS.API.INFO {key} 65536",
     "1 {inbox}.* {key} 65536", "1 {inbox}.> {key} 65536", "1 > {key} 65536", "1 . {key} 65536", "1 a..b {key} 65536",
     "1 a\tb {key} 65536", "1 " + "x" * 4096 + ".* {key} 65536"],
)  # fmt: skip
def test_unsupported_offer_is_answered_on_level_0(
    worker: Shell, raw: RawPeer, gateway: GatewayByHand, offer: str
) -> None:
    everything = raw.subscribe(">")
    offer = offer.format(inbox=gateway.offer, key="0123456789abcdef")
    answers = gateway.request("llm.generate", "alice", key=0, offer=offer or " ")
    n = worker.wait(event="REQUEST")["n"]
    worker.do(f"send {n} one")
    worker.do(f"end {n}")
    assert [answers.payload(), answers.payload()] == [b"one", b"__STREAM_END__"]
    # Only the request and its answers were sent anywhere.
    assert [everything.payload() for _ in range(3)] == [b"hello", b"one", b"__STREAM_END__"]
    stats = worker.ask("stats")
    assert (stats["lanes"], stats["requests_ignored"]) == (0, 0)


def test_lanes_are_limited_to_8192(connect: Connect, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer) -> None:
    """For any number of strangers who offer one, and who are all there. Further offers are answered on level 0."""
    # The heartbeat is so long that none is gone meanwhile.
    worker = connect("", "heartbeat_ms=60000")
    worker.do("serve llm.generate workers 0")
    n, stream = begin(worker, gateway, lane, "alice")
    assert_goes_on(worker, lane, n, stream)
    raw.subscribe("_INBOX.stranger.*")
    for start in range(0, 9000, 500):
        for i in range(start, start + 500):
            header = f"Presence-Lane: 1 _INBOX.stranger.{i} {i:016x} 65536\r\n"
            raw.send(pub("llm.generate", reply=f"_INBOX.nowhere.{i}", header=header.encode()))
        while worker.ask("stats")["requests"] < start + 501:
            pass
    assert worker.ask("stats")["lanes"] == 8192
    assert "8192 lanes" in worker.wait(event="LOG")["data"]
    answers = GatewayByHand(raw).request("llm.generate", "bob", key=7)
    n = worker.wait(event="REQUEST", client="bob")["n"]
    worker.do(f"send {n} one")
    assert answers.payload() == b"one"
    # Existing lanes go on.
    n, stream = begin(worker, gateway, lane, "carol")
    assert_goes_on(worker, lane, n, stream)


def test_further_words_in_an_offer_are_ignored(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    gateway.request("llm.generate", "alice", key=0, offer=f"1 {gateway.offer} 0123456789abcdef 65536 and more")
    take_accept(lane, 0x0123456789ABCDEF)


def test_worker_without_lanes_answers_on_level_0(connect: Connect, gateway: GatewayByHand) -> None:
    worker = connect("", "lanes=false")
    worker.do("serve llm.generate workers 0")
    answers = gateway.request("llm.generate", "alice", key=1)
    worker.wait(event="REQUEST")
    worker.do("send 1 one")
    assert answers.payload() == b"one"


def test_unknown_frame_kinds_are_skipped(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.send(
        Frame(9, stream, b"x" * 300),
        Frame(0, stream),
        code(stream, 42),
        Frame(255, 2**32 - 1, b"y"),
        cancel(stream, OFFLINE),
    )
    assert worker.wait(event="STOPPED", n=n)["status"] == "OFFLINE"
    assert ignored(worker) == 0


def test_worker_frames_from_a_gateway_are_skipped(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.send(accept(9, 9), data(stream, b"x"), end(stream), error(stream, b"x"))
    lane.ask()
    assert_goes_on(worker, lane, n, stream)


def test_frames_of_unknown_streams_are_skipped(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    lane.send(*(frame for other in [0, 2, 1000, 2**32 - 1] for frame in (cancel(other, OFFLINE), credit(other, 1))))
    lane.ask()
    assert_goes_on(worker, lane, n, stream)


def message_of(frames: bytes, sequence: int = 1) -> bytes:
    return encode(LaneMessage(0, sequence, 0)) + frames


MALFORMED = {
    "kind alone": b"\x05",
    "stream number cut off": b"\x05\x80",
    "length missing": b"\x05\x01",
    "length cut off": b"\x05\x01\x80",
    "body cut off": b"\x05\x01\x02\x04",
    "body of 4 GiB": b"\x05\x01\xff\xff\xff\xff\x0f",
    "stream number above 32 bits": b"\x05\x80\x80\x80\x80\x10\x01\x04",
    "number of six bytes": b"\x05\x80\x80\x80\x80\x80\x00\x01\x04",
    "credit too short": b"\x06\x01\x07" + b"\x00" * 7,
    "window too short": b"\x08\x01\x07" + b"\x00" * 7,
    "window too large": b"\x08\x01\x08" + b"\x00" * 4 + b"\x01" + b"\x00" * 3,
    "credit empty": b"\x06\x01\x00",
    "after a good frame": b"\x06\x01\x08" + b"\x00" * 8 + b"\x05",
}


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_frames_end_only_their_lane(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer, frames: bytes
) -> None:
    n, _ = begin(worker, gateway, lane, "alice")
    bystander = GatewayByHand(raw)
    others = bystander.lane()
    other, other_stream = begin(worker, bystander, others, "bob")
    raw.send(pub(lane.peer, message_of(frames), reply=lane.own))
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    assert lane.wait_for(RESET).flags == RESET
    assert ignored(worker) == 1
    assert_goes_on(worker, others, other, other_stream)
    # The gateway begins anew.
    again = gateway.lane()
    begin(worker, gateway, again, "alice")
    assert again.peer != lane.peer


def test_ack_of_unsent_messages_ends_the_lane(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer
) -> None:
    """Somebody answered in the gateway's place, or it lies: what has arrived is no longer known."""
    n, _ = begin(worker, gateway, lane, "alice")
    raw.send(pub(lane.peer, encode(LaneMessage(0, 0, 2)), reply=lane.own))
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    assert lane.wait_for(RESET).flags == RESET
    assert ignored(worker) == 1


def test_new_gateway_end_ends_the_lane(worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer) -> None:
    n, _ = begin(worker, gateway, lane, "alice")
    lane.ask()
    # The gateway began this lane anew: what the first end had is lost.
    raw.send(pub(lane.peer, encode(LaneMessage(0, 0, 0)), reply=f"{gateway.offer}-2"))
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    assert lane.wait_for(RESET).flags == RESET
    assert ignored(worker) == 1


STRANGE = {
    "nothing": b"",
    "a byte": b"\x01",
    "a header cut off": encode(LaneMessage(0, 1, 0))[:29],
    "version 0": b"\x00" + encode(LaneMessage(0, 1, 0, (cancel(1, OFFLINE),)))[1:],
    "version 2": b"\x02" + encode(LaneMessage(0, 1, 0, (cancel(1, OFFLINE),)))[1:],
    "version 255": b"\xff" * 40,
    "text": b"__STREAM_END__",
}


@pytest.mark.parametrize("payload", STRANGE.values(), ids=STRANGE.keys())
def test_unknown_versions_and_garbage_are_ignored(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer, payload: bytes
) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    raw.send(pub(lane.peer, payload, reply=lane.own))
    assert lane.ask() == LaneMessage(PONG, 1, 0)
    assert ignored(worker) == 1
    assert_goes_on(worker, lane, n, stream)


def strangers(lane: LaneEnd) -> Iterator[str]:
    """Subjects under which another sender could write."""
    yield ""
    yield "_INBOX.stranger"
    yield lane.peer
    yield lane.own[:-3]  # a part of the offer
    yield lane.own[:-2] + "x"
    yield "client.offline"


@pytest.mark.parametrize("forged", [
    LaneMessage(0, 1, 1, (cancel(1, OFFLINE),)), LaneMessage(RESET, 0, 0), LaneMessage(PING | GAP, 0, 0),
    LaneMessage(NEW, 1, 0, (accept(1, 1),)), LaneMessage(0, 1, 2**64 - 1),
])  # fmt: skip
def test_messages_from_another_sender_are_ignored(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer, forged: LaneMessage
) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    announcements = raw.subscribe("client.offline")
    replies = list(strangers(lane))
    for reply in replies:
        lane.post(forged, reply=reply)
    assert lane.ask() == LaneMessage(PONG, 1, 0)
    assert ignored(worker) == len(replies)
    assert announcements.payloads() == []
    assert_goes_on(worker, lane, n, stream)


def test_unknown_lanes_are_reset(worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    prefix = lane.peer.rpartition(".")[0]
    reply, answers = raw.inbox()
    for unknown in [f"{prefix}.{'0' * 32}", f"{prefix}.x"]:
        raw.send(pub(unknown, encode(LaneMessage(0, 5, 3, (cancel(1, OFFLINE),))), reply=reply))
        answer = answers.next()
        assert (answer.reply.decode(), answer.payload) == (unknown, encode(LaneMessage(RESET, 0, 0)))
    assert ignored(worker) == 2
    # No answer to messages that are no lane messages, to RESET, and to a forbidden reply subject.
    everything = raw.subscribe(">")
    for payload in [b"", b"\x02" * HEADER, b"hello", encode(LaneMessage(RESET, 0, 0))]:
        raw.send(pub(f"{prefix}.x", payload, reply=reply))
    for forbidden in ["", "client.offline", "$SYS.REQ.SERVER.PING", "a.*", "a.>"]:
        raw.send(pub(f"{prefix}.x", encode(LaneMessage(0, 1, 0)), reply=forbidden))
    lane.ask()
    assert ignored(worker) == 11
    subjects = [everything.next().subject.decode() for _ in range(11)]
    assert subjects[:9] == [f"{prefix}.x"] * 9
    assert subjects[9:] == [lane.peer, gateway.offer]  # the PING and its PONG
    assert_goes_on(worker, lane, n, stream)


def test_random_bytes_on_every_subject_are_ignored(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer
) -> None:
    n, stream = begin(worker, gateway, lane, "alice")

    dice = random.Random(1)
    prefix = lane.peer.rpartition(".")[0]
    count = 0
    for _ in range(500):
        payload = dice.randbytes(dice.randrange(60))
        if dice.random() < 0.5:
            payload = b"\x01" + payload
        for subject in [lane.peer, f"{prefix}.x"]:
            raw.send(pub(subject, payload, reply=dice.choice(["", "_INBOX.stranger", lane.peer])))
            count += 1
    # From the other end itself, too: none of these looks like a lane message.
    for _ in range(500):
        payload = dice.choice([b"\x01" + dice.randbytes(dice.randrange(17)), b"\x02" + dice.randbytes(60)])
        raw.send(pub(lane.peer, payload, reply=lane.own))
        count += 1
    assert lane.ask() == LaneMessage(PONG, 1, 0)
    # Some answers about unknown lanes come back to the worker, and are ignored again.
    assert count <= ignored(worker) <= 2 * count
    assert worker.ask("stats")["connects"] == 1
    assert_goes_on(worker, lane, n, stream)


# Death ---------------------------------------------------------------------------------------------------------------


def test_forged_503_ends_nothing_while_the_peer_answers(
    worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer
) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    for i in range(20):
        raw.send(no_responders(lane.peer))
        # It sends PINGs, and nothing else until we answer.
        assert lane.receive().flags & PING
        worker.do(f"send {n} {i}")
        lane.send_control(PONG)
        assert lane.take() == data(stream, b"%d" % i)
    assert_goes_on(worker, lane, n, stream)


def test_true_503_ends_the_lane_after_the_grace(connect: Connect, server: Server, raw: RawPeer) -> None:
    worker = connect("", "peer_grace_ms=300")
    worker.do("serve llm.generate workers 0")
    dying = RawPeer(server.port)
    gateway = GatewayByHand(dying)
    lane = gateway.lane()
    n, _ = begin(worker, gateway, lane, "alice")
    other = GatewayByHand(raw)
    others = other.lane()
    bystander, stream = begin(worker, other, others, "bob")
    dying.close()
    since = time.monotonic()
    while worker.ask(f"send {n} x")["status"] == "OK":
        time.sleep(0.005)
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    assert 0.25 < time.monotonic() - since < 3
    assert_goes_on(worker, others, bystander, stream)
    assert worker.ask("stats")["lanes"] == 1


def test_without_grace_one_503_ends_the_lane(
    connect: Connect, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer
) -> None:
    """So use peer_grace_ms=0 only where nobody forges messages."""
    worker = connect("", "peer_grace_ms=0")
    worker.do("serve llm.generate workers 0")
    n, _ = begin(worker, gateway, lane, "alice")
    raw.send(no_responders(lane.peer))
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    lane.wait_for_end()


def test_503_to_other_subjects_is_ignored(worker: Shell, gateway: GatewayByHand, lane: LaneEnd, raw: RawPeer) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    prefix = lane.peer.rpartition(".")[0]
    raw.send(no_responders(f"{prefix}.x") + no_responders(f"{prefix}.{'0' * 32}"))
    lane.ask()
    assert ignored(worker) == 2
    assert_goes_on(worker, lane, n, stream)


def test_silent_gateway_is_gone_after_three_heartbeats(connect: Connect, gateway: GatewayByHand, lane: LaneEnd) -> None:
    worker = connect("", "heartbeat_ms=100")
    worker.do("serve llm.generate workers 0")
    n, _ = begin(worker, gateway, lane, "alice")
    lane.answers_pings = False
    # While it answers it is not gone, however long it sends nothing else.
    for _ in range(5):
        lane.wait_for(PING)
        lane.send_control(PONG)
    since = time.monotonic()
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    assert 0.2 < time.monotonic() - since < 2
    lane.wait_for_end()


def test_reset_from_the_gateway_ends_the_lane(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, _ = begin(worker, gateway, lane, "alice")
    lane.ask()  # It sends nothing more but heartbeats.
    lane.send_control(RESET)
    assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
    # Later messages meet an unknown lane.
    deadline = time.monotonic() + 3
    while worker.ask("stats")["lanes"]:
        assert time.monotonic() < deadline, "the lane did not end"
    lane.send_control()
    assert decode(gateway.behind.payload()) == LaneMessage(RESET, 0, 0)
    again = gateway.lane()
    n, stream = begin(worker, gateway, again, "alice")
    assert_goes_on(worker, again, n, stream)


def test_unacknowledged_accept_ends_on_level_0_too(connect: Connect, raw: RawPeer, server: Server) -> None:
    worker = connect("", "peer_grace_ms=100")
    worker.do("serve llm.generate workers 0")
    gateway = GatewayByHand(raw)
    answers = gateway.request("llm.generate", "alice", key=1, offer="1 _INBOX.nobody.here 0000000000000001 1000")
    assert worker.wait(event="STOPPED")["status"] == "PEER_GONE"
    assert answers.payload().startswith(b"__STREAM_ERROR__:")


def test_close_ends_the_streams(worker: Shell, gateway: GatewayByHand, lane: LaneEnd) -> None:
    n, stream = begin(worker, gateway, lane, "alice")
    worker.do(f"send {n} x")
    worker.send_line("close 900")
    assert lane.take() == data(stream, b"x")
    assert lane.take(ERROR).stream == stream
    lane.wait_for_end()
    worker.wait(event="reply", status="OK")
    assert worker.wait(event="STOPPED", n=n)["status"] == "CLOSED"
