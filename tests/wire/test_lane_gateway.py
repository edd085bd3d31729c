"""The library's gateway, and a worker that speaks lanes, driven by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from conftest import Connect, Shell
from harness import Server
from lane_codec import (
    CANCEL,
    CODE,
    CREDIT,
    GAP,
    NEW,
    OVERHEAD,
    PING,
    PONG,
    RESET,
    WINDOW,
    Frame,
    LaneMessage,
    accept,
    cancel,
    code,
    credit,
    data,
    decode,
    encode,
    encode_frame,
    end,
    enlarged,
    error,
    from_u64,
)
from lane_peer import OWN, OWN_GATEWAY, Asked, LaneEnd, WorkerByHand, no_responders
from raw import RawPeer, pub

UNKNOWN, OFFLINE, CANCELLED, TIMEOUT = 0, 2, 4, 12
"""Reasons in a CANCEL."""


@pytest.fixture
def gateway(connect: Connect) -> Shell:
    return connect()


@pytest.fixture
def worker(raw: RawPeer) -> WorkerByHand:
    return WorkerByHand(raw, "llm.generate")


def ask(gateway: Shell, worker: WorkerByHand, tag: int, client: str = "alice") -> Asked:
    gateway.do(f"request {tag} llm.generate {client} hello")
    return worker.next()


def begin(gateway: Shell, worker: WorkerByHand, tag: int, client: str = "alice") -> LaneEnd:
    """Starts a stream, as stream 1 of a new lane."""
    gateway.do(f"request {tag} llm.generate {client} hello")
    return worker.accept()


def go_on(gateway: Shell, worker: WorkerByHand, lane: LaneEnd, tag: int, stream: int) -> None:
    """Starts a further stream of the lane."""
    lane.send(accept(stream, ask(gateway, worker, tag).key))


def assert_goes_on(gateway: Shell, lane: LaneEnd, tag: int, stream: int = 1) -> None:
    """Checks that the stream carries a message, and ends it."""
    lane.send(data(stream, b"still here"), end(stream))
    assert gateway.wait(tag=tag)["data"] == "still here"
    assert gateway.wait(tag=tag)["event"] == "END"


def ignored(gateway: Shell) -> int:
    count: int = gateway.ask("stats")["messages_ignored"]
    return count


def test_requests_offer_one_lane_and_a_key_each(connect: Connect, worker: WorkerByHand) -> None:
    offers, keys = set(), set()
    for process in [connect(), connect()]:
        for tag in range(1, 11):
            asked = ask(process, worker, tag)
            assert OWN.fullmatch(asked.offer.encode())
            assert (asked.version, asked.window) == ("1", 1 << 18)
            offers.add(asked.offer)
            keys.add(asked.key)
    assert (len(offers), len(keys)) == (2, 20)


@pytest.mark.parametrize(("buffer", "window"), [("65536", 65536), ("4194304", 4194304), ("999999999", 4194304)])
def test_offer_states_the_stream_buffer(gateway: Shell, worker: WorkerByHand, buffer: str, window: int) -> None:
    gateway.do(f"option stream_buffer_bytes {buffer}")
    assert ask(gateway, worker, 1).window == window


def test_windows_shrink_when_they_add_up_to_the_receive_buffer(connect: Connect, worker: WorkerByHand) -> None:
    gateway = connect("", "receive_buffer_bytes=300000")
    assert [ask(gateway, worker, tag).window for tag in [1, 2]] == [262144, 8192]
    gateway.do("option stream_buffer_bytes 1000")
    assert ask(gateway, worker, 3).window == 1000
    # Freed streams take no share of it.
    gateway.do("drop 1")
    gateway.do("option stream_buffer_bytes 262144")
    assert ask(gateway, worker, 4).window == 262144


def test_frames_become_events(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    payloads = [b"one", b"", bytes(range(256)), b"__STREAM_END__", b"__STREAM_ERROR__:x", b"x" * 100_000]
    lane.send(*(data(1, payload) for payload in payloads[:3]))
    for payload in payloads[3:]:
        lane.send(data(1, payload))
    received = [gateway.wait(event="DATA", tag=1)["data"].encode("latin-1") for _ in payloads]
    assert received == payloads
    lane.send(end(1))
    gateway.wait(event="END", tag=1)
    answer = lane.ask()
    assert (answer.flags, answer.ack) == (PONG, 6)
    assert gateway.ask("is_online alice")["text"] == "no"
    stats = gateway.ask("stats")
    assert (stats["lanes"], stats["streams"], stats["messages_ignored"], stats["offline_out"]) == (1, 0, 0, 0)


def test_lane_subject_is_the_offer_with_a_number(gateway: Shell, worker: WorkerByHand) -> None:
    names = set()
    for tag in range(1, 4):
        lane = begin(gateway, worker, tag)
        message = lane.inbox.next()
        assert OWN_GATEWAY.fullmatch(message.reply)
        assert message.reply.decode().startswith(lane.peer + "-")
        names.add(message.reply)
    assert len(names) == 3
    assert gateway.ask("stats")["lanes"] == 3


def test_messages_are_acknowledged_without_other_traffic(gateway: Shell, worker: WorkerByHand) -> None:
    since = time.monotonic()
    lane = begin(gateway, worker, 1)
    assert lane.receive() == LaneMessage(0, 0, 1)
    assert time.monotonic() - since < 1
    # Larger amounts are acknowledged, too, in between or at their end.
    for _ in range(5):
        lane.send(data(1, b"x" * 65536))
    acks = [lane.receive().ack]
    while acks[-1] < 6:
        acks.append(lane.receive().ack)
    assert acks == sorted(acks)
    assert acks[-1] == 6


def test_streams_of_a_lane_stay_separate(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    for tag in range(2, 6):
        go_on(gateway, worker, lane, tag, tag)
    for i in range(20):
        lane.send(*(data(tag, b"%d %d" % (tag, i)) for tag in range(1, 6)))
    for tag in range(1, 6):
        received = [gateway.wait(event="DATA", tag=tag)["data"] for _ in range(20)]
        assert received == [f"{tag} {i}" for i in range(20)]
    assert gateway.ask("stats")["lanes"] == 1


STATUSES = {"server busy": "BUSY", "the client is offline": "OFFLINE"}


@pytest.mark.parametrize("text", ["no such model", "", *STATUSES, "__STREAM_END__"])
def test_error_frame_ends_the_stream(gateway: Shell, worker: WorkerByHand, text: str) -> None:
    lane = begin(gateway, worker, 1)
    lane.send(data(1, b"one"), error(1, text.encode()), data(1, b"late"), end(1))
    assert gateway.wait(event="DATA")["data"] == "one"
    failed = gateway.wait(event="ERROR")
    assert (failed["status"], failed["data"], failed.get("code")) == (STATUSES.get(text, "REMOTE"), text, None)
    lane.ask()
    assert not [event for event in gateway.events if event["event"] in ("DATA", "END")]


@pytest.mark.parametrize("text", ["no such model", *STATUSES])
@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"\x2a\0\0\0", 42), (b"\xff\xff\xff\x7f", 2**31 - 1), (b"\x2a\0\0\0more", 42), (b"", None), (b"\x2a\0\0", None),
     (bytes(4), None), (b"\0\0\0\x80", None), (b"\xff" * 4, None)],
)  # fmt: skip
def test_code_frame_belongs_to_the_error(
    gateway: Shell, worker: WorkerByHand, text: str, body: bytes, expected: int | None
) -> None:
    lane = begin(gateway, worker, 1)
    lane.send(data(1, b"one"), code(1, 9), Frame(CODE, 1, body), error(1, text.encode()))
    failed = gateway.wait(event="ERROR")
    assert (failed["status"], failed["data"], failed.get("code")) == (STATUSES.get(text, "REMOTE"), text, expected)
    assert ignored(gateway) == 0


def test_code_may_come_in_the_message_before_its_error(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    first = lane.send(code(1, 404), code(8, 1))
    lane.sent += 1
    second = LaneMessage(0, lane.sent, lane.received, (error(1, b"why"),))
    for message in [first, second, first, second]:
        lane.post(message)
    failed = gateway.wait(event="ERROR")
    assert (failed["data"], failed["code"]) == ("why", 404)


def test_code_that_an_error_overtakes_is_kept(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    first = LaneMessage(0, lane.sent + 1, lane.received, (code(1, 404),))
    second = LaneMessage(0, lane.sent + 2, lane.received, (error(1, b"why"),))
    lane.sent += 2
    for message in [second, first, second]:
        lane.post(message)
    failed = gateway.wait(event="ERROR")
    assert (failed["data"], failed["code"]) == ("why", 404)


def test_code_without_an_error_is_ignored(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    go_on(gateway, worker, lane, 2, 2)
    lane.send(*[code(1, number) for number in range(1000)], data(1, b"x"), end(1), code(1, 5))
    assert gateway.wait(event="DATA", tag=1)["data"] == "x"
    assert "code" not in gateway.wait(event="END", tag=1)
    assert_goes_on(gateway, lane, 2, 2)
    assert ignored(gateway) == 0


@pytest.mark.parametrize(
    ("command", "status", "reason"),
    [("cancel 1", "CANCELLED", CANCELLED), ("drop 1", None, CANCELLED), ("offline alice", "OFFLINE", OFFLINE)],
)
def test_offline_client_sends_cancel(
    gateway: Shell, worker: WorkerByHand, raw: RawPeer, command: str, status: str | None, reason: int
) -> None:
    announcements = raw.subscribe("client.offline")
    lane = begin(gateway, worker, 1)
    go_on(gateway, worker, lane, 2, 2)
    lane.send(data(1, b"x"))
    gateway.wait(event="DATA")
    gateway.do(command)
    frames = {lane.take(CANCEL) for _ in range(2 if reason == OFFLINE else 1)}
    assert frames == ({cancel(1, reason), cancel(2, reason)} if reason == OFFLINE else {cancel(1, reason)})
    if status:
        assert gateway.wait(event="ERROR", tag=1)["status"] == status
    # What the worker sent before it received CANCEL is ignored.
    lane.send(data(1, b"late"), end(1))
    lane.ask()
    assert gateway.take(event="DATA") is None
    assert gateway.take(event="END") is None
    if reason == CANCELLED:
        # The client's other stream is unaffected.
        assert_goes_on(gateway, lane, 2, 2)
        gateway.do("offline after")
        assert announcements.payload() == b"after"
    else:
        assert announcements.payload() == b"alice"


def test_timeout_sends_cancel(gateway: Shell, worker: WorkerByHand) -> None:
    gateway.do("option timeout_ms 50")
    lane = begin(gateway, worker, 1)
    assert lane.take() == cancel(1, TIMEOUT)
    assert gateway.wait(event="ERROR")["status"] == "TIMEOUT"


def test_announce_streams_skips_lane_streams(connect: Connect, worker: WorkerByHand, raw: RawPeer) -> None:
    announcements = raw.subscribe("client.offline")
    gateway = connect("", "announce=streams")
    lane = begin(gateway, worker, 1, "on_a_lane")
    lane.send(data(1, b"x"))
    gateway.wait(event="DATA")
    gateway.do("offline on_a_lane")
    assert lane.take() == cancel(1, OFFLINE)
    # Not accepted yet: its worker is unknown.
    ask(gateway, worker, 2, "asked")
    gateway.do("offline asked")
    assert announcements.payload() == b"asked"


def test_peer_announcement_ends_the_stream(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    gateway.do("listen")
    lane = begin(gateway, worker, 1)
    lane.ask()
    raw.send(pub("client.offline", b"alice"))
    assert gateway.wait(event="ERROR")["status"] == "OFFLINE"
    assert lane.take() == cancel(1, OFFLINE)


# ACCEPT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cancel 1", "drop 1", "offline alice"])
def test_cancel_before_accept_is_sent_after_it(gateway: Shell, worker: WorkerByHand, command: str) -> None:
    asked = ask(gateway, worker, 1)
    gateway.do(command)
    lane = worker.lane(asked)
    lane.send(accept(1, asked.key), data(1, b"x"), end(1))
    assert lane.take() == cancel(1, UNKNOWN)
    assert gateway.take(event="DATA") is None


def test_unknown_key_is_cancelled(gateway: Shell, worker: WorkerByHand) -> None:
    asked = ask(gateway, worker, 1)
    lane = worker.lane(asked)
    lane.send(accept(1, asked.key ^ 1), data(1, b"forged"), error(1, b"forged"))
    assert lane.take() == cancel(1, UNKNOWN)
    # The worker that did receive the request is unaffected.
    lane.send(accept(2, asked.key))
    assert_goes_on(gateway, lane, 1, 2)


def test_second_accept_is_cancelled(gateway: Shell, worker: WorkerByHand) -> None:
    asked = ask(gateway, worker, 1)
    first, second = worker.lane(asked), worker.lane(asked)
    first.send(accept(1, asked.key))
    first.ask()
    second.send(accept(1, asked.key), data(1, b"second"), end(1))
    assert second.take() == cancel(1, UNKNOWN)
    first.send(accept(2, asked.key))
    assert first.take() == cancel(2, UNKNOWN)
    assert_goes_on(gateway, first, 1)


def test_accept_after_a_level_0_answer_still_counts(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    """The answer may come from anyone who can read the request."""
    asked = ask(gateway, worker, 1)
    raw.send(pub(asked.reply, b"one"))
    gateway.wait(event="DATA")
    lane = worker.lane(asked)
    lane.send(accept(1, asked.key))
    lane.ask()
    raw.send(pub(asked.reply, b"late") + pub(asked.reply, b"__STREAM_END__"))
    assert_goes_on(gateway, lane, 1)
    assert ignored(gateway) == 2


STORED = b'{"stream":"AUDIT","seq":1}'


def test_audit_ack_is_ignored(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    """A JetStream stream that captures the requests acknowledges each at its reply subject."""
    asked = ask(gateway, worker, 1)
    raw.send(pub(asked.reply, STORED))
    lane = worker.lane(asked)
    lane.send(accept(1, asked.key))
    lane.ask()
    assert_goes_on(gateway, lane, 1)
    assert ignored(gateway) == 1


def test_one_audit_ack_is_ignored_on_level_0(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    asked = ask(gateway, worker, 1)
    raw.send(pub(asked.reply, STORED) + pub(asked.reply, b"one") + pub(asked.reply, STORED))
    assert gateway.wait(event="DATA")["data"] == "one"
    assert gateway.wait(event="DATA")["data"] == STORED.decode()
    assert ignored(gateway) == 1
    raw.send(pub(asked.reply, b"__STREAM_END__"))
    gateway.wait(event="END")


def test_early_end_is_announced_after_a_level_0_answer(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    announcements = raw.subscribe("client.offline")
    for tag, answer in enumerate([b"__STREAM_END__", b"__STREAM_ERROR__:no", STORED, b"one"]):
        asked = ask(gateway, worker, tag, f"client-{tag}")
        gateway.do(f"drop {tag}")
        raw.send(pub(asked.reply, answer))
    # Only the last one is a message of a running worker. The effects of the others would come before it.
    assert announcements.payload() == b"client-3"


def test_level_0_messages_after_accept_are_ignored(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    asked = ask(gateway, worker, 1)
    lane = worker.lane(asked)
    lane.send(accept(1, asked.key))
    lane.ask()
    raw.send(pub(asked.reply, b"two") + pub(asked.reply, b"__STREAM_END__") + no_responders(asked.reply))
    assert_goes_on(gateway, lane, 1)
    assert ignored(gateway) == 3


def test_workers_without_lanes_answer_on_level_0(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    # Both at once, from one gateway.
    lane = begin(gateway, worker, 1)
    asked = ask(gateway, worker, 2)
    raw.send(pub(asked.reply, b"plain") + pub(asked.reply, b"__STREAM_END__"))
    assert gateway.wait(tag=2)["data"] == "plain"
    gateway.wait(event="END", tag=2)
    assert_goes_on(gateway, lane, 1)


def test_gateway_without_lanes_offers_none(connect: Connect, worker: WorkerByHand) -> None:
    gateway = connect("", "lanes=false")
    gateway.do("request 1 llm.generate alice hello")
    assert b"Presence-Lane" not in worker.requests.next().header


# The window ----------------------------------------------------------------------------------------------------------


def test_credit_is_sent_after_a_quarter_of_the_window(gateway: Shell, worker: WorkerByHand) -> None:
    gateway.do("option stream_buffer_bytes 1000")
    lane = begin(gateway, worker, 1)
    total = 0
    for i in range(100):
        lane.send(data(1, b"x" * 36))
        total += 36 + OVERHEAD
        gateway.wait(event="DATA")
        if (i + 1) % 3 == 0:
            frame = lane.take(CREDIT)
            assert (frame.stream, from_u64(frame.body)) == (1, 300)
    lane.ask()
    assert not lane.frames


def read_at_once(gateway: Shell, lane: LaneEnd, count: int, size: int) -> None:
    """Sends messages together, and waits until the reader has taken all of them."""
    lane.send(*(data(1, b"x" * size) for _ in range(count)))
    for _ in range(count):
        gateway.wait(event="DATA")


def test_window_grows_for_a_fast_reader(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    # Each time half of the window, which the reader takes at once. On a busy machine some of that is slow.
    for _ in range(1000):
        read_at_once(gateway, lane, 128, 960)
        lane.ask()
        frames = list(lane.frames)
        lane.frames.clear()
        assert all(frame.kind in (CREDIT, WINDOW) for frame in frames)
        grown = [frame for frame in frames if frame.kind == WINDOW]
        if grown:
            break
    assert grown == [enlarged(1, 1 << 19)]
    # From now on the worker may be so far ahead.
    lane.send(*(data(1, b"x" * 960) for _ in range(400)))
    lane.send(end(1))
    gateway.wait(event="END", tag=1)


def test_windows_grow_up_to_half_of_the_receive_buffer(connect: Connect, worker: WorkerByHand) -> None:
    gateway = connect("", "receive_buffer_bytes=1000000")
    lane = begin(gateway, worker, 1)
    for _ in range(20):
        read_at_once(gateway, lane, 128, 960)
    lane.ask()
    assert {frame.kind for frame in lane.frames} == {CREDIT}


def test_window_that_was_set_does_not_grow(gateway: Shell, worker: WorkerByHand) -> None:
    gateway.do("option stream_buffer_bytes 1000")
    lane = begin(gateway, worker, 1)
    for _ in range(100):
        read_at_once(gateway, lane, 7, 36)
    lane.ask()
    assert {frame.kind for frame in lane.frames} == {CREDIT}


def test_manual_credit_follows_consumed(gateway: Shell, worker: WorkerByHand) -> None:
    gateway.do("option stream_buffer_bytes 1000")
    gateway.do("option manual_credit true")
    lane = begin(gateway, worker, 1)
    lane.send(*(data(1, b"x" * 36) for _ in range(10)))
    for _ in range(10):
        gateway.wait(event="DATA")
    # The messages have left the queue, but were not consumed.
    lane.ask()
    assert not lane.frames
    # Credit is given for their bytes, and in proportion for the 64 extra bytes of each.
    gateway.do("consumed 1 72")
    lane.ask()
    assert not lane.frames  # 200 of 1000 is not more than a quarter.
    gateway.do("consumed 1 36")
    assert lane.take() == credit(1, 300)
    # More than was outstanding counts as all.
    gateway.do("consumed 1 1000000000")
    assert lane.take() == credit(1, 700)
    lane.send(*(data(1, b"") for _ in range(4)))
    for _ in range(4):
        gateway.wait(event="DATA")
    gateway.do("consumed 1 0")
    assert lane.take() == credit(1, 4 * OVERHEAD)


@pytest.mark.parametrize(
    "sizes",
    [
        [36] * 11,  # 1100 of 1000
        [5000, 0],
        [437, 500],  # 501: more than half is taken
    ],
)
def test_overrunning_the_window_cancels_the_stream(gateway: Shell, worker: WorkerByHand, sizes: list[int]) -> None:
    gateway.do("option manual_credit true")
    go = begin(gateway, worker, 2)  # with a window of 256 KiB
    gateway.do("option stream_buffer_bytes 1000")
    go_on(gateway, worker, go, 1, 2)
    # In one message: the reader cannot have consumed anything in between.
    go.send(*(data(2, bytes(size)) for size in sizes))
    failed = gateway.wait(event="ERROR", tag=1)
    assert failed["status"] == "FULL"
    assert "window" in failed["data"]
    assert go.take() == cancel(2, UNKNOWN)
    # Further messages change nothing, and others are unaffected.
    go.send(*(data(2, bytes(size)) for size in sizes), end(2))
    assert_goes_on(gateway, go, 2)


@pytest.mark.parametrize("sizes", [[36] * 10, [5000], [436, 5000]])
def test_filling_the_window_is_allowed(gateway: Shell, worker: WorkerByHand, sizes: list[int]) -> None:
    gateway.do("option manual_credit true")
    gateway.do("option stream_buffer_bytes 1000")
    lane = begin(gateway, worker, 1)
    lane.send(*(data(1, bytes(size)) for size in sizes))
    for size in sizes:
        assert len(gateway.wait(tag=1, event="DATA")["data"]) == size
    lane.send(end(1))
    gateway.wait(event="END", tag=1)


# Numbers, acknowledgements, gaps -------------------------------------------------------------------------------------


def test_gap_causes_retransmission(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    go_on(gateway, worker, lane, 2, 2)
    lane.ask()
    gateway.do("cancel 1")
    assert lane.receive_news().frames == (cancel(1, CANCELLED),)
    gateway.do("cancel 2")
    assert lane.receive_news().frames == (cancel(2, CANCELLED),)
    lane.send_control(GAP)
    again = [lane.receive_news() for _ in range(2)]
    assert [(message.sequence, message.frames) for message in again] == [
        (1, (cancel(1, CANCELLED),)), (2, (cancel(2, CANCELLED),))
    ]  # fmt: skip


def test_unacknowledged_frames_cause_a_ping(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    lane.ask()
    lane.acknowledges = lane.answers_pings = False
    gateway.do("cancel 1")
    assert lane.receive_news().frames == (cancel(1, CANCELLED),)
    assert lane.receive_news() == LaneMessage(PING, 1, 1)
    lane.send_control(PONG)
    assert lane.receive_news().frames == (cancel(1, CANCELLED),)


def test_duplicates_are_dropped(gateway: Shell, worker: WorkerByHand) -> None:
    asked = ask(gateway, worker, 1)
    lane = worker.lane(asked)
    first = lane.send(accept(1, asked.key), data(1, b"a"))
    second = lane.send(data(1, b"b"))
    for message in [first, second, second, first, first]:
        lane.post(message)
    lane.send(end(1))
    assert [gateway.wait(tag=1)["data"] for _ in range(3)] == ["a", "b", ""]
    assert lane.ask().ack == 3
    assert gateway.take(event="DATA") is None


def test_streams_survive_every_order_of_arrival(gateway: Shell, worker: WorkerByHand) -> None:
    dice = random.Random(2)
    for tag in range(1, 31):
        asked = ask(gateway, worker, tag)
        lane = worker.lane(asked)
        messages = [LaneMessage(0, 1, 0, (accept(1, asked.key),))]
        messages += [LaneMessage(0, i, 0, (data(1, b"%d" % i), data(1, b"%d'" % i))) for i in range(2, 12)]
        messages += [LaneMessage(0, 12, 0, (end(1),))]
        # Some are lost each time, until all have arrived.
        lane.sent = 12
        ack = 0
        while ack < 12:
            chosen = [message for message in messages if dice.random() < 0.7]
            dice.shuffle(chosen)
            for message in chosen:
                lane.post(message)
            ack = lane.ask().ack
        received = [gateway.wait(tag=tag)["data"] for _ in range(21)]
        assert received == [text for i in range(2, 12) for text in (str(i), f"{i}'")] + [""]


def test_gap_is_reported_once(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    lane.ask()
    lane.sent = 2  # Message number 2 was lost.
    for i in range(3, 10):
        lane.send(data(1, b"%d" % i))
    message = lane.receive_news()
    assert (message.flags, message.ack) == (GAP, 1)
    assert lane.ask() == LaneMessage(PONG, 0, 1)
    lane.sent = 1
    for i in range(2, 10):
        lane.send(data(1, b"%d" % i))
    assert [gateway.wait(event="DATA")["data"] for _ in range(2, 10)] == [str(i) for i in range(2, 10)]


def test_lost_first_message_of_a_lane_is_requested(gateway: Shell, worker: WorkerByHand) -> None:
    asked = ask(gateway, worker, 1)
    lane = worker.lane(asked)
    lane.sent = 1
    lane.send(data(1, b"x"), end(1))
    # A lane begins with number 1: until that arrives there is no such lane, and nothing is lost.
    message = lane.inbox.next()
    assert (message.reply.decode(), decode(message.payload)) == (asked.offer, LaneMessage(GAP, 0, 0))
    assert gateway.ask("stats")["lanes"] == 0
    lane.sent = 0
    lane.send(accept(1, asked.key))
    lane.send(data(1, b"x"), end(1))
    assert [gateway.wait(tag=1)["data"] for _ in range(2)] == ["x", ""]


# New and invalid content ----------------------------------------------------------------------------------------------


def test_unknown_frame_kinds_are_skipped(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    lane.send(Frame(9, 1, b"x" * 300), Frame(0, 1), data(1, b"x"), Frame(255, 2**32 - 1, b"y"), data(1, b"z"))
    assert [gateway.wait(event="DATA")["data"] for _ in range(2)] == ["x", "z"]
    assert_goes_on(gateway, lane, 1)
    assert ignored(gateway) == 0


def test_gateway_frames_from_a_worker_are_skipped(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    lane.send(cancel(1, CANCELLED), Frame(CREDIT, 1, bytes(8)), Frame(CREDIT, 1))
    lane.ask()
    assert_goes_on(gateway, lane, 1)


def test_frames_of_unaccepted_streams_are_skipped(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    for other in [0, 2, 1000, 2**32 - 1]:
        lane.send(data(other, b"x"), data(other, b"y"), end(other), error(other, b"x"))
    lane.ask()
    assert_goes_on(gateway, lane, 1)
    assert gateway.ask("stats")["streams"] == 0


MALFORMED = {
    "kind alone": b"\x02",
    "body cut off": b"\x02\x01\x05abcd",
    "length of 4 GiB": b"\x02\x01\xff\xff\xff\xff\x0f",
    "stream number above 32 bits": b"\x02\x80\x80\x80\x80\x10\x01x",
    "number of six bytes": b"\x02\x80\x80\x80\x80\x80\x00\x01x",
    "key too short": b"\x01\x02\x07" + bytes(7),
    "key missing": b"\x01\x02\x00",
    "a stream number that was used before": encode_frame(accept(1, 1)),
    "after good frames": b"\x02\x01\x01a\x02\x01\x01b\x02",
}


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_frames_end_only_their_lane(
    gateway: Shell, worker: WorkerByHand, raw: RawPeer, frames: bytes
) -> None:
    bystander = begin(gateway, worker, 1)
    lane = begin(gateway, worker, 2)
    payload = encode(LaneMessage(0, 2, 0)) + frames
    raw.send(pub(lane.peer, payload, reply=lane.own))
    assert gateway.wait(event="ERROR", tag=2)["status"] == "PEER_GONE"
    lane.wait_for_end()
    assert ignored(gateway) == 1
    assert_goes_on(gateway, bystander, 1)


def test_ack_of_unsent_messages_ends_the_lane(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    lane = begin(gateway, worker, 1)
    raw.send(pub(lane.peer, encode(LaneMessage(0, 1, 1)), reply=lane.own))
    assert gateway.wait(event="ERROR", tag=1)["status"] == "PEER_GONE"
    lane.wait_for_end()
    assert ignored(gateway) == 1


STRANGE = {
    "nothing": b"",
    "a header cut off": encode(LaneMessage(0, 2, 0))[:29],
    "version 0": b"\x00" + encode(LaneMessage(0, 2, 0, (end(1),)))[1:],
    "version 2": b"\x02" + encode(LaneMessage(0, 2, 0, (end(1),)))[1:],
    "text": b"__STREAM_END__",
}


@pytest.mark.parametrize("payload", STRANGE.values(), ids=STRANGE.keys())
def test_unknown_versions_and_garbage_are_ignored(
    gateway: Shell, worker: WorkerByHand, raw: RawPeer, payload: bytes
) -> None:
    lane = begin(gateway, worker, 1)
    raw.send(pub(lane.peer, payload, reply=lane.own))
    assert lane.ask().ack == 1
    assert ignored(gateway) == 1
    assert_goes_on(gateway, lane, 1)


def strangers(lane: LaneEnd) -> Iterator[str]:
    """Subjects under which another sender could write."""
    yield ""
    yield "_INBOX.stranger"
    yield lane.peer
    yield lane.own + "x"
    yield lane.own[:-1]
    yield "client.offline"
    yield "$SYS.REQ.SERVER.PING"
    yield "a.*"


@pytest.mark.parametrize("forged", [
    LaneMessage(0, 2, 0, (end(1),)), LaneMessage(RESET, 0, 0), LaneMessage(PING | GAP, 0, 0),
    LaneMessage(0, 2, 2**64 - 1),
])  # fmt: skip
def test_messages_from_another_sender_are_ignored(
    gateway: Shell, worker: WorkerByHand, raw: RawPeer, forged: LaneMessage
) -> None:
    lane = begin(gateway, worker, 1)
    own = lane.inbox.next().reply.decode()
    everything = raw.subscribe("client.offline")
    count = 0
    for reply in strangers(lane):
        for subject in [lane.peer, own]:
            raw.send(pub(subject, encode(forged), reply=reply))
            count += 1
    lane.ask()
    # Answers to the message that has the gateway's own subject come back to itself.
    assert count <= ignored(gateway) <= count + 4
    assert [payload for payload in everything.payloads() if payload != encode(forged)] == []
    assert_goes_on(gateway, lane, 1)


def test_lane_of_a_stranger_has_no_effect(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    lane = begin(gateway, worker, 1)
    asked = ask(gateway, worker, 2)
    stranger = worker.lane(asked)
    stranger.send(accept(1, 0), data(1, b"forged"), end(1), error(2, b"forged"))
    assert stranger.take() == cancel(1, UNKNOWN)
    assert_goes_on(gateway, lane, 1)
    lane.send(accept(2, asked.key))
    assert_goes_on(gateway, lane, 2, 2)


def test_lanes_of_absent_strangers_end(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    lane = begin(gateway, worker, 1)
    first = encode(LaneMessage(NEW, 1, 0, (accept(1, 0), data(1, b"forged"))))
    raw.send(b"".join(pub(lane.peer, first, reply=f"_INBOX.nobody.{i}") for i in range(5000)))
    lane.ask()
    deadline = time.monotonic() + 10
    while gateway.ask("stats")["lanes"] > 1:
        lane.ask()
        assert time.monotonic() < deadline, "the lanes did not end"
    assert_goes_on(gateway, lane, 1)


def test_lanes_are_limited_to_8192(connect: Connect, worker: WorkerByHand, raw: RawPeer) -> None:
    """For any number of strangers who start one, and who are all there."""
    # The heartbeat is so long that none is gone meanwhile.
    gateway = connect("", "heartbeat_ms=60000")
    lane = begin(gateway, worker, 1)
    raw.subscribe("_INBOX.stranger.*")
    first = encode(LaneMessage(NEW, 1, 0, (accept(1, 0), data(1, b"forged"))))
    for start in range(0, 9000, 1000):
        raw.send(b"".join(pub(lane.peer, first, reply=f"_INBOX.stranger.{start + i}") for i in range(1000)))
        lane.ask()
    assert gateway.ask("stats")["lanes"] == 8192
    assert ignored(gateway) == 1 + 9000 - 8192
    assert_goes_on(gateway, lane, 1)


def test_forbidden_lane_subjects_are_refused(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    asked = ask(gateway, worker, 1)
    everything = raw.subscribe(">")
    forbidden = ["client.offline", "$SYS.REQ.SERVER.PING", "$JS.API.INFO", "a.*", "a.>", ""]
    for own in forbidden:
        raw.send(pub(asked.offer, encode(LaneMessage(NEW, 1, 0, (accept(1, asked.key),))), reply=own))
        raw.send(pub(asked.offer, encode(LaneMessage(NEW, 2, 0, (end(1),))), reply=own))
        raw.send(pub(asked.offer, encode(LaneMessage(0, 1, 0)), reply=own))
    lane = worker.lane(asked)
    lane.send(accept(1, asked.key))
    lane.ask()
    assert ignored(gateway) == 3 * len(forbidden)
    assert gateway.ask("stats")["lanes"] == 1
    subjects = {everything.next().subject.decode() for _ in range(3 * len(forbidden) + 3)}
    assert subjects == {asked.offer, lane.own}
    assert_goes_on(gateway, lane, 1)


def test_unknown_lanes_are_reset(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    asked = ask(gateway, worker, 1)
    lane = worker.lane(asked)
    lane.acked = 1  # So NEW is no longer set.
    lane.send_control()
    assert lane.receive() == LaneMessage(RESET, 0, 0)
    # RESET is not answered, nor is a message that is no lane message or has a forbidden reply subject.
    lane.send_control(RESET)
    raw.send(pub(asked.offer, b"nonsense", reply=lane.own))
    raw.send(pub(asked.offer, encode(LaneMessage(0, 1, 0)), reply=""))
    lane.acked = 0
    lane.send(accept(1, asked.key))
    lane.ask()
    assert ignored(gateway) == 4
    assert_goes_on(gateway, lane, 1)


def test_random_bytes_on_every_subject_are_ignored(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    lane = begin(gateway, worker, 1)
    own = lane.inbox.next().reply.decode()
    dice = random.Random(1)
    prefix = lane.peer.rpartition(".")[0]
    for _ in range(500):
        payload = dice.randbytes(dice.randrange(60))
        if dice.random() < 0.5:
            payload = b"\x01" + payload
        for subject in [lane.peer, own, f"{prefix}.x", f"{lane.peer}-x", f"{lane.peer}-0"]:
            raw.send(pub(subject, payload, reply=dice.choice(["", "_INBOX.stranger", lane.peer, own])))
    for _ in range(500):
        payload = dice.choice([b"\x01" + dice.randbytes(dice.randrange(17)), b"\x02" + dice.randbytes(60)])
        raw.send(pub(lane.peer, payload, reply=lane.own))
    lane.ask()
    assert ignored(gateway) >= 3000 - 500  # By chance, some of them are a new lane's first message.
    assert gateway.ask("stats")["connects"] == 1
    assert_goes_on(gateway, lane, 1)


def test_random_frames_end_only_their_lane(gateway: Shell, worker: WorkerByHand) -> None:
    """Well-formed messages of a broken worker end at most its own lane."""
    bystander = begin(gateway, worker, 1)
    dice = random.Random(3)
    for tag in range(2, 52):
        lane = begin(gateway, worker, tag)
        for _ in range(20):
            frames = []
            for _ in range(dice.randrange(5)):
                stream, size = dice.choice([0, 1, 2, 2**32 - 1]), dice.choice([0, 1, 8, 99])
                frames.append(Frame(dice.randrange(9), stream, dice.randbytes(size)))
            flags = dice.choice([0, PING, PONG, GAP, PING | GAP, NEW, 32, 64, 128])
            sequence, ack = lane.sent + dice.choice([0, 1, 1, 1, 2]), dice.choice([0, 0, 1, 2])
            lane.post(LaneMessage(flags, sequence, ack, tuple(frames)))
            lane.sent += 1
    assert_goes_on(gateway, bystander, 1)
    assert gateway.ask("stats")["connects"] == 1


# Death ---------------------------------------------------------------------------------------------------------------


def test_forged_503_ends_nothing_while_the_peer_answers(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    lane = begin(gateway, worker, 1)
    own = lane.inbox.next().reply.decode()
    for i in range(20):
        raw.send(no_responders(own))
        assert lane.receive_news().flags & PING
        lane.send_control(PONG)
        lane.send(data(1, b"%d" % i))
        assert gateway.wait(event="DATA")["data"] == str(i)
        lane.ask()
    assert_goes_on(gateway, lane, 1)


def test_503_to_the_offer_is_ignored(gateway: Shell, worker: WorkerByHand, raw: RawPeer) -> None:
    """Other workers know the offer: the lanes' own subjects have numbers, and 503s come to those."""
    lane = begin(gateway, worker, 1)
    raw.send(no_responders(lane.peer) + no_responders(f"{lane.peer}-0"))
    lane.ask()
    assert ignored(gateway) == 2
    assert_goes_on(gateway, lane, 1)


