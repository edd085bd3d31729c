"""A nats-server that keeps its port when it is restarted, and programs that end with their test.

Tests marked `long` run with `-m long` only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "wire"))

from harness import Command, Connect, Server, Shell, build_c, steady_port
from proxy import Proxy
from scene import Scene


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes its time; run with -m long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def shell_program() -> Command:
    return build_c("shell.c")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(port=steady_port())
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.let_go()


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
def scene(server: Server) -> Iterator[Scene]:
    with Scene(server.url) as scene:
        yield scene
