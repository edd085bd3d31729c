"""Strangers who know every subject and publish anything there: others' streams, on lanes and on level 0, arrive
complete and in order, and their processes' memory does not grow."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Connect, Shell
from harness import Command, Server
from lane_codec import GAP, NEW, PING, PONG, RESET, LaneMessage, accept, cancel, credit, data, encode, end, error
from lane_peer import GatewayByHand, WorkerByHand, no_responders, take_accept
from memory import resident
from raw import Message, RawPeer, Subscription, pub
from test_hostile_peer import Victim
from test_malformed_messages import LONE_CR, MALFORMED, assert_serving

sys.path.append(str(Path(__file__).resolve().parent.parent / "faults"))

from scene import Gateway, Scene

MARGIN = 16 << 20
"""The most bytes by which a process may grow."""
LOGS = 40
"""The most LOG events of a flood: 16 at once, then one a second."""


class Victims:
    """Endless streams of two clients, ann's on a lane and bob's on level 0, and subjects that a stranger overheard."""

    def __init__(self, scene: Scene, raw: RawPeer) -> None:
        self.worker = scene.worker("c")
        requests = raw.subscribe("svc")
        self.gateways: dict[str, Gateway] = {
            client: scene.gateway("c", lanes=lanes) for client, lanes in [("ann", True), ("bob", False)]
        }
        for client, gateway in self.gateways.items():
            gateway.request("svc", client)
        asked = [requests.next(), requests.next()]
        offers = [re.search(rb"Presence-Lane: 1 (\S+)", message.header) for message in asked]
        # The inbox that ann's gateway offered, and the reply inbox of bob's gateway.
        self.offer = next(offer[1] for offer in offers if offer).decode()
        self.inbox = next(message.reply for message, offer in zip(asked, offers) if not offer).decode()
        spy = RawPeer(raw.port)
        # The worker's end of the lane, which gives its subject in its messages.
        self.end = spy.subscribe(self.offer).next().reply.decode()
        spy.close()
        self.go_on()
        self._before = self._resident()

    def go_on(self) -> None:
        for client, gateway in self.gateways.items():
            gateway.all_go_on(client)

    def finish(self) -> None:
        """Checks that everything sent has arrived, and that no process has grown."""
        self.go_on()
        grown = [now - before for now, before in zip(self._resident(), self._before)]
        assert max(grown) < MARGIN, grown
        self.worker.send_line("finish")
        for client, gateway in self.gateways.items():
            done = self.worker.wait(event="done", client=client)
            assert (done["why"], done["accepted"]) == (0, 0)
            assert gateway.wait_for_end(client)["event"] == "end"
            assert gateway.received[client] == done["sent"]

    def _resident(self) -> list[int]:
        return [resident(program) for program in [self.worker, *self.gateways.values()]]


@pytest.fixture
def victims(server: Server, raw: RawPeer) -> Iterator[Victims]:
    with Scene(server.url) as scene:
        yield Victims(scene, raw)


def names(victims: Victims) -> list[str]:
    """Reply subjects of a stranger: none, forbidden ones, its own, others'. (Not the lane's other end: whoever knows
    that subject and may publish there is that end.)"""
    return [
        "",
        "client.offline",
        "$SYS.REQ.ACCOUNT.PING",
        "$JS.API.INFO",
        "a.*",
        ">",
        "_INBOX.stranger.1",
        "_INBOX." + "0" * 32 + ".lane." + "0" * 32,
        victims.inbox.rsplit(".", 1)[0] + ".ffffff",
        victims.offer.rsplit(".", 1)[0] + "." + "f" * 32,
        "x" * 3000,
    ]


def lie(dice: random.Random) -> bytes:
    """Random bytes, or something like a lane message, with numbers near their limits."""
    numbers = [0, 1, 2, 127, 128, 1 << 31, (1 << 32) - 1]
    large = [0, 1, 2, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    if dice.random() < 0.3:
        return dice.randbytes(dice.randrange(200))
    frames = [
        dice.choice(
            [
                lambda: accept(dice.choice(numbers), dice.choice(large)),
                lambda: data(dice.choice(numbers), dice.randbytes(dice.randrange(100))),
                lambda: end(dice.choice(numbers)),
                lambda: error(dice.choice(numbers), b"\xff"),
                lambda: cancel(dice.choice(numbers), dice.randrange(256)),
                lambda: credit(dice.choice(numbers), dice.choice(large)),
            ]
        )()
        for _ in range(dice.randrange(4))
    ]
    flags = dice.choice([0, PING, PONG, GAP, RESET, NEW, NEW | PING, dice.randrange(256)])
    message = encode(LaneMessage(flags, dice.choice(large), dice.choice(large), tuple(frames)))
    return message[: dice.randrange(len(message) + 1)] if dice.random() < 0.2 else message


def overwhelm(victims: Victims, raw: RawPeer, count: int) -> None:
    dice = random.Random(7)
    # An unused number in the inbox of bob's gateway.
    nowhere = victims.inbox.rsplit(".", 1)[0] + ".fffffff"
    where = [victims.offer, victims.offer + "-1", victims.offer + "-9", victims.end, victims.end + "-1", nowhere]
    others = names(victims)
    for done in range(count):
        subject = dice.choice([*where, "client.offline"])
        if dice.random() < 0.1:
            raw.send(no_responders(dice.choice(where)))
        header = b"X: " + b"h" * (64 << 10) + b"\r\n" if dice.random() < 0.002 else b""
        raw.send(pub(subject, lie(dice), reply=dice.choice(others), header=header))
        if done % 5000 == 0:
            raw.flush()
            victims.go_on()
    raw.flush()
    victims.finish()


def test_random_messages_on_every_subject(victims: Victims, raw: RawPeer) -> None:
    overwhelm(victims, raw, 30_000)


@pytest.mark.long
def test_random_messages_on_every_subject_for_long(victims: Victims, raw: RawPeer) -> None:
    overwhelm(victims, raw, 300_000)


@pytest.mark.long
def test_million_forged_announcements(victims: Victims, raw: RawPeer) -> None:
    for start in range(0, 1_000_000, 1000):
        raw.send(b"".join(pub("client.offline", b"stranger %d" % n) for n in range(start, start + 1000)))
        if start % 50_000 == 0:
            raw.flush()
            victims.go_on()
    raw.flush()
    victims.finish()


def test_forged_client_ids_stop_only_the_forger(connect: Connect, raw: RawPeer) -> None:
    """A stranger requests in the name of another's client, cancels because "the client is offline", and breaks its
    lane: only its own streams stop."""
    worker, gateway = connect(), connect()
    worker.do("serve svc workers 0")
    gateway.do("request 1 svc ann hello")
    own = worker.wait(event="REQUEST", client="ann")["n"]
    for breaks in ["cancels", "lies"]:
        stranger = GatewayByHand(raw)
        lane = stranger.lane()
        stranger.request("svc", "ann", key=7)
        n = worker.wait(event="REQUEST", client="ann")["n"]
        stream = take_accept(lane, 7)
        if breaks == "cancels":
            lane.send(cancel(stream, 2))
            assert worker.wait(event="STOPPED", n=n)["status"] == "OFFLINE"
        else:
            lane.send_control(ack=1 << 40)
            assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
        worker.do(f"send {own} {breaks}")
        assert gateway.wait(event="DATA", tag=1)["data"] == breaks
    assert worker.ask("is_online ann")["text"] == "yes"
    worker.do(f"end {own}")
    gateway.wait(event="END", tag=1)


def test_forged_reply_subjects_and_offers(connect: Connect, raw: RawPeer) -> None:
    """Reply subjects and offers that name the service itself, others' lanes, and forbidden subjects."""
    worker = connect()
    worker.do("serve svc workers 10")
    victim = Victim(worker, raw, "svc")
    gateway = GatewayByHand(raw)
    gateway.request("svc", "honest", key=7)
    n = worker.wait(event="REQUEST", client="honest")["n"]
    lane = gateway.lane()
    stream = take_accept(lane, 7)
    before = resident(worker)
    dice = random.Random(8)
    subjects = ["", "svc", "client.offline", "$SYS.x", "a.>", "_INBOX.stranger.1", lane.peer, "x" * 3000]
    ids = ["", "victim", "honest", "stranger", "x" * 1024, "x" * 1025, "x" * (64 << 10)]
    for done in range(3000):
        offer = dice.choice(
            [
                b"",
                b"1 %s %016x %d"
                % (dice.choice([*subjects, gateway.offer]).encode(), dice.randrange(1 << 64), dice.randrange(1 << 33)),
                bytes(dice.choices(range(33, 127), k=dice.randrange(100))),
            ]
        )
        header = f"Connect-ID: {dice.choice(ids)}\r\nPresence-Lane: ".encode() + offer + b"\r\n"
        raw.send(pub("svc", dice.randbytes(20), reply=dice.choice(subjects), header=header))
        if done % 100 == 0:
            victim.check()
            # Free them, so that there is capacity for others.
            while request := worker.take(event="REQUEST"):
                worker.do(f"free {request['n']}")
    raw.flush()
    victim.check()
    # Its own gateway was offered to others in its name: it receives streams that it did not request, and goes on.
    worker.do(f"send {n} still here")
    while lane.take() != data(stream, b"still here"):
        pass
    assert resident(worker) - before < MARGIN
    stats = worker.ask("stats")
    assert stats["connects"] == 1
    assert stats["senders"] <= 10
    assert stats["requests_ignored"] > 1000
    assert len([event for event in worker.events if event["event"] == "LOG"]) < LOGS


