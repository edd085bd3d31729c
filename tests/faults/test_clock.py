"""The wall clock jumps, without effect. Suspended machines: test_processes.py."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import BUILD, Command, Server, Shell, run
from scene import Scene, finish, within

Jump = Callable[[int], None]

HOUR, YEAR = 3600, 365 * 86400
JUMPS = [HOUR, -HOUR, YEAR, -2 * YEAR, -100 * YEAR, 0]


@pytest.fixture
def shift(tmp_path: Path) -> Path:
    """A file with the number of seconds by which the clock of preloaded processes is wrong."""
    file = tmp_path / "shift"
    file.write_bytes(struct.pack("q", 0))
    return file


@pytest.fixture
def jump(shift: Path) -> Jump:
    def jump(seconds: int) -> None:
        with shift.open("r+b", buffering=0) as file:
            file.write(struct.pack("q", seconds))

    return jump


@pytest.fixture
def preloaded(shift: Path) -> Command:
    """The prefix of commands that use this clock."""
    library = BUILD / "clock.so"
    source = Path(__file__).resolve().parent / "clock.c"
    run("cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC",
        "-o", str(library), str(source))  # fmt: skip
    return ("env", f"LD_PRELOAD={library}", f"CLOCK_SHIFT={shift}")


@pytest.fixture
def scene(server: Server, preloaded: Command) -> Iterator[Scene]:
    with Scene(server.url, preloaded) as scene:
        yield scene


def test_streams_survive_clock_jumps(scene: Scene, jump: Jump) -> None:
    options = ["heartbeat_ms=400", "peer_grace_ms=200", "ping_interval_ms=400"]
    pairs = []
    for of_gateway, of_worker in [("c", "python"), ("python", "go"), ("go", "c")]:
        worker = scene.worker(of_worker, *options, subject=f"svc.{of_worker}")
        gateway = scene.gateway(of_gateway, *options)
        gateway.request(f"svc.{of_worker}", "ann")
        gateway.all_go_on("ann")
        pairs.append((gateway, worker))
    for seconds in JUMPS:
        jump(seconds)
        for gateway, _ in pairs:
            gateway.all_go_on("ann", count=100)
    for gateway, worker in pairs:
        finish(gateway, worker, "ann")


@pytest.mark.parametrize("seconds", [YEAR, -YEAR])
def test_timeouts_ignore_clock_jumps(
    server: Server, shell_program: Command, preloaded: Command, jump: Jump, seconds: int
) -> None:
    """Running timeouts, session graces and heartbeats take as long as without the jump."""
    program = (*preloaded, *shell_program)
    with Shell(program) as gateway, Shell(program) as worker:
        assert isinstance(gateway, Shell)
        assert isinstance(worker, Shell)
        for end in [gateway, worker]:
            end.do(f"connect {server.url} session_grace_ms=1000 peer_grace_ms=500 heartbeat_ms=300")
        worker.do("serve svc workers 0")
        gateway.do("watch")
        gateway.do("request 1 svc stays x")
        worker.do(f"send {worker.wait(event='REQUEST')['n']} first")
        gateway.wait(event="DATA", tag=1)
        gateway.do("option timeout_ms 1000")
        gateway.do("request 2 svc waits x")
        worker.wait(event="REQUEST")
        gateway.do("session tab")
        gateway.do("leave")
        since = time.monotonic()
        jump(seconds)
        # Its clock did jump.
        assert abs(int(gateway.ask("now")["text"]) - time.time() - seconds) < 60
        assert gateway.ask("is_online tab")["text"] == "yes"
        assert gateway.wait(event="ERROR")["status"] == "TIMEOUT"
        within(0.8, 2.5, since)
        assert gateway.wait(event="OFFLINE", client="tab")
        within(0.8, 2.5, since)
        since = time.monotonic()
        worker.kill()
        assert gateway.wait(event="ERROR", tag=1)["status"] == "PEER_GONE"
        within(0.5, 2.5, since)
        assert gateway.take(event="DISCONNECTED") is None