def test_without_grace_one_503_ends_the_lane(connect: Connect, worker: WorkerByHand, raw: RawPeer) -> None:
    """So use peer_grace_ms=0 only where nobody forges messages."""
    gateway = connect("", "peer_grace_ms=0")
    lane = begin(gateway, worker, 1)
    raw.send(no_responders(lane.inbox.next().reply.decode()))
    assert gateway.wait(event="ERROR")["status"] == "PEER_GONE"


def test_true_503_ends_the_lane_after_the_grace(connect: Connect, server: Server, worker: WorkerByHand) -> None:
    gateway = connect("", "peer_grace_ms=300", "heartbeat_ms=100")
    bystander = begin(gateway, worker, 1)
    dying = RawPeer(server.port)
    # One request each, in turn: the other lane must be gone for that.
    lane = WorkerByHand(dying, "other.subject")
    gateway.do("request 2 other.subject bob hello")
    lane.accept().ask()
    dying.close()
    since = time.monotonic()
    deadline = since + 5
    while (failed := gateway.take(event="ERROR", tag=2)) is None:
        assert time.monotonic() < deadline
        bystander.ask()
    assert failed["status"] == "PEER_GONE"
    assert time.monotonic() - since > 0.25
    assert_goes_on(gateway, bystander, 1)


