"""A nats-server, our library in its own process (shell), and a peer that uses none of our code (raw)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from harness import Command, Connect, Server, Shell, build_c
from proxy import Proxy
from raw import RawPeer


@pytest.fixture(scope="session")
def shell_program() -> Command:
    return build_c("shell.c")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def connect(shell_program: Command, server: Server) -> Iterator[Connect]:
    """Starts a process that uses our library, connected to nats-server or to another URL."""
    with ExitStack() as shells:

        def connect(url: str = "", *options: str) -> Shell:
            shell = shells.enter_context(Shell(shell_program))
            assert isinstance(shell, Shell)
            shell.do(" ".join(["connect", url or server.url, *options]))
            return shell

        yield connect


@pytest.fixture
def raw(server: Server) -> Iterator[RawPeer]:
    peer = RawPeer(server.port)
    yield peer
    peer.close()


@pytest.fixture
def proxy(server: Server) -> Proxy:
    return Proxy(server.port)
