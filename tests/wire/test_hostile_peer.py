"""A peer that floods: its messages are counted, logged at a limited rate, and not kept; others' streams go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command, Connect, Shell
from harness import Server
from raw import RawPeer, pub

FLOOD = 100_000
REFUSALS = 5_000
MEBI = 1 << 20


def resident(shell: Shell) -> int:
    return int(Path(f"/proc/{shell.process.pid}/statm").read_text().split()[1]) * 4096


class Victim:
    """A stream that must go on during the flood."""

    def __init__(self, worker: Shell, raw: RawPeer, subject: str) -> None:
        self.worker = worker
        self.answers = raw.request(subject, "victim")
        self.n = worker.wait(event="REQUEST", client="victim")["n"]
        self.sent = 0

    def check(self) -> None:
        self.worker.do(f"send {self.n} {self.sent}")
        assert self.answers.payload() == b"%d" % self.sent
        self.sent += 1


def test_announcement_flood_keeps_memory_flat(connect: Connect, raw: RawPeer) -> None:
    worker = connect()
    worker.do("serve svc workers 0")
    victim = Victim(worker, raw, "svc")
    sizes = []
    for flood in range(2):
        for start in range(0, FLOOD, 1000):
            raw.send(b"".join(pub("client.offline", b"stranger %d" % n) for n in range(start, start + 1000)))
            victim.check()
        raw.flush()
        # The server has forwarded everything before this.
        raw.request("svc", f"last {flood}")
        worker.wait(event="REQUEST", client=f"last {flood}")
        assert worker.ask("stats")["offline_in"] == (flood + 1) * FLOOD
        sizes.append(resident(worker))
    victim.check()
    assert sizes[1] - sizes[0] < 4 * MEBI
    assert not [event for event in worker.events if event["event"] == "LOG"]


def test_invalid_announcements_are_logged_at_a_limited_rate(connect: Connect, raw: RawPeer) -> None:
    worker = connect()
    worker.do("serve svc workers 0")
    victim = Victim(worker, raw, "svc")
    nonsense = [b"", b"\n", b"\xff\xfe", b"a" * 2000, bytes(64 << 10)]
    for start in range(0, 2000, len(nonsense)):
        raw.send(b"".join(pub("client.offline", what) for what in nonsense))
        if start % 100 == 0:
            victim.check()
    raw.request("svc", "last")
    worker.wait(event="REQUEST", client="last")
    stats = worker.ask("stats")
    assert (stats["offline_in"], stats["messages_ignored"]) == (0, 2000)
    assert len([event for event in worker.events if event["event"] == "LOG"]) < 40


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """The worker may not publish below "forbidden."; everyone may request with such a reply subject."""
    (tmp_path / "server.conf").write_text(
        """
        no_auth_user: stranger
        authorization: { users: [
          { user: worker, password: w, permissions: { publish: { deny: ["forbidden.>"] } } }
          { user: stranger, password: s }
        ] }
        """
    )
    server = Server("-c", str(tmp_path / "server.conf"))
    yield server
    server.kill()


@pytest.mark.parametrize("lanes", ["true", "false"])
def test_flood_of_unanswerable_requests_harms_no_stream(shell_program: Command, guarded: Server, lanes: str) -> None:
    raw = RawPeer(guarded.port)
    with Shell(shell_program) as worker:
        assert isinstance(worker, Shell)
        worker.do(f"connect nats://worker:w@127.0.0.1:{guarded.port} lanes={lanes}")
        worker.do("serve svc workers 1")
        victim = Victim(worker, raw, "svc")
        # max_streams is 1: each of these is refused at once, to a subject where the worker may not publish.
        for start in range(0, REFUSALS, 100):
            raw.send(b"".join(pub("svc", reply=f"forbidden.{n}") for n in range(start, start + 100)))
            victim.check()
        # This one may be answered: everything before it has been processed.
        assert raw.request("svc", "last").payload() == b"__STREAM_ERROR__:server busy"
        victim.check()
        worker.do(f"end {victim.n}")
        assert victim.answers.payload() == b"__STREAM_END__"
        assert worker.ask("stats")["requests_busy"] == REFUSALS + 1
        assert worker.ask("stats")["connects"] == 1
        worker.do("close 900")
        assert len([event for event in worker.events if event["event"] == "LOG"]) < 40
    raw.close()


def test_forged_offer_does_not_disable_other_lanes(shell_program: Command, guarded: Server) -> None:
    raw = RawPeer(guarded.port)
    with Shell(shell_program) as worker, Shell(shell_program) as gateway:
        assert isinstance(worker, Shell)
        assert isinstance(gateway, Shell)
        worker.do(f"connect nats://worker:w@127.0.0.1:{guarded.port}")
        worker.do("serve svc workers 0")
        for forged in range(3):
            offer = f"Presence-Lane: 1 forbidden.inbox.lane.{forged} 0123456789abcdef 65536\r\n".encode()
            raw.send(pub("svc", reply=f"_INBOX.stranger.{forged}", header=offer))
            n = worker.wait(event="REQUEST")["n"]
            # The stream is on a lane at first; the refusal ends it.
            assert worker.wait(event="STOPPED", n=n)["status"] == "PEER_GONE"
        gateway.do(f"connect nats://127.0.0.1:{guarded.port}")
        gateway.do("request 1 svc alice -")
        n = worker.wait(event="REQUEST", client="alice")["n"]
        assert worker.ask("stats")["lanes"] == 1
        worker.do(f"send {n} x")
        assert gateway.wait(event="DATA", tag=1)["data"] == "x"
        worker.do(f"end {n}")
        gateway.wait(event="END", tag=1)
    raw.close()
