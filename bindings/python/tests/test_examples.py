"""Runs the programs of the README and of examples/ without changes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LIMIT, PACKAGE, environment
from test_documented_hosts import vanish

import nats_presence

BLOCKS = re.findall(r"^```python\n(.*?)^```", (PACKAGE / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
SYNC_WORKER, SYNC_GATEWAY, AIO_WORKER, AIO_GATEWAY = BLOCKS


@contextmanager
def started(program: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, program], env=environment(PYTHONUNBUFFERED="1", **env), stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("worker", [SYNC_WORKER, AIO_WORKER], ids=["sync", "asyncio"])
@pytest.mark.parametrize("gateway", [SYNC_GATEWAY, AIO_GATEWAY], ids=["sync", "asyncio"])
def test_readme_programs(url: str, tmp_path: Path, worker: str, gateway: str) -> None:
    assert max(len(block.splitlines()) for block in BLOCKS) <= 20
    (tmp_path / "worker.py").write_text(worker)
    (tmp_path / "gateway.py").write_text(gateway)
    with started(tmp_path / "worker.py", NATS_URL=url), nats_presence.connect(url) as conn:
        assert next(conn.stream("answers", retries=1000, retry_delay_ms=10)) == b"piece 0"
        with started(tmp_path / "gateway.py", NATS_URL=url) as process:
            out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert out.splitlines() == [f"piece {number}" for number in range(100)]


def request(address: tuple[str, int], text: str) -> socket.socket:
    connection = socket.create_connection(address, timeout=LIMIT)
    connection.sendall(text.replace("\n", "\r\n").encode())
    return connection


def ask(address: tuple[str, int], client_id: str) -> str:
    text = f"POST /ask HTTP/1.1\nX-Connect-ID: {client_id}\nContent-Length: 2\n\nhi"
    with request(address, text) as connection:
        return connection.makefile().readline().strip()


def test_example_worker_and_gateway(url: str) -> None:
    """A client that stays gets the complete answer. The worker of a client that leaves stops."""
    env = {"NATS_URL": url, "SUBJECT": "questions", "QUEUE": "q", "PORT": "0"}
    worker_program = started(PACKAGE / "examples/worker.py", PIECES="30", DELAY="0.02", **env)
    with worker_program as worker, started(PACKAGE / "examples/gateway.py", **env) as gateway:
        assert line(worker) == "serving questions"
        port = int(line(gateway).rsplit(":", 1)[1])
        address = ("127.0.0.1", port)
        assert ask(address, "unknown") == "HTTP/1.1 409 Conflict"
        for leaves in (False, True):
            with request(address, "GET /events HTTP/1.1\n\n") as connection:
                lines = connection.makefile()
                while not (got := lines.readline()).startswith("data: "):
                    pass
                client_id = got.removeprefix("data: ").strip()
                assert ask(address, client_id) == "HTTP/1.1 202 Accepted"
                pieces = []
                while got and "event: end" not in got:
                    got = lines.readline()
                    if got.startswith("data: piece"):
                        pieces.append(got.strip())
                        if leaves:
                            break
                lines.close()
            if leaves:
                assert re.fullmatch(rf"{client_id}: stopped after \d+: client is offline", line(worker))
            else:
                assert pieces == [f"data: piece {number} of hi" for number in range(30)]
                assert line(worker) == f"{client_id}: sent all 30"
                assert line(gateway) == f"{client_id}: forwarded all 30"
            assert line(gateway) == f"{client_id}: left" or leaves
        worker.terminate()
        assert worker.wait(LIMIT) == 0


FORGED = ["one", "", "event: evil", "data: x", "", "event: evil", "", "event: evil"]


def test_a_message_cannot_forge_an_event(url: str) -> None:
    """The gateway turns every line break that a browser recognises into a new data line."""
    env = {"NATS_URL": url, "SUBJECT": "questions", "PORT": "0"}
    with nats_presence.connect(url) as conn, started(PACKAGE / "examples/gateway.py", **env) as gateway:
        conn.service("questions")(
            lambda request, sender: sender.send("one\n\nevent: evil\rdata: x\r\revent: evil\r\n\r\nevent: evil")
        )
        address = ("127.0.0.1", int(line(gateway).rsplit(":", 1)[1]))
        with request(address, "GET /events HTTP/1.1\n\n") as connection:
            reader = connection.makefile("rb")
            while not (got := reader.readline()).startswith(b"data: "):
                pass
            assert ask(address, got[6:].decode().strip()) == "HTTP/1.1 202 Accepted"
            got = b""
            while b"event: end" not in got:
                got += reader.readline()
            reader.close()
    events = [re.split(b"\r\n|\r|\n", event) for event in got.split(b"\n\n") if b"event: message" in event]
    assert events == [[b"event: message", *(b"data: " + text.encode() for text in FORGED)]]


def test_a_client_that_vanishes_is_detected(url: str) -> None:
    """The client sends no FIN, and no longer acknowledges data."""
    env = {"NATS_URL": url, "PORT": "0", "KEEPALIVE": "0.3"}
    with started(PACKAGE / "examples/gateway.py", **env) as gateway:
        address = ("127.0.0.1", int(line(gateway).rsplit(":", 1)[1]))
        with request(address, "GET /events HTTP/1.1\n\n") as connection:
            reader = connection.makefile()
            while reader.readline() != ": keep-alive\n":
                pass
            vanish(connection)
            assert line(gateway).endswith(": left")
            reader.close()


def test_pip_install_is_complete(tmp_path: Path) -> None:
    """pip installs exactly the files of the package."""
    source = shutil.copytree(PACKAGE, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", tmp_path / "site", source], check=True)
    ours = {path.name for path in (PACKAGE / "nats_presence").iterdir() if path.suffix in (".py", ".typed")}
    installed = {path.name for path in (tmp_path / "site/nats_presence").iterdir() if path.suffix in (".py", ".typed")}
    assert installed == ours
    code = "import nats_presence, importlib.metadata as m; print(m.version('nats-presence'), nats_presence.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert out.stdout.split() == [nats_presence.__version__, str(tmp_path / "site/nats_presence/__init__.py")]