def test_unanswerable_worker_does_not_disable_other_lanes(tmp_path: Path, shell_program: Command) -> None:
    """A false worker gives a subject at which the gateway may not publish: other workers stay on lanes."""
    (tmp_path / "server.conf").write_text(
        """
        no_auth_user: stranger
        authorization: { users: [
          { user: gateway, password: g, permissions: { publish: { deny: ["forbidden.>"] } } }
          { user: stranger, password: s }
        ] }
        """
    )
    server = Server("-c", str(tmp_path / "server.conf"))
    raw = RawPeer(server.port)
    with Shell(shell_program) as gateway:
        assert isinstance(gateway, Shell)
        gateway.do(f"connect nats://gateway:g@127.0.0.1:{server.port}")
        honest, false = WorkerByHand(raw, "honest"), WorkerByHand(raw, "false")
        gateway.do("request 1 honest ann hello")
        lane = honest.accept()
        lane.send(data(1, b"x" * 20))
        assert gateway.wait(event="DATA", tag=1)["data"] == "x" * 20
        gateway.do("request 2 false bob hello")
        asked = false.next()
        liar = false.lane(asked, own="forbidden.end")
        liar.send(accept(1, asked.key), data(1, b"y"))
        assert gateway.wait(event="ERROR", tag=2)["status"] == "PEER_GONE"
        gateway.do("request 3 honest cho hello")
        # The request has a key and an offer.
        asked = honest.next()
        lane.send(accept(2, asked.key), end(2), end(1))
        gateway.wait(event="END", tag=3)
        gateway.wait(event="END", tag=1)
    raw.close()
    server.kill()


