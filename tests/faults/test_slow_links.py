"""Long and slow links: nothing is sent twice without a loss, no connection is cut, every stream arrives complete."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Program, Server
from proxy import Link

BULK = Path(__file__).resolve().parent / "bulk.py"
WORKERS = 6
TIMEOUT = 55.0


class Bulk:
    """A gateway behind a link, and workers next to the server."""

    def __init__(self, server: Server, link: Link, workers: int, stack: ExitStack, *options: str) -> None:
        self.link = link
        for number in range(workers):
            worker = Program((sys.executable, BULK), "worker", server.url, f"svc{number}", *options)
            stack.enter_context(worker).wait(event="ready")
        self.gateway = stack.enter_context(Program((sys.executable, BULK), "gateway", link.url, *options))
        self.gateway.wait(event="ready")
        self.workers = workers

    def carry(self, count: int, size: int) -> float:
        """Streams `count` messages from each worker; returns the bytes that passed the link per byte of payload."""
        before = self.link.to_client
        for number in range(self.workers):
            self.gateway.send_line(f"svc{number} client{number} {count} {size}")
        for _ in range(self.workers):
            end = self.gateway.wait(event="end", timeout=TIMEOUT)
            assert (end["came"], end["why"], end["connects"]) == (count, 0, 1), end
        assert self.link.connections == 1
        return (self.link.to_client - before) / (self.workers * count * size)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(("delay", "count"), [(0.3, 2000), pytest.param(1.25, 800, marks=pytest.mark.long)])
def test_long_round_trip_causes_no_retransmission(server: Server, stack: ExitStack, delay: float, count: int) -> None:
    bulk = Bulk(server, Link(server.port, delay), 1, stack)
    assert bulk.carry(count, 1000) < 1.1


def test_round_trip_above_three_heartbeats_is_no_death(server: Server, stack: ExitStack) -> None:
    """Three heartbeats are shorter than a round trip."""
    bulk = Bulk(server, Link(server.port, 0.6), 1, stack, "heartbeat_ms=300")
    assert bulk.carry(1000, 1000) < 1.1


def test_slow_link_shared_by_six_workers_is_not_cut(server: Server, stack: ExitStack, tmp_path: Path) -> None:
    """More than the link carries within the write deadline of nats-server: 10 s by default, shorter here."""
    settings = tmp_path / "server.conf"
    settings.write_text("write_deadline: 4s\n")
    server.kill()
    server.start("-c", str(settings))
    bulk = Bulk(server, Link(server.port, 0.001, rate=400_000), WORKERS, stack)
    assert bulk.carry(800, 1000) < 1.1
    assert not [line for line in server.log if "Slow Consumer" in line]
