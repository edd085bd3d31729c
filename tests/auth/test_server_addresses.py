"""Servers reached by address: a name with several addresses, and those that other servers advertise."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from secured import BUILD, TIMEOUT, environment, nats_presence, nats_server, run, steady_port

NAME = "servers.test"
CONNECT = """
import json, sys
import nats_presence
url, options = sys.argv[1], json.loads(sys.argv[2])
try:
    with nats_presence.connect(url, **options) as conn:
        try:
            next(conn.stream("nobody"))
        except nats_presence.NoRespondersError:
            print("connected")
except nats_presence.PresenceError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def preload() -> str:
    library = BUILD / "names.so"
    source = Path(__file__).resolve().parent / "names.c"
    run("cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC",
        "-o", str(library), str(source))  # fmt: skip
    return str(library)


def connect(
    preload: str, addresses: list[str], url: str, system: dict[str, str] | None = None, /, **options: Any
) -> str:
    """Connects in a process in which NAME has these addresses; returns the result."""
    names = {"LD_PRELOAD": preload, "NAME": NAME, "NAME_ADDRESSES": " ".join(addresses), **(system or {})}
    command = [sys.executable, "-c", CONNECT, url, json.dumps(options)]
    done = subprocess.run(
        command, env={**os.environ, **environment(), **names}, text=True, capture_output=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


@contextlib.contextmanager
def silent(addresses: list[str], port: int) -> Iterator[None]:
    """Accepts connections at these addresses and never answers."""
    with contextlib.ExitStack() as stack:
        for address in addresses:
            stack.enter_context(socket.create_server((address, port)))
        yield


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return authority


def certificate(folder: Path, authority: trustme.CA, *names: str) -> str:
    issued = authority.issue_cert(*names)
    issued.cert_chain_pems[0].write_to_path(folder / f"{names[0]}.pem")
    issued.private_key_pem.write_to_path(folder / f"{names[0]}.key")
    return f'cert_file: "{folder}/{names[0]}.pem", key_file: "{folder}/{names[0]}.key"'


DEAD, LIVE = [f"127.0.0.{n}" for n in range(2, 7)], "127.0.0.1"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_connects_although_most_addresses_are_dead(
    tmp_path: Path, preload: str, authority: trustme.CA, tls: bool
) -> None:
    """More addresses than fit into the timeout one after the other."""
    config = f"tls {{ {certificate(tmp_path, authority, NAME)} }}" if tls else ""
    with nats_server(config, tmp_path) as port, silent(DEAD, port):
        options = {"tls_ca_file": str(tmp_path / "ca.pem")} if tls else {}
        url = f"nats://{NAME}:{port}"
        assert connect(preload, [*DEAD, LIVE], url, connect_timeout_ms=2000, **options) == "connected\n"


def test_certificate_is_checked_against_the_name(tmp_path: Path, preload: str, authority: trustme.CA) -> None:
    """A certificate that names only an address is not one of the requested name."""
    with nats_server(f"tls {{ {certificate(tmp_path, authority, LIVE)} }}", tmp_path) as port:
        ca = str(tmp_path / "ca.pem")
        output = connect(preload, ["127.0.0.2", LIVE], f"tls://{NAME}:{port}", tls_ca_file=ca)
        assert f'not valid for name "{NAME}"' in output


def test_sni_names_the_server(tmp_path: Path, preload: str, authority: trustme.CA) -> None:
    pairs = ", ".join(f"{{ {certificate(tmp_path, authority, name)} }}" for name in ["other.test", NAME])
    with nats_server(f"tls {{ certs: [ {pairs} ] }}", tmp_path) as port:
        ca = str(tmp_path / "ca.pem")
        output = connect(preload, [LIVE, "127.0.0.2"], f"tls://{NAME}:{port}", tls_ca_file=ca)
        assert output == "connected\n"


def test_system_authorities_are_trusted(tmp_path: Path, preload: str, authority: trustme.CA) -> None:
    with nats_server(f"tls {{ {certificate(tmp_path, authority, NAME)} }}", tmp_path) as port, silent(DEAD, port):
        system = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        url = f"tls://{NAME}:{port}"
        output = connect(preload, [*DEAD, LIVE], url, system, connect_timeout_ms=2000)
        assert output == "connected\n"
        assert "UnknownIssuer" in connect(preload, [LIVE, "127.0.0.7"], url)


@contextlib.contextmanager
def cluster(folder: Path, tls: str) -> Iterator[tuple[int, contextlib.ExitStack]]:
    """Two servers that know each other by address; yields the first one's port and a function that stops it."""
    routes = [steady_port(), steady_port()]
    known = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
    with contextlib.ExitStack() as second, contextlib.ExitStack() as first:
        ports = []
        for name, route, stack in [("first", routes[0], first), ("second", routes[1], second)]:
            own = folder / name
            own.mkdir()
            config = f"{tls}\ncluster {{ name: test, listen: 127.0.0.1:{route}, routes: [{known}] }}"
            ports.append(stack.enter_context(nats_server(config, own)))
        # It advertises the second server to clients once they have connected to each other.
        deadline = time.monotonic() + TIMEOUT
        while f":{ports[1]}" not in info(ports[0]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield ports[0], first


def info(port: int) -> str:
    """The first line that a server sends."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile() as lines:
        return lines.readline()


@pytest.mark.parametrize("names", [["localhost"], ["localhost", "127.0.0.1"]], ids=["name", "name and address"])
def test_advertised_address_may_show_the_known_name(tmp_path: Path, authority: trustme.CA, names: list[str]) -> None:
    with cluster(tmp_path, f"tls {{ {certificate(tmp_path, authority, *names)} }}") as (port, first):
        connected = threading.Semaphore(0)
        texts: list[str] = []

        def on_event(event: Any) -> None:
            texts.append(event.text)
            if event.kind == "connected":
                connected.release()

        options = {"tls_ca_file": str(tmp_path / "ca.pem"), "on_event": on_event, "reconnect_max_ms": 200}
        with nats_presence.connect(f"tls://localhost:{port}", **options) as conn:
            first.close()
            assert connected.acquire(timeout=TIMEOUT), texts
            with pytest.raises(nats_presence.NoRespondersError):
                next(conn.stream("nobody", retries=50, retry_delay_ms=20))
