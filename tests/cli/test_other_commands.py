"""`offline`, `watch`, `stats`, `bench`, help, completions, manual pages; and the options of the connection."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import nkeys
import pytest
import trustme
from conftest import PROGRAM, Run, Start
from harness import ROOT, Server

CLI = ROOT / "build/cli"
SECRET = "hunter2"
COMMANDS = ["serve", "request", "offline", "watch", "stats", "bench", "completions"]
DISCONNECTED = 18


def test_watch_prints_announcements_and_the_connection(start: Start, run: Run, server: Server) -> None:
    watch = start("watch")
    assert watch.line() == b"watching; Ctrl-C ends\n"
    assert run("offline", "client-7", "client 8").returncode == 0
    assert [watch.line(), watch.line()] == [b"offline client-7\n", b"offline client 8\n"]
    server.kill()
    assert watch.line().startswith(b"disconnected: ")
    server.start()
    while not (line := watch.line()).startswith(b"connected "):
        assert line.startswith(b"log: ")
    watch.signal(signal.SIGINT)
    assert watch.end() == -signal.SIGINT


def test_watch_sees_a_client_that_leaves(start: Start, serve: Start) -> None:
    serve("yes", "--", "yes")
    watch = start("watch")
    watch.line()
    request = start("request", "yes", "--client", "me")
    request.line()
    request.signal(signal.SIGINT)
    assert watch.line() == b"offline me\n"


def test_offline_fails_without_a_server(run: Run, server: Server) -> None:
    server.kill()
    done = run("offline", "client-1")
    assert done.returncode == DISCONNECTED
    assert b"127.0.0.1" in done.stderr


def test_stats(run: Run, serve: Start) -> None:
    done = run("stats", "--count", "2", "--interval", "10ms")
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("connected=1 connects=1 ")
    worker = serve("echo", "--stats", "20ms", "--", "echo", "hello")
    assert run("request", "echo").returncode == 0
    worker.wait_for(r" requests=1 .* messages_out=\d+")


def test_bench(run: Run) -> None:
    done = run("bench", "--time", "200ms", "--size", "100")
    assert (done.returncode, done.stderr) == (0, b"")
    figures = [float(figure) for figure in re.findall(r" ([\d.]+) (?:/s|ms)", done.stdout.decode())]
    assert len(figures) == 5
    assert all(figure > 0 for figure in figures)
    assert "messages of 100 bytes" in done.stdout.decode()


# Help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["all", *COMMANDS])
def test_help_fits_a_terminal_and_has_no_colours_elsewhere(run: Run, command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout
    assert b"Usage: nats-presence" in done.stdout
    before_options = done.stdout.decode().split("Usage:")[0]
    assert max(map(len, before_options.splitlines())) <= 100


def test_help_has_colours_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([PROGRAM, "-h"], stdout=theirs, env=environment) as process:
        os.close(theirs)
        output = b""
        with suppress(OSError):
            while piece := os.read(ours, 4096):
                output += piece
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[" in output


def test_exit_codes_are_documented(run: Run) -> None:
    text = run("--help").stdout.decode().split("Exit codes:")[1]
    codes = dict(re.findall(r"^  (\d+) +(.+)$", text, re.MULTILINE))
    assert codes["12"] == "client is offline"
    assert codes["20"] == "nobody serves the subject"
    assert list(codes) == ["0", "1", "2", *map(str, range(12, 26)), "130"]


def test_completions_and_manual_pages_exist() -> None:
    files = {
        "bash": CLI / "share/bash-completion/completions/nats-presence",
        "zsh": CLI / "share/zsh/site-functions/_nats-presence",
        "fish": CLI / "share/fish/vendor_completions.d/nats-presence.fish",
    }
    for shell, file in files.items():
        text = file.read_text()
        assert all(command in text for command in COMMANDS), shell
        assert "--grace" in text or "-l grace" in text, shell
    subprocess.run(["bash", "-n", files["bash"]], check=True)
    for name in ["", *(f"-{command}" for command in COMMANDS)]:
        text = (CLI / f"share/man/man1/nats-presence{name}.1").read_text()
        assert ".TH nats-presence" in text.replace("\\-", "-")
    assert not list((CLI / "share/man/man1").glob("*-man.1"))
    script = 'source "$0"; COMP_WORDS=(nats-presence serve --gr); COMP_CWORD=2; '
    script += 'words=($(complete -p nats-presence)); ${words[-2]} nats-presence --gr serve; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script, files["bash"]], capture_output=True, text=True, check=True)
    assert done.stdout == "--grace\n"


@pytest.mark.parametrize("arguments", [["--help"], ["completions", "bash"]])
def test_closed_standard_output_is_a_quiet_end(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, timeout=20, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_standard_error_is_no_panic(server: Server) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([PROGRAM, "-s", server.url, "request", "nothing"], stderr=writer, timeout=20, check=False)
    os.close(writer)
    assert done.returncode == 20


# Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: nats-presence"),
        (["nonsense"], "unrecognized subcommand 'nonsense'"),
        (["serve", "work"], "-- <COMMAND>..."),
        (["serve", "work", "--max", "0", "--", "true"], "invalid value '0' for '--max <NUMBER>'"),
        (["serve", "work", "--grace", "5 s", "--", "true"], "such as 500ms or 2s"),
        (["serve", "a b", "--", "true"], 'subject "a b"'),
        (["request", "a.*"], "wildcard"),
        (["request", "work", "-H", "nonsense"], "must be NAME:VALUE"),
        (["request", "work", "-H", "Connect-ID: me"], "is reserved"),
        (["request", "work", "--client", "a\nb"], "control character"),
        (["request", "work", "-o", "nonsense=1"], 'unknown option "nonsense"'),
        (["request", "work", "-o", "lanes=maybe"], 'option lanes is "maybe": it must be true or false'),
        (["request", "work", "--nkey", "/no/such/file"], "/no/such/file: No such file"),
        (["request", "work", "--nkey", "/dev/null"], "no line begins with S"),
        (["request", "work", "--creds", "/no/such/file"], "/no/such/file"),
        (["serve", "work", "-o", "retries=3", "--", "true"], "retries is an option of a request"),
        (["offline", ""], "a client's id is empty"),
        (["-s", "http://x", "stats"], "http"),
    ],
)
def test_wrong_arguments_have_clear_messages(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", SECRET, "stats"],
        ["-o", f"pasword={SECRET}", "stats"],
        ["-o", f"password={SECRET}", "-o", "user=x", "stats", "--count", "1"],
        ["-s", f"nats://user:{SECRET}@127.0.0.1:1", "stats"],
        ["-s", f"nats://user:{SECRET}@127.0.0.1:nonsense", "stats"],
        ["-s", f"http://{SECRET}@127.0.0.1", "stats"],
        ["-o", f"nkey_seed=S{SECRET}", "stats"],
        ["--help"],
        ["serve", "--help"],
        ["serve"],
    ],
)
def test_secrets_are_not_printed(run: Run, server: Server, arguments: list[str]) -> None:
    server.kill()
    secrets = {
        "NATS_PASSWORD": SECRET,
        "NATS_TOKEN": SECRET,
        "NATS_USER": "x",
        "NATS_URL": f"nats://x:{SECRET}@127.0.0.1:1",
    }
    for environment in [{}, secrets]:
        done = run(*arguments, environment=environment)
        assert SECRET.encode() not in done.stdout + done.stderr
        assert done.stdout + done.stderr


def is_accepted(server: Server, *arguments: str, **environment: str) -> bool:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
    command = [str(PROGRAM), "-s", server.url, "stats", "--count", "1", *arguments]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, timeout=30, check=False)
    assert done.returncode in {0, DISCONNECTED}, done.stderr
    return done.returncode == 0


def test_user_and_password_and_token() -> None:
    server = Server("--user", "me", "--pass", SECRET)
    try:
        assert is_accepted(server, NATS_USER="me", NATS_PASSWORD=SECRET)
        assert is_accepted(server, "--user", "me", "--password", SECRET)
        assert not is_accepted(server, "--user", "me", "--password", "wrong")
        assert not is_accepted(server)
    finally:
        server.kill()
    server = Server("--auth", SECRET)
    try:
        assert is_accepted(server, NATS_TOKEN=SECRET)
        assert is_accepted(server, "-o", f"token={SECRET}")
        assert not is_accepted(server)
    finally:
        server.kill()


def test_nkey_and_tls_files(tmp_path: Path) -> None:
    authority = trustme.CA()
    for name, certificate in [
        ("server", authority.issue_cert("127.0.0.1")),
        ("me", authority.issue_cert("me@example.org")),
    ]:
        certificate.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pair = nkeys.from_seed(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER))
    (tmp_path / "seed").write_bytes(b"# a comment\n" + pair.seed + b"\n")
    (tmp_path / "nats.conf").write_text(
        f"""
        authorization {{ users: [{{ nkey: {pair.public_key.decode()} }}] }}
        tls {{ cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.key"
               ca_file: "{tmp_path}/ca.pem", verify: true }}
        """
    )
    server = Server("-c", str(tmp_path / "nats.conf"))
    try:
        tls = ["--tlsca", f"{tmp_path}/ca.pem", "--tlscert", f"{tmp_path}/me.pem", "--tlskey", f"{tmp_path}/me.key"]
        assert is_accepted(server, *tls, "--nkey", f"{tmp_path}/seed")
        assert is_accepted(server, *tls, NATS_NKEY=f"{tmp_path}/seed")
        assert not is_accepted(server, *tls)
        assert not is_accepted(server, *tls[:2], "--nkey", f"{tmp_path}/seed")
    finally:
        server.kill()
