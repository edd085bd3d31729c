"""Ends of lanes, driven by hand: a gateway and a worker that follow docs/wire.md and use none of our code."""

from __future__ import annotations

import itertools
import re
import secrets
from collections import deque
from typing import NamedTuple

from lane_codec import ACCEPT, GAP, NEW, PING, PONG, RESET, Frame, LaneMessage, accept, decode, encode, from_u64
from raw import Message, RawPeer, Subscription, pub

# The subjects of the library's ends.
OWN = re.compile(rb"_INBOX\.[0-9a-f]{32}\.lane\.[0-9a-f]{32}")
OWN_GATEWAY = re.compile(OWN.pattern + rb"-[0-9]+")
OFFER = re.compile(rb"Presence-Lane: (\S+) (\S+) ([0-9a-f]{16}) ([0-9]+)\r\n")


class Ended(Exception):
    """The other end has sent RESET."""


class LaneEnd:
    """An end of a lane that sends what the test tells it to.

    It acknowledges what it takes at once, and answers PINGs while it waits.
    """

    def __init__(self, raw: RawPeer, own: str, inbox: Subscription, peer: str, *, serves: bool) -> None:
        self.raw, self.own, self.inbox, self.peer, self.serves = raw, own, inbox, peer, serves
        self.sent = 0
        self.acked = 0
        self.received = 0
        self.frames: deque[Frame] = deque()
        """Messages that arrived and were not taken yet."""
        self.answers_pings = True
        self.acknowledges = True
        self.pings = 0
        """The numbers of the last PING that we sent, and of the last that we received."""
        self.asked = 1
        self.server = 0
        """The subject that we give as ours."""

    def send(self, *frames: Frame, flags: int = 0) -> LaneMessage:
        """The next message."""
        self.sent += 1
        return self.post(LaneMessage(flags, self.sent, self.received, frames))

    def send_control(self, flags: int = 0, *, ack: int | None = None) -> None:
        """Sends a message without frames."""
        self.post(LaneMessage(flags, self.sent, self.received if ack is None else ack))

    def post(self, message: LaneMessage, *, reply: str | None = None) -> LaneMessage:
        if self.serves and not self.acked:
            message = message._replace(flags=message.flags | NEW)
        if message.flags & PING:
            self.pings += 1
            message = message._replace(ping=self.pings)
        if message.flags & PONG:
            message = message._replace(pong=self.asked)
        message = message._replace(server=self.server)
        self.raw.send(pub(self.peer, encode(message), reply=self.own if reply is None else reply))
        return message

    def receive(self) -> LaneMessage:
        """The next message, without the header's fields about PINGs and servers, which are recorded."""
        message = self.inbox.next()
        while message.header.startswith(b"NATS/1.0 503"):
            # A 503: the other end is not there at the moment.
            message = self.inbox.next()
        assert not message.header, message
        if self.serves:
            # A gateway's lane has a number; for a lane that it does not know, the offer itself answers.
            assert message.reply.decode().split("-")[0] == self.peer, message
        elif not self.peer:
            # The worker's first message shows its subject.
            self.peer = message.reply.decode()
        else:
            assert message.reply.decode() == self.peer
        decoded = decode(message.payload)
        self.asked = decoded.ping or self.asked
        self.answered = decoded.pong
        self.peer_server = decoded.server
        return decoded.plain()

    def receive_news(self) -> LaneMessage:
        """The next message with something new: acknowledgements are repeated while streams run."""
        while True:
            message = self.receive()
            if message.flags or message.frames:
                return message

    def apply(self, message: LaneMessage) -> None:
        self.acked = max(self.acked, message.ack)
        if message.flags & RESET:
            raise Ended
        if message.frames and message.sequence == self.received + 1:
            self.received += 1
            self.frames += message.frames
            if self.acknowledges:
                self.send_control()
        elif message.sequence > self.received:
            raise AssertionError(f"{message} arrives after number {self.received}")
        if message.flags & PING and self.answers_pings:
            self.send_control(PONG)

    def take(self, kind: int | None = None) -> Frame:
        """The next frame; of this kind, if one is given."""
        while not self.frames:
            self.apply(self.receive())
        frame = self.frames.popleft()
        assert kind in (None, frame.kind), frame
        return frame

    def ask(self) -> LaneMessage:
        """Waits for the answer to a PING: everything sent before has been processed."""
        self.send_control(PING)
        while True:
            message = self.receive()
            self.apply(message)
            if message.flags & PONG and self.answered == self.pings:
                return message

    def wait_for(self, flag: int) -> LaneMessage:
        """Takes messages up to one with this flag."""
        while True:
            message = self.receive()
            if message.flags & flag:
                return message
            self.apply(message)

    def wait_for_end(self) -> None:
        """Takes messages until the other end sends RESET."""
        try:
            while True:
                self.apply(self.receive())
        except Ended:
            pass


