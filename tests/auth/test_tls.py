"""TLS: which certificates and keys are accepted and refused, and that messages name the cause."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from secured import TIMEOUT, nats_presence, nats_server, refused, works

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)
LONG_AGO = (NOW - 3 * DAY, NOW - DAY)
NOT_YET = (NOW + DAY, NOW + 3 * DAY)
OF_NOW = (NOW - DAY, NOW + DAY)

Issue = Callable[..., "Files"]
Time = tuple[datetime.datetime, datetime.datetime]


class Files:
    """A certificate and its key, as a server's configuration and as our options."""

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
    """Has an authority, which is created for it, issue a certificate."""
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


def test_server_certificate_is_verified(tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]) -> None:
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


@pytest.mark.parametrize(("valid", "expected"), [(LONG_AGO, "expired"), (NOT_YET, "not valid yet")])
def test_expired_server_certificate_is_refused(tmp_path: Path, issue: Issue, valid: Time, expected: str) -> None:
    files = issue("server", "localhost", valid=valid)
    with nats_server(f"tls {{ {files.server} }}", tmp_path) as port:
        assert expected in refused(f"tls://localhost:{port}", tls_ca_file=str(tmp_path / "ca.pem"))


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


def test_wrong_files_are_refused(tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]) -> None:
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


def key_pem(key: Any, password: bytes = b"", form: Any = PrivateFormat.PKCS8) -> bytes:
    how = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, form, how)  # type: ignore[no-any-return]


