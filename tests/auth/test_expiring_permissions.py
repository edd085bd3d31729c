"""A worker that stays silent for long before it answers: permissions that expire meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from secured import ROOT, TIMEOUT, nats_presence, nats_server

CONFIGS = ROOT / "docs/nats-server"
ENVIRONMENT = {"GATEWAY_PASSWORD": "of-gateways", "WORKER_PASSWORD": "of-workers"}
SILENCE = 0.7
"""Seconds; permissions expire after 200 ms."""


class Worker:
    """A worker that answers after some silence; `ends` has the result of each of its senders."""

    def __init__(self, conn: Any) -> None:
        self.ends: list[str] = []
        self.ended = threading.Semaphore(0)

        @conn.service("llm.slow", queue="workers")
        def slow(request: Any, sender: Any) -> None:
            # A client that left would end the wait; none does.
            assert not threading.Event().wait(SILENCE)
            try:
                sender.send("late")
                # Until nats-server's error has arrived.
                while not sender.closed and request.data == b"long":
                    sender.send("more")
                self.ends.append("went on")
                sender.end()
            except nats_presence.PresenceError as error:
                self.ends[-1:] = [type(error).__name__]
            self.ended.release()


@contextlib.contextmanager
def processes(config: str, folder: Path) -> Iterator[tuple[Any, Worker]]:
    with nats_server(config, folder, ENVIRONMENT) as port, contextlib.ExitStack() as stack:
        worker, gateway = (
            stack.enter_context(
                nats_presence.connect(f"nats://{user}:of-{user}s@127.0.0.1:{port}", lanes=False, **options)
            )
            for user, options in [
                ("worker", {"inbox_prefix": "_INBOX.worker", "announce": "never"}),
                ("gateway", {"inbox_prefix": "_INBOX.gateway"}),
            ]
        )
        yield gateway, Worker(worker)


def test_expired_allow_responses_stops_the_sender(tmp_path: Path) -> None:
    """nats-server reports it, and the sender stops."""
    config = """authorization { users: [
        { user: gateway, password: of-gateways }
        { user: worker, password: of-workers, permissions: {
            publish: ["_INBOX.worker.>"], subscribe: ["llm.>", "client.offline", "_INBOX.worker.>"]
            allow_responses: { max: -1, expires: "200ms" } } }
    ] }"""
    with processes(config, tmp_path) as (gateway, worker):
        with pytest.raises(nats_presence.PresenceTimeoutError):
            list(gateway.stream("llm.slow", b"long", timeout_ms=2500))
        assert worker.ended.acquire(timeout=TIMEOUT)
        assert worker.ends == ["DisconnectedError"]


def test_expired_response_threshold_times_out(tmp_path: Path) -> None:
    """nats-server reports nothing: the gateway needs a timeout, and the threshold must be long enough."""
    config = (CONFIGS / "two-accounts.conf").read_text()
    right = 'response_threshold: "1h"'
    assert right in config
    for threshold, comes in [('response_threshold: "200ms"', False), (right, True)]:
        with processes(config.replace(right, threshold), tmp_path) as (gateway, worker):
            stream = gateway.stream("llm.slow", timeout_ms=2500)
            if comes:
                assert list(stream) == [b"late"]
            else:
                with pytest.raises(nats_presence.PresenceTimeoutError):
                    list(stream)
            assert worker.ended.acquire(timeout=TIMEOUT)
            assert worker.ends == ["went on"]