def test_silent_worker_is_gone_after_three_heartbeats(connect: Connect, worker: WorkerByHand) -> None:
    gateway = connect("", "heartbeat_ms=100")
    lane = begin(gateway, worker, 1)
    lane.answers_pings = False
    for _ in range(5):
        lane.wait_for(PING)
        lane.send_control(PONG)
    since = time.monotonic()
    assert gateway.wait(event="ERROR", tag=1)["status"] == "PEER_GONE"
    assert 0.2 < time.monotonic() - since < 2
    lane.wait_for_end()


def test_reset_from_the_worker_ends_the_lane(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    lane.ask()
    lane.send_control(RESET)
    assert gateway.wait(event="ERROR", tag=1)["status"] == "PEER_GONE"
    deadline = time.monotonic() + 3
    while gateway.ask("stats")["lanes"]:
        assert time.monotonic() < deadline, "the lane did not end"
    assert_goes_on(gateway, begin(gateway, worker, 2), 2)


def test_close_sends_cancel(gateway: Shell, worker: WorkerByHand) -> None:
    lane = begin(gateway, worker, 1)
    lane.ask()
    gateway.send_line("close 900")
    assert lane.take(CANCEL).stream == 1
    lane.wait_for_end()
    gateway.wait(event="reply", status="OK")
    assert gateway.wait(event="ERROR")["status"] == "CLOSED"
