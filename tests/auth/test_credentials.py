"""Ways to authenticate against nats-servers that require it; no output ever shows a secret."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nkeys
import pytest
from secured import ROOT, TIMEOUT, nats_presence, nats_server, refused, works

SECRET = "s3cret/with:odd@characters"
SECRET_IN_URL = quote(SECRET, safe="")


def new_key(kind: int) -> Any:
    """A key pair of a user, an account or an operator."""
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), kind)))


def text(seed_or_public: Any) -> str:
    return bytes(seed_or_public).decode()


def jwt(issuer: Any, subject: Any, name: str, nats: dict[str, Any], expires: int = 0) -> str:
    """A JWT in which the issuer makes these claims about the subject, as the tool nsc writes it."""

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    claims = {
        "iat": int(time.time()),
        "iss": text(issuer.public_key),
        "sub": text(subject.public_key),
        "name": name,
        "nats": {"version": 2, **nats},
        **({"exp": expires} if expires else {}),
    }
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).rstrip(b"=").decode()
    head = encode(b'{"typ":"JWT","alg":"ed25519-nkey"}')
    output = f"{head}.{encode(json.dumps(claims).encode())}"
    return f"{output}.{encode(issuer.sign(output.encode()))}"


class Operator:
    """An operator with an account: a server's configuration, and credentials of its users."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        operator = new_key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        no_limits = dict.fromkeys(["subs", "data", "payload", "imports", "exports", "conn", "leaf"], -1)
        account = jwt(operator, self._account, "tenant", {"type": "account", "limits": no_limits | {"wildcards": True}})
        self.config = f"""
            operator: {jwt(operator, operator, "operator", {"type": "operator"})}
            resolver: MEMORY
            resolver_preload: {{ {text(self._account.public_key)}: {account} }}"""

    def credentials(self, name: str, issuer: Any = None, expires: int = 0, **limits: Any) -> tuple[str, list[str]]:
        """A credentials file, and the secrets in it."""
        user = new_key(nkeys.PREFIX_BYTE_USER)
        rights = {"type": "user", "subs": -1, "data": -1, "payload": -1, **limits}
        token, seed = jwt(issuer or self._account, user, name, rights, expires), text(user.seed)
        file = self._folder / f"{name}.creds"
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
        return str(file), [token, seed]


def test_user_and_password(tmp_path: Path) -> None:
    with nats_server(f'authorization {{ user: me, password: "{SECRET}" }}', tmp_path) as port:
        works(f"nats://127.0.0.1:{port}", user="me", password=SECRET)
        works(f"nats://me:{SECRET_IN_URL}@127.0.0.1:{port}")
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}")
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}", user="you", password=SECRET)
        assert "authorization violation" in refused(f"nats://you:{SECRET_IN_URL}@127.0.0.1:{port}")
        # The second of two servers accepts us.
        works(f"nats://you:{SECRET_IN_URL}@127.0.0.1:{port},nats://me:{SECRET_IN_URL}@127.0.0.1:{port}")


def test_token(tmp_path: Path) -> None:
    with nats_server(f'authorization {{ token: "{SECRET}" }}', tmp_path) as port:
        works(f"nats://127.0.0.1:{port}", token=SECRET)
        works(f"nats://{SECRET_IN_URL}@127.0.0.1:{port}")
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}", token=SECRET + "x")


def test_nkey(tmp_path: Path) -> None:
    key, other = new_key(nkeys.PREFIX_BYTE_USER), new_key(nkeys.PREFIX_BYTE_USER)
    with nats_server(f"authorization {{ users: [ {{ nkey: {text(key.public_key)} }} ] }}", tmp_path) as port:
        works(f"nats://127.0.0.1:{port}", nkey_seed=text(key.seed))
        assert "authorization violation" in refused(f"nats://127.0.0.1:{port}", nkey_seed=text(other.seed))


