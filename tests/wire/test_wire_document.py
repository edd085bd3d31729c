"""docs/wire.md is true: its examples are what the library sends, and what it understands."""

from __future__ import annotations

import re

import lane_codec
import pytest
from conftest import Connect, Shell
from harness import ROOT
from lane_codec import LaneMessage, accept, credit, data, decode, encode
from lane_peer import GatewayByHand, LaneEnd, WorkerByHand
from raw import RawPeer, pub

DOCUMENT = (ROOT / "docs/wire.md").read_text()
KEY = 0x0123456789ABCDEF


def from_hex(text: str) -> bytes:
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))


def plain(payload: bytes) -> LaneMessage:
    """A message without the header's fields about PINGs and servers."""
    return decode(payload).plain()


EXAMPLES = {name: from_hex(text) for name, text in re.findall(r"```hex (\w+)\n(.*?)```", DOCUMENT, re.DOTALL)}


def next_of(lane: LaneEnd, example: str) -> LaneMessage:
    """The lane's next message as it arrived, but no acknowledgement or PING without frames: they come at any time."""
    wanted = decode(EXAMPLES[example])
    while True:
        message = lane.receive()
        lane.apply(message)
        if message.frames or (message.flags & ~lane_codec.NEW) not in (0, lane_codec.PING) or message == wanted.plain():
            if wanted.ping:
                assert lane.asked == wanted.ping
            assert lane.answered == wanted.pong
            return message


def test_document_has_all_examples() -> None:
    messages = {name: decode(payload) for name, payload in EXAMPLES.items()}
    assert {name: encode(message) for name, message in messages.items()} == EXAMPLES
    assert {frame.kind for message in messages.values() for frame in message.frames} == set(range(1, 8))
    flags = [flag for flag in (1, 2, 4, 8, 16) if any(message.flags & flag for message in messages.values())]
    assert len(flags) == 5


def test_server_hash_example() -> None:
    assert "FNV-1a" in DOCUMENT
    assert [lane_codec.server_number(text) for text in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]


