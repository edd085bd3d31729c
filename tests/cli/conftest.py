"""A nats-server, and the command line as `make cli` builds it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from harness import ROOT, TIMEOUT, Server

PROGRAM = ROOT / "build/cli/bin/nats-presence"


class Process:
    """A running nats-presence. Both outputs are collected unless `stdout` says otherwise."""

    def __init__(
        self, url: str, *arguments: str, stdout: int = subprocess.PIPE, stdin: int | None = None, **more: str
    ) -> None:
        """`more` are variables of its environment."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
        command = [str(PROGRAM), *arguments]
        self.process = subprocess.Popen(
            command, env={**environment, "NATS_URL": url, **more}, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE
        )
        self.stderr = b""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._changed:
                self.stderr += line
                self._changed.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until the standard error matches."""
        with self._changed:
            found = self._changed.wait_for(lambda: re.search(pattern, self.stderr.decode()), TIMEOUT)
        assert found, f"{pattern!r} is not in {self.stderr.decode()!r}"
        return found

    def line(self) -> bytes:
        """The next line of its standard output."""
        assert self.process.stdout
        return self.process.stdout.readline()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its end, and returns its exit code; negative for a signal."""
        code = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return code

    def kill(self) -> None:
        """Ends it, and the commands that it runs."""
        for number in [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]:
            if self.process.poll() is None:
                self.process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(2)
        if self.process.stdout:
            self.process.stdout.close()
        # A command that is still running, which only a defect can cause, keeps the standard error open.
        self._reader.join(1)
        if not self._reader.is_alive():
            assert self.process.stderr
            self.process.stderr.close()


class Reports:
    """A named pipe through which a command reports what happens to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        # Open at both ends, so that neither end waits for the other.
        self.descriptor = os.open(path, os.O_RDWR)
        self.text = b""

    def next(self) -> str:
        while b"\n" not in self.text:
            assert select.select([self.descriptor], [], [], TIMEOUT)[0], "the command reported nothing"
            self.text += os.read(self.descriptor, 4096)
        line, self.text = self.text.split(b"\n", 1)
        return line.decode()

    def close(self) -> None:
        os.close(self.descriptor)


def wait_for_exit(pid: int) -> None:
    """Waits until a process that need not be a child has exited."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], TIMEOUT)[0], f"process {pid} is still running"
    finally:
        os.close(descriptor)


Start = Callable[..., Process]
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def reports(tmp_path: Path) -> Iterator[Reports]:
    with closing(Reports(tmp_path / "reports")) as reports:
        yield reports


@pytest.fixture
def start(server: Server) -> Iterator[Start]:
    """Starts nats-presence with these arguments."""
    with ExitStack() as processes:

        def start(*arguments: str, **options: Any) -> Process:
            process = Process(server.url, *arguments, **options)
            processes.callback(process.kill)
            return process

        yield start


@pytest.fixture
def serve(start: Start) -> Start:
    """Starts `nats-presence serve` and waits until it serves."""

    def serve(*arguments: str, **options: Any) -> Process:
        process = start("serve", *arguments, **options)
        process.wait_for("serving .*\n")
        return process

    return serve


@pytest.fixture
def run(server: Server) -> Run:
    """Runs nats-presence with these arguments to its end."""

    def run(
        *arguments: str, data: bytes = b"", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
        return subprocess.run(
            [str(PROGRAM), *arguments],
            env={**inherited, "NATS_URL": server.url, **(environment or {})},
            input=data,
            capture_output=True,
            timeout=3 * TIMEOUT,
            check=False,
        )

    return run