def test_credentials_file(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    with nats_server(operator.config, tmp_path) as port:
        url = f"nats://127.0.0.1:{port}"
        works(url, creds_file=operator.credentials("user")[0])
        # The permissions in it apply, too.
        file, _ = operator.credentials("poor", pub={"deny": ["nobody"]})
        events: list[Any] = []
        with (
            contextlib.suppress(nats_presence.DisconnectedError),
            nats_presence.connect(url, creds_file=file, on_event=events.append) as conn,
        ):
            next(conn.stream("nobody", timeout_ms=200))
        assert any('Permissions Violation for Publish to "nobody"' in event.text for event in events)
        expired, _ = operator.credentials("old", expires=int(time.time()) - 60)
        stranger, _ = operator.credentials("stranger", issuer=new_key(nkeys.PREFIX_BYTE_ACCOUNT))
        for wrong in [{}, {"creds_file": expired}, {"creds_file": stranger}]:
            assert "authorization violation" in refused(url, **wrong)


def test_invalid_credentials_file_is_refused(tmp_path: Path) -> None:
    with nats_server("", tmp_path) as port:
        missing = tmp_path / "missing.creds"
        assert str(missing) in refused(f"nats://127.0.0.1:{port}", creds_file=str(missing))
        wrong = tmp_path / "wrong.creds"
        wrong.write_text(SECRET)
        assert str(wrong) in refused(f"nats://127.0.0.1:{port}", creds_file=str(wrong))


@contextlib.contextmanager
def agent(folder: Path, answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """An agent on a Unix socket, which answers each nonce. Yields the socket's path."""
    path = str(folder / f"agent-{next(numbers)}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, _ = listener.accept()
                    with conn, conn.makefile("rb") as reader:
                        conn.sendall(answer(reader.readline().removesuffix(b"\n")))

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)


numbers = itertools.count()


def test_agent_authenticates_each_attempt(tmp_path: Path) -> None:
    with nats_server(f'authorization {{ user: me, password: "{SECRET}" }}', tmp_path) as port:
        url = f"nats://127.0.0.1:{port}"
        with agent(tmp_path, lambda _: f"user me\npassword {SECRET}\n".encode()) as path:
            works(url, auth_socket=path)
        with agent(tmp_path, lambda _: b"user you\npassword x\n") as path:
            assert "authorization violation" in refused(url, auth_socket=path)
        with agent(tmp_path, lambda _: b"error the vault is sealed\n") as path:
            assert "the vault is sealed" in refused(url, auth_socket=path)
        for wrong in [b"", SECRET.encode(), b"\xff", b"signature " + SECRET.encode(), b"user " + b"x" * 70_000]:
            with agent(tmp_path, lambda _, wrong=wrong: wrong) as path:  # type: ignore[misc]
                message = refused(url, auth_socket=path)
                assert path in message
                assert "answer" in message or "signature" in message
                assert SECRET not in message
        assert "nobody-listens" in refused(url, auth_socket=str(tmp_path / "nobody-listens"))


def test_agent_signs_for_nkeys_and_jwts(tmp_path: Path) -> None:
    key = new_key(nkeys.PREFIX_BYTE_USER)
    with nats_server(f"authorization {{ users: [ {{ nkey: {text(key.public_key)} }} ] }}", tmp_path) as port:
        answer = f"nkey {text(key.public_key)}\nsignature "
        with agent(tmp_path, lambda nonce: answer.encode() + key.sign(nonce).hex().encode()) as path:
            works(f"nats://127.0.0.1:{port}", auth_socket=path)
    operator = Operator(tmp_path)
    with nats_server(operator.config, tmp_path) as port:
        _, (token, seed) = operator.credentials("agent")
        user = nkeys.from_seed(bytearray(seed.encode()))
        with agent(tmp_path, lambda nonce: f"jwt {token}\nsignature {user.sign(nonce).hex()}".encode()) as path:
            works(f"nats://127.0.0.1:{port}", auth_socket=path)


def test_documented_agent_works(tmp_path: Path) -> None:
    """The agent in docs/migrate.md, with other paths."""
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs/migrate.md").read_text(), re.DOTALL)[0]
    key = new_key(nkeys.PREFIX_BYTE_USER)
    (tmp_path / "user.nk").write_text(text(key.seed) + "\n")
    path = tmp_path / "auth"
    for documented, own in {"user.nk": tmp_path / "user.nk", "/run/my-worker/auth": path}.items():
        assert documented in program
        program = program.replace(documented, str(own))
    with nats_server(f"authorization {{ users: [ {{ nkey: {text(key.public_key)} }} ] }}", tmp_path) as port:
        process = subprocess.Popen([sys.executable, "-c", program])
        try:
            end = time.monotonic() + TIMEOUT
            while True:
                try:
                    works(f"nats://127.0.0.1:{port}", auth_socket=str(path))
                    break
                except nats_presence.PresenceError:
                    assert time.monotonic() < end, "the agent does not answer"
                    time.sleep(0.01)
        finally:
            process.kill()
            process.wait()


def test_unreachable_server_is_named() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        message = refused(f"nats://me:{SECRET_IN_URL}@127.0.0.1:{port}")
        assert f"127.0.0.1:{port}" in message
        assert "refused" in message


# Secrets --------------------------------------------------------------------------------------------------------------

# Runs in its own process, so that anything the library prints is seen as well: connects, loses the server, cannot
# reconnect, and prints every event. RUST_LOG is set for loggers that a dependency might build in.
SAYS_ALL = """
import json, sys, threading
import nats_presence
url, options = json.loads(sys.stdin.readline())
lost = threading.Event()
def show(event):
    print("event", event, event.text, flush=True)
    if "cannot connect" in event.text:
        lost.set()
try:
    with nats_presence.connect(url, on_event=show, reconnect_max_ms=60, **options) as conn:
        print("connected", conn, repr(conn), vars(conn) if hasattr(conn, "__dict__") else "", conn.stats(), flush=True)
        sys.stdin.readline()
        assert lost.wait(20)
        print("stats", conn.stats())
        try:
            next(conn.stream("nobody"))
        except nats_presence.PresenceError as error:
            print("stream", repr(error), error)
except nats_presence.PresenceError as error:
    print("refused", repr(error), error)
"""


@contextlib.contextmanager
def chatterbox(url: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "bindings/python"),
        "RUST_LOG": "trace",
        "RUST_BACKTRACE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SAYS_ALL],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin
    process.stdin.write(json.dumps([url, options]) + "\n")
    process.stdin.flush()
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def secrets_in(output: str, secrets: list[str]) -> list[str]:
    """The secrets, or halves of one, that the text shows."""
    parts = [part for secret in secrets for part in (secret, quote(secret, safe=""), secret[: len(secret) // 2])]
    return [part for part in parts if part in output]


def way(folder: Path, name: str) -> tuple[str, str, dict[str, str], list[str]]:
    """A way to authenticate: a server's configuration, the URL's credentials, options, and secrets."""
    if name == "credentials file":
        operator = Operator(folder)
        file, secrets = operator.credentials("user")
        return operator.config, "", {"creds_file": file}, secrets
    if name == "nkey":
        key = new_key(nkeys.PREFIX_BYTE_USER)
        seed = text(key.seed)
        return f"authorization {{ users: [ {{ nkey: {text(key.public_key)} }} ] }}", "", {"nkey_seed": seed}, [seed]
    password = f'authorization {{ user: me, password: "{SECRET}" }}'
    token = f'authorization {{ token: "{SECRET}" }}'
    return {
        "password": (password, "", {"user": "me", "password": SECRET}, [SECRET]),
        "password in the URL": (password, f"me:{SECRET_IN_URL}@", {}, [SECRET]),
        "token": (token, "", {"token": SECRET}, [SECRET]),
        "token in the URL": (token, f"{SECRET_IN_URL}@", {}, [SECRET]),
    }[name]


WAYS = ["password", "password in the URL", "token", "token in the URL", "nkey", "credentials file"]


@pytest.mark.parametrize("name", WAYS)
def test_secrets_are_never_shown(tmp_path: Path, name: str) -> None:
    config, before_host, options, secrets = way(tmp_path, name)
    with contextlib.ExitStack() as stack:
        with nats_server(config, tmp_path) as port:
            url = f"nats://{before_host}127.0.0.1:{port}"
            good = stack.enter_context(chatterbox(url, **options))
            assert good.stdout
            output = good.stdout.readline()
            while "connected" not in output.splitlines()[-1].split()[0]:
                output += good.stdout.readline() or pytest.fail(output)
        # The server is killed: the connection is lost and cannot be made again.
        rest, _ = good.communicate("\n", TIMEOUT)
        output += rest
        assert "cannot connect" in output
        assert "stream" in output
        # Another server refuses these secrets, and some that are malformed.
        with nats_server('authorization { user: other, password: "other" }', tmp_path) as port:
            for host in [f"127.0.0.1:{port}", f"127.0.0.1:{port}/path", "127.0.0.1:99999", "::1"]:
                bad = stack.enter_context(chatterbox(f"nats://{before_host}{host}", **options))
                refusal, _ = bad.communicate(timeout=TIMEOUT)
                assert "refused" in refusal
                output += refusal
            # With secrets that cannot be read.
            for option, value in options.items():
                if option == "creds_file":
                    Path(value).write_text(Path(value).read_text().replace("------END", "x------END"))
                elif option == "nkey_seed":
                    options[option] = value[:-1] + "!"
                bad = stack.enter_context(chatterbox(f"nats://127.0.0.1:{port}", **options))
                refusal, _ = bad.communicate(timeout=TIMEOUT)
                assert "refused" in refusal
                assert option in refusal or option not in ("nkey_seed", "creds_file")
                output += refusal
        assert secrets_in(output, secrets) == []