class GatewayByHand:
    """Offers lanes to the library's workers."""

    def __init__(self, raw: RawPeer) -> None:
        self.raw = raw
        self.offer = f"_INBOX.{secrets.token_hex(16)}.lane.{secrets.token_hex(16)}"
        self.inbox = raw.subscribe(self.offer)
        self.behind = raw.subscribe(f"{self.offer}-1")
        """Messages to the end's own subject: 503s, and answers about unknown lanes."""

    def request(self, subject: str, client: str, *, key: int, window: int = 65536, offer: str = "") -> Subscription:
        """Requests a stream; returns the subscription to the request's own inbox, for level 0."""
        offer = offer or f"1 {self.offer} {key:016x} {window}"
        reply, answers = self.raw.inbox()
        header = f"Connect-ID: {client}\r\nPresence-Lane: {offer}\r\n"
        self.raw.send(pub(subject, b"hello", reply=reply, header=header.encode()))
        return answers

    def lane(self) -> LaneEnd:
        """This end of the lane whose first message arrives next."""
        return LaneEnd(self.raw, f"{self.offer}-1", self.inbox, "", serves=False)


class Asked(NamedTuple):
    """A request of one of the library's gateways, with its offer."""

    message: Message
    version: str
    offer: str
    key: int
    window: int

    @property
    def reply(self) -> str:
        return self.message.reply.decode()


class WorkerByHand:
    """Serves a subject for the library's gateways."""

    _numbers = itertools.count(1)

    def __init__(self, raw: RawPeer, subject: str) -> None:
        self.raw = raw
        self.requests = raw.subscribe(subject, "workers")

    def next(self) -> Asked:
        message = self.requests.next()
        found = OFFER.search(message.header)
        assert found, message
        version, offer, key, window = (text.decode() for text in found.groups())
        return Asked(message, version, offer, int(key, 16), int(window))

    def lane(self, asked: Asked, own: str = "") -> LaneEnd:
        """This end of a new lane to the gateway that requested."""
        own = own or f"_INBOX.by.hand.{next(self._numbers)}"
        return LaneEnd(self.raw, own, self.raw.subscribe(own), asked.offer, serves=True)

    def accept(self) -> LaneEnd:
        """Accepts the next request, as stream 1 of a new lane."""
        asked = self.next()
        lane = self.lane(asked)
        lane.send(accept(1, asked.key))
        return lane


def take_accept(lane: LaneEnd, key: int) -> int:
    """The stream that the worker accepted for this key."""
    frame = lane.take(ACCEPT)
    assert from_u64(frame.body) == key
    return frame.stream


def no_responders(subject: str) -> bytes:
    """The 503 that nats-server sends for an absent subscriber, forged."""
    block = b"NATS/1.0 503\r\n\r\n"
    return b"HPUB %s %d %d\r\n%s\r\n" % (subject.encode(), len(block), len(block), block)


__all__ = [
    "GAP",
    "OWN",
    "OWN_GATEWAY",
    "Asked",
    "Ended",
    "GatewayByHand",
    "LaneEnd",
    "WorkerByHand",
    "no_responders",
    "take_accept",
]