def self_signed(key: Any, *, is_authority: bool = False, alternative: bool = True) -> bytes:
    """A self-signed certificate as `openssl req -x509` makes it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self-signed.test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), *OF_NOW)
    builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def test_unusable_keys_are_refused(tmp_path: Path, issue: Issue) -> None:
    """No server is needed: files are read first."""
    own = issue("client", "client@example.org")

    def refusal(**options: Any) -> str:
        files = {**own.client, **{name: str(path) for name, path in options.items()}}
        return refused("tls://localhost:1", **files)

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    p521 = ec.generate_private_key(ec.SECP521R1())
    message = refusal(
        tls_cert_file=file("p521.pem", self_signed(p521)),
        tls_key_file=file("p521.key", key_pem(p521)),
    )
    assert "p521.key" in message
    assert "P-521, which is not supported" in message
    assert "P-256" in message
    old = file("old.key", key_pem(p521, form=PrivateFormat.TraditionalOpenSSL))
    assert "P-521" in refusal(tls_key_file=old)
    small = file("small.key", key_pem(rsa.generate_private_key(65537, 1024)))
    assert "RSA of 2048" in refusal(tls_key_file=small)
    # Two ways to encrypt a key.
    for form in [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL]:
        message = refusal(tls_key_file=file("secret.key", key_pem(p521, b"hunter2", form)))
        assert "encrypted" in message
        assert "openssl pkey" in message
    assert "do not belong together" in refusal(tls_key_file=issue("other", "client@example.org").key)
    # The right key, and files that are no keys.
    assert "its first section is CERTIFICATE" in refusal(tls_key_file=own.certificate)
    assert "PRIVATE KEY" in refusal(tls_cert_file=own.key)
    assert "PRIVATE KEY" in refusal(tls_ca_file=own.key)
    assert "directory" in refusal(tls_key_file=tmp_path)
    assert "directory" in refusal(tls_ca_file=tmp_path)
    assert "empty" in refusal(tls_cert_file=file("empty.pem", b"\n"))
    assert "DER" in refusal(tls_cert_file=file("client.der", x509.load_pem_x509_certificate(
        own.certificate.read_bytes()).public_bytes(Encoding.DER)))  # fmt: skip
    assert "cannot be read" in refusal(tls_key_file=file("cut.key", own.key.read_bytes()[:-40]))
    broken = own.certificate.read_bytes().replace(b"MII", b"!!!", 1)
    assert "cannot be read" in refusal(tls_cert_file=file("broken.pem", broken))
    order = file("order.pem", (tmp_path / "ca.pem").read_bytes() + own.certificate.read_bytes())
    assert "number 2 in it" in refusal(tls_cert_file=order)


@pytest.mark.parametrize(
    ("is_authority", "alternative", "curve", "expected"),
    [
        (True, True, ec.SECP256R1(), "CA:FALSE"),
        (False, False, ec.SECP256R1(), 'not valid for name "localhost"'),
        (False, True, ec.SECP521R1(), "P-384"),
        (False, True, ec.SECP256R1(), ""),
    ],
    ids=["authority", "only a common name", "P-521", "right"],
)
def test_self_signed_certificates(
    tmp_path: Path, is_authority: bool, alternative: bool, curve: Any, expected: str
) -> None:
    key = ec.generate_private_key(curve)
    (tmp_path / "self.pem").write_bytes(self_signed(key, is_authority=is_authority, alternative=alternative))
    (tmp_path / "self.key").write_bytes(key_pem(key))
    with nats_server(f"tls {{ {Files(tmp_path, 'self').server} }}", tmp_path) as port:
        own = {"tls_ca_file": str(tmp_path / "self.pem")}
        if expected:
            assert expected in refused(f"tls://localhost:{port}", **own)
        else:
            works(f"tls://localhost:{port}", **own)
            assert "set tls_ca_file" in refused(f"tls://localhost:{port}")


def test_renewed_authority_of_the_same_name(tmp_path: Path, issue: Issue, server: Files) -> None:
    """The authority was renewed under the same name, and the option still names the old file."""
    key = ec.generate_private_key(ec.SECP256R1())
    known = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    builder = x509.CertificateBuilder(
        known.subject, known.subject, key.public_key(), x509.random_serial_number(), *OF_NOW
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (tmp_path / "former.pem").write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    with nats_server(f"tls {{ {server.server} }}", tmp_path) as port:
        message = refused(f"tls://localhost:{port}", tls_ca_file=str(tmp_path / "former.pem"))
        assert "tls_ca_file" in message


def test_tls_first(tmp_path: Path, issue: Issue, server: Files, ca: dict[str, Any]) -> None:
    with nats_server(f"tls {{ {server.server}, handshake_first: true }}", tmp_path) as port:
        works(f"tls://localhost:{port}", tls_first=True, **ca)
        issue("other", "localhost", authority="another")
        other = str(tmp_path / "another.pem")
        assert "UnknownIssuer" in refused(f"tls://localhost:{port}", tls_first=True, tls_ca_file=other)
        # Such a server waits for our first bytes, as we wait for its first line.
        with pytest.raises(nats_presence.PresenceTimeoutError):
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
def test_server_without_tls_is_refused(tmp_path: Path, ca: dict[str, Any], name: str) -> None:
    """As when an attacker strips TLS from the server's INFO."""
    scheme, how = WAYS[name]
    options = {**how, **({} if name in ("scheme", "tls_required") else ca)}
    with nats_server("", tmp_path) as port:
        assert "does not speak TLS" in refused(f"{scheme}://localhost:{port}", **options)


@pytest.mark.parametrize("name", WAYS)
def test_tls_stripping_reveals_no_secret(ca: dict[str, Any], name: str) -> None:
    scheme, how = WAYS[name]
    options = {**how, **({} if name in ("scheme", "tls_required") else ca)}
    received = b""

    def listen() -> None:
        nonlocal received
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.settimeout(TIMEOUT)
            connection.sendall(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}\r\n')
            while data := connection.recv(4096):
                received += data
                if not data.startswith(b"\x16"):
                    connection.sendall(b"PONG\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        url = f"{scheme}://localhost:{listener.getsockname()[1]}"
        with pytest.raises((nats_presence.DisconnectedError, nats_presence.PresenceTimeoutError)):
            nats_presence.connect(url, user="me", password="s3cret", connect_timeout_ms=300, **options)
        thread.join()
    # A TLS handshake at most.
    assert received[:1] in (b"", b"\x16")
    assert b"s3cret" not in received