def storm(raw: RawPeer, malformed: list[bytes], seconds: float) -> float:
    """Sends a hundred malformed messages a second for this long; returns the time of the last."""
    begun = time.monotonic()
    for message in itertools.cycle(malformed):
        raw.send(message)
        time.sleep(0.01)
        if time.monotonic() - begun >= seconds:
            break
    raw.flush()
    return time.monotonic()


def assert_little_was_told(program: Shell) -> None:
    """It backs off: far fewer connections than messages were lost."""
    connects = program.ask("stats")["connects"]
    assert 1 < connects < 60, connects
    reported = [event for event in program.events if event["event"] in ("LOG", "DISCONNECTED", "CONNECTED")]
    assert len(reported) < LOGS + 2 * connects


LONE_CRS = [
    pub(subject, b"poison", reply="some.where", header=LONE_CR) for subject in ["svc.generate", "client.offline"]
]


@pytest.mark.parametrize("malformed", [LONE_CRS, [*LONE_CRS, *MALFORMED.values()]], ids=["a lone CR", "of all kinds"])
def test_hundred_malformed_messages_a_second_at_a_worker(
    connect: Connect, raw: RawPeer, malformed: list[bytes]
) -> None:
    worker = connect()
    worker.do("serve svc.* workers 0")
    before = resident(worker)
    assert_serving(worker, raw, storm(raw, malformed, 3))
    assert_little_was_told(worker)
    assert resident(worker) - before < MARGIN


