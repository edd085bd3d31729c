"""Gateways and workers in any language, and streams between them that are checked as they arrive."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from harness import TIMEOUT, Command, Event, Program, Server, command

DISCONNECTED, PEER_GONE, NO_RESPONDERS = -8, -9, -10

SOON = ("reconnect_min_ms=10", "reconnect_max_ms=200")
"""Options of an end that reconnects quickly."""

LANGUAGES = ["c", "go", "python", "asyncio"]


class Gateway(Program):
    """Checks one stream per client: messages arrive in order, it ends once, and nothing follows the end."""

    def __init__(self, program: Command, *arguments: str) -> None:
        self.received: dict[str, int] = {}
        self.ended: dict[str, Event] = {}
        self.wrong: list[object] = []
        super().__init__(program, *arguments)

    def _on_event(self, event: Event) -> None:
        if event["event"] == "ready":
            return super()._on_event(event)
        client = event["client"]
        if client in self.ended:
            self.wrong.append((event, "after", self.ended[client]))
        if event["event"] == "data":
            number = self.received.get(client, 0)
            if event["data"] != f"{client} {number}":
                self.wrong.append((event, "is not number", number))
            self.received[client] = number + 1
        else:
            self.ended[client] = event

    def request(self, subject: str, client: str, what: str = "endless") -> None:
        self.send_line(f"request {subject} {client} {what}")

    def until(self, is_so: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
        """Waits until an event makes this true."""
        with self._changed:
            if not self._changed.wait_for(lambda: is_so() or self.wrong or self.has_ended, timeout):
                raise AssertionError(f"{self.name}: {what}: not within {timeout} s; {self.received}, {self.ended}")
        assert not self.wrong, self.wrong[:5]
        assert is_so(), f"{self.name} ended; {self.received}, {self.ended}"

    def all_go_on(self, *clients: str, count: int = 20) -> None:
        """Waits until `count` more messages of each client have arrived."""
        least = {client: self.received.get(client, 0) + count for client in clients}

        def go_on() -> bool:
            ended = [self.ended[client] for client in clients if client in self.ended]
            assert not ended, ended
            return all(self.received.get(client, 0) >= n for client, n in least.items())

        self.until(go_on, "streams go on")

    def wait_for_end(self, client: str, timeout: float = TIMEOUT) -> Event:
        self.until(lambda: client in self.ended, f"{client}'s stream ends", timeout)
        return self.ended[client]

    def end(self) -> None:
        super().end()
        assert not self.wrong, self.wrong[:5]


class Scene:
    """Starts gateways and workers; at its end each must exit by itself with status 0."""

    def __init__(self, url: str, before: Command = ()) -> None:
        self.url = url
        self._before = before
        """The prefix of every command."""
        self._stack = ExitStack()

    def gateway(self, language: str, *options: str, url: str = "", lanes: bool = True) -> Gateway:
        program = (*self._before, *command(language, is_worker=False))
        gateway = self._stack.enter_context(Gateway(program, url or self.url, str(lanes).lower(), *options))
        assert isinstance(gateway, Gateway)
        gateway.wait(event="ready")
        return gateway

    def worker(self, language: str, *options: str, url: str = "", lanes: bool = True, subject: str = "svc") -> Program:
        program = (*self._before, *command(language, is_worker=True))
        worker = self._stack.enter_context(Program(program, url or self.url, subject, str(lanes).lower(), *options))
        worker.wait(event="ready")
        return worker

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *why: object) -> None:
        self._stack.__exit__(*why)  # type: ignore[arg-type]


def begin(gateway: Gateway, subject: str = "svc") -> str:
    """Starts a stream, once both ends are connected; returns its client."""
    for client in (f"late{attempt}" for attempt in range(50)):
        gateway.request(subject, client)
        gateway.until(lambda: client in gateway.received or client in gateway.ended, "an answer comes")  # noqa: B023
        if client in gateway.received:
            gateway.all_go_on(client)
            return client
        assert gateway.ended[client]["status"] in [DISCONNECTED, NO_RESPONDERS]
        time.sleep(0.1)
    raise AssertionError("the ends do not reconnect")


def finish(gateway: Gateway, worker: Program, *clients: str) -> None:
    """Has the worker end all its streams; checks that everything it sent has arrived."""
    worker.send_line("finish")
    for client in clients:
        done = worker.wait(event="done", client=client)
        assert (done["why"], done["accepted"]) == (0, 0)
        assert gateway.wait_for_end(client)["event"] == "end"
        assert gateway.received[client] == done["sent"]


@contextmanager
def stopped(*programs: Program | Server) -> Iterator[None]:
    """Stops them, like a suspended machine, and resumes them in this order."""
    for program in programs:
        program.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, program.process.pid, os.WSTOPPED)  # Until then its threads may still run.
    try:
        yield
    finally:
        for program in programs:
            program.process.send_signal(signal.SIGCONT)


def within(least: float, most: float, since: float) -> None:
    """Checks that the time since then, in seconds, is in this range."""
    assert least <= time.monotonic() - since <= most
