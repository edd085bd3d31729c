"""TLS: who is let in, who is not, and that the message names the cause."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme
from secured import PATIENCE, nats_presence, nats_server, refused, works

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)
LONG_AGO = (NOW - 3 * DAY, NOW - DAY)
NOT_YET = (NOW + DAY, NOW + 3 * DAY)
OF_NOW = (NOW - DAY, NOW + DAY)

Issue = Callable[..., "Files"]
Time = tuple[datetime.datetime, datetime.datetime]


class Files:
    """A certificate and its key, and how nats-server and we are told of them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate, self.key = folder / f"{name}.pem", folder / f"{name}.key"

    @property
    def server(self) -> str:
        return f'cert_file: "{self.certificate}", key_file: "{self.key}"'

    @property
    def client(self) -> dict[str, str]:
        return {"tls_cert_file": str(self.certificate), "tls_key_file": str(self.key)}


@pytest.fixture
def issue(tmp_path: Path) -> Issue:
    """Has an authority, which is made for it, issue a certificate."""
    authorities: dict[str, trustme.CA] = {}

    def issue(name: str, identity: str, authority: str = "ca", valid: Time = OF_NOW) -> Files:
        if authority not in authorities:
            authorities[authority] = trustme.CA()
            authorities[authority].cert_pem.write_to_path(tmp_path / f"{authority}.pem")
        issued = authorities[authority].issue_cert(identity, not_before=valid[0], not_after=valid[1])
        files = Files(tmp_path, name)
        issued.cert_chain_pems[0].write_to_path(files.certificate)
        issued.private_key_pem.write_to_path(files.key)
        return files

    return issue


@pytest.fixture
def server(issue: Issue) -> Files:
    return issue("server", "localhost")


@pytest.fixture
def ca(tmp_path: Path, server: Files) -> dict[str, Any]:
    return {"tls_ca_file": str(tmp_path / "ca.pem")}


def test_the_server_is_known(tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]) -> None:
    with nats_server(f"tls {{ {server.server} }}", tmp_path) as port:
        works(f"tls://localhost:{port}", **ca)
        works(f"nats://localhost:{port}", tls_required=True, **ca)
        works(f"nats://localhost:{port}", **ca)
        issue("other", "localhost", authority="another")
        for known in [{}, {"tls_ca_file": str(tmp_path / "another.pem")}]:
            assert "UnknownIssuer" in refused(f"tls://localhost:{port}", **known)
        message = refused(f"tls://127.0.0.1:{port}", **ca)
        assert 'not valid for name "127.0.0.1"' in message
        assert "localhost" in message


@pytest.mark.parametrize(("valid", "told"), [(LONG_AGO, "expired"), (NOT_YET, "not valid yet")])
def test_the_server_s_certificate_has_its_time(tmp_path: Path, issue: Issue, valid: Time, told: str) -> None:
    files = issue("server", "localhost", valid=valid)
    with nats_server(f"tls {{ {files.server} }}", tmp_path) as port:
        assert told in refused(f"tls://localhost:{port}", tls_ca_file=str(tmp_path / "ca.pem"))


def test_client_certificates(tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]) -> None:
    with nats_server(f'tls {{ {server.server}, ca_file: "{tmp_path}/ca.pem", verify: true }}', tmp_path) as port:
        url = f"tls://localhost:{port}"
        works(url, **ca, **issue("client", "client@example.org").client)
        assert "CertificateRequired" in refused(url, **ca)
        strangers = issue("stranger", "client@example.org", authority="another")
        message = refused(url, **ca, **strangers.client)
        assert "UnknownCA" in message
        assert "our certificate" in message
        old = issue("old", "client@example.org", valid=LONG_AGO)
        message = refused(url, **ca, **old.client)
        assert "CertificateExpired" in message
        assert "our certificate" in message


def test_files_that_are_not_what_they_should_be(
    tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]
) -> None:
    own, other = issue("client", "client@example.org"), issue("other", "client@example.org")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN NONSENSE-----\n")
    with nats_server(f"tls {{ {server.server} }}", tmp_path) as port:
        url = f"tls://localhost:{port}"
        for wrong in [str(nonsense), str(tmp_path / "missing.pem"), str(own.key)]:
            for right in [ca, {**ca, **own.client}]:
                for key in right:
                    if key != "tls_key_file" or wrong != str(own.key):
                        message = refused(url, **{**right, key: wrong})
                        assert key in message
                        assert wrong in message
        message = refused(url, **ca, **{**own.client, "tls_key_file": str(other.key)})
        assert "tls_cert_file" in message
        assert "tls_key_file" in message
        assert "tls_key_file" in refused(url, **ca, tls_cert_file=str(own.certificate))


def test_tls_first(tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]) -> None:
    with nats_server(f"tls {{ {server.server}, handshake_first: true }}", tmp_path) as port:
        works(f"tls://localhost:{port}", tls_first=True, **ca)
        issue("other", "localhost", authority="another")
        other = str(tmp_path / "another.pem")
        assert "UnknownIssuer" in refused(f"tls://localhost:{port}", tls_first=True, tls_ca_file=other)
        # Such a server waits for our first word, as we wait for its.
        with pytest.raises(nats_presence.Timeout):
            nats_presence.connect(f"tls://localhost:{port}", connect_timeout_ms=300, **ca)
    with nats_server(f"tls {{ {server.server} }}", tmp_path) as port:
        assert "TLS" in refused(f"tls://localhost:{port}", tls_first=True, **ca)


WAYS = {
    "scheme": ("tls", {}),
    "tls_required": ("nats", {"tls_required": True}),
    "tls_first": ("nats", {"tls_first": True}),
    "tls_ca_file": ("nats", {"tls_ca_file": "ca.pem"}),
}


@pytest.mark.parametrize("name", WAYS)
def test_tls_is_not_given_up_when_the_server_has_none(tmp_path: Path, ca: dict[str, Any], name: str) -> None:
    """As when somebody in between takes TLS out of what the server offers."""
    scheme, how = WAYS[name]
    options = {**how, **({} if name in ("scheme", "tls_required") else ca)}
    with nats_server("", tmp_path) as port:
        assert "does not speak TLS" in refused(f"{scheme}://localhost:{port}", **options)


@pytest.mark.parametrize("name", WAYS)
def test_who_takes_tls_out_gets_no_secret(ca: dict[str, Any], name: str) -> None:
    scheme, how = WAYS[name]
    options = {**how, **({} if name in ("scheme", "tls_required") else ca)}
    heard = b""

    def listen() -> None:
        nonlocal heard
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.settimeout(PATIENCE)
            connection.sendall(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}\r\n')
            while data := connection.recv(4096):
                heard += data
                if not data.startswith(b"\x16"):
                    connection.sendall(b"PONG\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        url = f"{scheme}://localhost:{listener.getsockname()[1]}"
        with pytest.raises((nats_presence.Disconnected, nats_presence.Timeout)):
            nats_presence.connect(url, user="me", password="s3cret", connect_timeout_ms=300, **options)
        thread.join()
    # A TLS handshake at most.
    assert heard[:1] in (b"", b"\x16")
    assert b"s3cret" not in heard