def test_hundred_malformed_messages_a_second_at_a_gateway(connect: Connect, raw: RawPeer) -> None:
    requests = raw.subscribe("llm.generate")
    gateway = connect()
    gateway.do("listen")
    tags = itertools.cycle(range(1, 1000))  # the shell knows tags below 1000
    asked = ask(gateway, requests, next(tags))
    assert asked
    offer = re.search(rb"Presence-Lane: 1 (\S+)", asked.header)
    assert offer
    # Sent to its inbox, to its lanes, and to the announcements that it listens to.
    malformed = []
    for kind in [*LONE_CRS, *MALFORMED.values()]:
        for subject in [asked.reply, offer[1]]:
            inbox, name = subject.rsplit(b".", 1)
            malformed.append(readdressed(kind, inbox, name))
    before = resident(gateway)
    since = storm(raw, malformed, 3)
    while not is_streaming(gateway, requests, raw, next(tags)):
        assert time.monotonic() - since < 1, "no stream runs within a second"
    assert time.monotonic() - since < 1
    assert_little_was_told(gateway)
    assert resident(gateway) - before < MARGIN


def readdressed(malformed: bytes, inbox: bytes, name: bytes) -> bytes:
    """Turns a message that is malformed for a worker into one for a gateway; announcements stay the same."""
    command, subject, rest = malformed.split(b" ", 2)
    if subject != b"client.offline":
        # The last token may be the malformed part.
        subject = inbox + b"." + subject.removeprefix(b"svc.").replace(b"generate", name)
    return b" ".join([command, subject, rest])


def ask(gateway: Shell, requests: Subscription, tag: int) -> Message | None:
    """Requests a stream; None if the request is lost with its connection."""
    if gateway.ask(f"request {tag} llm.generate probe {tag}")["status"] == "DISCONNECTED":
        return None
    with contextlib.suppress(queue.Empty):
        while True:
            asked = requests.next(timeout=0.05)
            # Skip those of earlier requests.
            if asked.payload == b"%d" % tag:
                return asked
    return None


def is_streaming(gateway: Shell, requests: Subscription, raw: RawPeer, tag: int) -> bool:
    """True if a stream runs from beginning to end."""
    asked = ask(gateway, requests, tag)
    if not asked:
        return False
    inbox = asked.reply.decode()
    raw.send(pub(inbox, b"x") + pub(inbox, b"__STREAM_END__"))
    event = gateway.wait(tag=tag)
    if event["event"] == "ERROR":
        return False
    assert (event["event"], event["data"]) == ("DATA", "x")
    return gateway.wait(tag=tag)["event"] == "END"


@pytest.mark.long
def test_hundred_malformed_messages_a_second_for_long(connect: Connect, raw: RawPeer) -> None:
    worker = connect()
    worker.do("serve svc.* workers 0")
    before = resident(worker)
    for _ in range(100):
        assert_serving(worker, raw, storm(raw, LONE_CRS, 0.3))
    assert resident(worker) - before < MARGIN