def test_tables_match_the_codec() -> None:
    kinds = re.findall(r"^\| (\d+) \| ([A-Z]+) \| (?:worker|gateway) \|", DOCUMENT, re.MULTILINE)
    flags = re.findall(r"^\| ([A-Z]+) \| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert len(kinds) == 8
    assert len(flags) == 5
    for name, number in [(name, number) for number, name in kinds] + flags:
        assert getattr(lane_codec, name) == int(number), name
    numbers = re.findall(r"^\| (\d+) \| `([0-9a-f ]+)` \|", DOCUMENT, re.MULTILINE)
    assert len(numbers) == 5
    for number, digits in numbers:
        assert lane_codec.encode_number(int(number)) == bytes.fromhex(digits)


@pytest.mark.parametrize(
    ("failing", "example"), [("error 2 no such model", "error"), ("code 2 404 no such model", "code")]
)
def test_worker_sends_the_documented_bytes(connect: Connect, raw: RawPeer, failing: str, example: str) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    gateway = GatewayByHand(raw)
    lane = gateway.lane()
    gateway.request("llm.generate", "alice", key=KEY, window=65536)
    worker.wait(event="REQUEST")
    assert next_of(lane, "accept") == plain(EXAMPLES["accept"])
    assert lane.peer_server == lane_codec.server_number(raw.server_id)
    lane.ask()  # It has our acknowledgement.
    worker.do("send 1 hello")
    assert next_of(lane, "data") == plain(EXAMPLES["data"])
    worker.do("send 1 " + "x" * 40_000)
    assert next_of(lane, "data").sequence == 3
    assert raw_send(lane, "credit") == 1
    raw_send(lane, "ping")
    assert next_of(lane, "pong") == plain(EXAMPLES["pong"])
    worker.do("end 1")
    assert next_of(lane, "end") == plain(EXAMPLES["end"])
    for n, key in [(2, 2), (3, 3)]:
        gateway.request("llm.generate", "alice", key=key)
        worker.wait(event="REQUEST")
        assert next_of(lane, "accept").frames == (accept(n, key),)
        if n == 2:
            worker.do(failing)
            assert next_of(lane, example) == plain(EXAMPLES[example])
    # Message number 2 is lost.
    lane.post(LaneMessage(0, 3, 7, (credit(3, 1),)))
    assert next_of(lane, "gap") == plain(EXAMPLES["gap"])
    raw_send(lane, "cancel")
    assert worker.wait(event="STOPPED", n=3)["status"] == "CANCELLED"
    raw.send(pub(lane.peer[:-1], EXAMPLES["ping"], reply=lane.own))
    assert gateway.behind.payload() == EXAMPLES["reset"]


def raw_send(lane: LaneEnd, example: str) -> int:
    """Sends an example exactly as documented; returns its number."""
    lane.raw.send(pub(lane.peer, EXAMPLES[example], reply=lane.own))
    lane.sent = decode(EXAMPLES[example]).sequence
    return lane.sent


@pytest.mark.parametrize(("example", "code"), [("error", None), ("code", 404)])
def test_gateway_sends_the_documented_bytes(connect: Connect, raw: RawPeer, example: str, code: int | None) -> None:
    gateway = connect()
    worker = WorkerByHand(raw, "llm.generate")
    lane = begin(gateway, worker)
    assert lane.receive() == plain(EXAMPLES["ack"])
    lane.acked = 1  # NEW is no longer set.
    raw_send(lane, "data")
    assert gateway.wait(event="DATA")["data"] == "hello"
    lane.answers_pings = lane.acknowledges = False
    lane.send(data(1, b"x" * 40_000))
    assert next_of(lane, "credit") == plain(EXAMPLES["credit"])
    assert next_of(lane, "ping") == plain(EXAMPLES["ping"])
    raw_send(lane, "pong")
    raw_send(lane, "end")
    gateway.wait(event="END", tag=1)
    for tag in [2, 3]:
        gateway.do(f"request {tag} llm.generate alice hello")
        lane.received = 1
        lane.send(accept(tag, worker.next().key))
        if tag == 2:
            raw_send(lane, example)
            error = gateway.wait(event="ERROR", tag=2)
            assert (error["data"], error.get("code")) == ("no such model", code)
    lane.ask()
    gateway.do("cancel 3")
    assert next_of(lane, "cancel") == plain(EXAMPLES["cancel"])
    raw_send(lane, "gap")
    assert next_of(lane, "cancel") == plain(EXAMPLES["cancel"])


def begin(gateway: Shell, worker: WorkerByHand) -> LaneEnd:
    """Accepts the example's request."""
    gateway.do("option stream_buffer_bytes 65536")
    gateway.do("request 1 llm.generate alice hello")
    asked = worker.next()
    lane = worker.lane(asked)
    lane.raw.send(pub(lane.peer, EXAMPLES["accept"][:-8] + lane_codec.u64(asked.key), reply=lane.own))
    lane.sent = 1
    return lane


@pytest.mark.parametrize(("message", "example"), [
    (LaneMessage(0, 7, 3), "reset"), (LaneMessage(lane_codec.NEW | lane_codec.PING, 7, 3, ping=2), "unknown"),
])  # fmt: skip
def test_gateway_resets_an_unknown_lane(connect: Connect, raw: RawPeer, message: LaneMessage, example: str) -> None:
    gateway = connect()
    worker = WorkerByHand(raw, "llm.generate")
    gateway.do("request 1 llm.generate alice hello")
    lane = worker.lane(worker.next())
    raw.send(pub(lane.peer, encode(message), reply=lane.own))
    assert lane.inbox.payload() == EXAMPLES[example]


def test_reset_ends_the_lane_at_both_ends(connect: Connect, raw: RawPeer) -> None:
    gateway = connect()
    lane = begin(gateway, WorkerByHand(raw, "llm.generate"))
    raw_send(lane, "reset")
    assert gateway.wait(event="ERROR", tag=1)["status"] == "PEER_GONE"


def test_worker_retransmits_a_lost_first_message(connect: Connect, raw: RawPeer) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    gateway = GatewayByHand(raw)
    lane = gateway.lane()
    gateway.request("llm.generate", "alice", key=KEY)
    assert lane.receive() == plain(EXAMPLES["accept"])
    raw_send(lane, "unknown")
    assert lane.receive() == plain(EXAMPLES["accept"])
