"""`serve` and `request`: what goes in comes out, and each end is noticed at the other one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import nats
import pytest
from conftest import PROGRAM, Process, Reports, Run, Start, wait_for_exit
from harness import TIMEOUT, Server

INTERRUPTED = 128 + signal.SIGINT
# Statuses, as `nats-presence --help` lists them.
OFFLINE, DISCONNECTED, PEER_GONE, NO_RESPONDERS, BUSY, TIMED_OUT, REMOTE = 12, 18, 19, 20, 21, 22, 23


def reporting(reports: Reports, text: str) -> list[str]:
    """A shell command in which $R is the pipe for reports."""
    return ["--", "sh", "-c", f"R={reports.path}; {text}"]


# Reports its process id and then SIGTERM; prints one line.
POLITE = "trap 'echo TERM > $R; exit' TERM; echo $$ > $R; echo ready; while :; do sleep 0.05; done"


def test_request_is_the_input_and_lines_are_messages(serve: Start, run: Run) -> None:
    serve("upper", "--", "tr", "a-z", "A-Z")
    done = run("request", "upper", "one two")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ONE TWO\n", b"")
    done = run("request", "upper", "-", data=b"one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, b"ONE\nTWO\n")
    done = run("request", "upper")
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("lanes", ["true", "false"])
def test_output_of_any_kind_arrives(serve: Start, run: Run, lanes: str) -> None:
    output = rb"a\n\n\377\000b\r\n" + b"x" * 100_000 + rb"\nend"
    serve("lines", "-o", f"lanes={lanes}", "--", "printf", output.decode())
    done = run("request", "lines")
    assert done.stdout == b"a\n\n\xff\0b\r\n" + b"x" * 100_000 + b"\nend\n", "the last line gets its newline"
    assert done.returncode == 0


def test_raw_output_is_not_changed(serve: Start, run: Run) -> None:
    serve("copy", "--raw", "--", "cat")
    data = os.urandom(700_000)
    done = run("request", "copy", "--raw", "-", data=data)
    assert (done.returncode, done.stdout) == (0, data)


def test_command_need_not_read_a_large_request(serve: Start, run: Run) -> None:
    serve("deaf", "--", "echo", "hello")
    done = run("request", "deaf", "-", data=b"x" * 900_000)
    assert (done.returncode, done.stdout) == (0, b"hello\n")


def test_line_longer_than_a_message_is_an_error(serve: Start, run: Run) -> None:
    serve("long", "--", "sh", "-c", 'head -c "$(cat)" /dev/zero | tr "\\0" x')
    limit = (1 << 20) - 64
    done = run("request", "long", str(limit))
    assert (done.returncode, len(done.stdout)) == (0, limit + 1)
    done = run("request", "long", "50000000")
    assert done.returncode == REMOTE
    assert f"longer than {limit} bytes; serve with --raw" in done.stderr.decode()


def test_command_knows_client_and_subject(serve: Start, run: Run) -> None:
    serve("names.*", "--", "sh", "-c", 'echo "$NATS_PRESENCE_CLIENT at $NATS_PRESENCE_SUBJECT"')
    assert run("request", "names.a", "--client", "me").stdout == b"me at names.a\n"
    assert run("request", "names.b", "--client", "").stdout == b" at names.b\n"
    first, second = (run("request", "names.c").stdout for _ in range(2))
    assert first != second, "each request without --client has a client of its own"


def test_worker_with_plain_nats_gets_headers(start: Start, server: Server) -> None:
    async def serve_once() -> Process:
        connection = await nats.connect(server.url)
        subscription = await connection.subscribe("plain")
        await connection.flush()
        request = start("request", "plain", "question", "--client", "me", "-H", "X-Model: small", "-H", "X-Empty:")
        message = await subscription.next_msg(timeout=TIMEOUT)
        assert message.data == b"question"
        assert message.headers is not None
        assert [message.headers[name] for name in ["Connect-ID", "X-Model", "X-Empty"]] == ["me", "small", ""]
        for answer in [b"answer", b"__STREAM_END__"]:
            await message.respond(answer)
        await connection.close()
        return request

    request = asyncio.run(serve_once())
    assert request.line() == b"answer\n"
    assert request.end() == 0


PRINT_HEADERS = ["--", "sh", "-c", "env | grep ^NATS_PRESENCE_HEADER_ | sort"]


@pytest.mark.parametrize("lanes", ["true", "false"])
def test_command_gets_headers_as_variables(serve: Start, run: Run, lanes: str) -> None:
    serve("headers", "-o", f"lanes={lanes}", *PRINT_HEADERS)
    headers = ["X-Model: small", "path: /tmp", "A.b$(c): $(d) 'e'", "X-Empty:", "twice: one", "twice: two"]
    done = run("request", "headers", "--client", "me", *(word for header in headers for word in ("-H", header)))
    assert done.stdout.decode().splitlines() == [
        "NATS_PRESENCE_HEADER_A_B__C_=$(d) 'e'",
        "NATS_PRESENCE_HEADER_PATH=/tmp",
        "NATS_PRESENCE_HEADER_TWICE=one",
        "NATS_PRESENCE_HEADER_X_EMPTY=",
        "NATS_PRESENCE_HEADER_X_MODEL=small",
    ]


def test_command_does_not_get_headers_of_another_request(serve: Start, run: Run) -> None:
    """As a `serve` would that a command of another `serve` has started."""
    serve("headers", *PRINT_HEADERS, NATS_PRESENCE_HEADER_OLD="old", NATS_PRESENCE_HEADER_NEW="old")
    assert run("request", "headers", "--client", "", "-H", "New: new").stdout == b"NATS_PRESENCE_HEADER_NEW=new\n"


def test_headers_that_a_command_cannot_get_are_refused(serve: Start, run: Run, server: Server) -> None:
    worker = serve("headers", "--", "echo", "not reached")
    same = run("request", "headers", "-H", "X-User: me", "-H", "x_user: someone else")
    large = run("request", "headers", "-H", "X-Large: " + "x" * (1 << 16))
    for done, message in [
        (same, b'headers "X-User" and "x_user" would be the same'),
        (large, b"more than 65536 bytes"),
    ]:
        assert (done.returncode, done.stdout) == (REMOTE, b"")
        assert message in done.stderr

    async def ask() -> bytes:
        connection = await nats.connect(server.url)
        answer = await connection.request("headers", headers={"X-Colour": "\x1b[31m"}, timeout=TIMEOUT)
        await connection.close()
        return answer.data

    assert (
        asyncio.run(ask())
        == b'__STREAM_ERROR__:header "X-Colour" has a control character, ' + b"which this worker does not accept"
    )
    worker.wait_for("control character")
    assert b"\x1b" not in worker.stderr


# Leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", ["true", "false"])
@pytest.mark.parametrize("client", [["--client", "me"], ["--client", ""], []], ids=["named", "none", "random"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_request_stops_the_command(
    serve: Start, start: Start, reports: Reports, lanes: str, client: list[str], number: int
) -> None:
    if not client[1:] or client[1] or lanes == "true":
        serve("work", "-o", f"lanes={lanes}", *reporting(reports, POLITE))
        request = start("request", "work", *client)
        assert request.line() == b"ready\n"
        pid = int(reports.next())
        request.signal(number)
        assert request.end() == 128 + number
        assert request.stderr == b""
        assert reports.next() == "TERM"
        wait_for_exit(pid)


def test_command_that_ignores_sigterm_is_killed_with_its_group(serve: Start, start: Start, reports: Reports) -> None:
    stubborn = "trap 'echo TERM > $R' TERM; echo trapped > $R; while :; do sleep 0.05; done"
    text = f"({stubborn}) & echo $! > $R; sleep 9999 & echo $! > $R; echo $$ > $R; {stubborn}"
    worker = serve("work", "--grace", "300ms", *reporting(reports, text))
    request = start("request", "work")
    pids = [int(line) for line in (reports.next() for _ in range(5)) if line != "trapped"]
    request.signal(signal.SIGINT)
    assert request.end() == INTERRUPTED
    assert [reports.next(), reports.next()] == ["TERM", "TERM"], "each process of the group gets SIGTERM"
    for pid in pids:
        wait_for_exit(pid)
    worker.wait_for("the command has ended")


def test_process_that_the_command_leaves_behind_is_killed(serve: Start, start: Start, reports: Reports) -> None:
    stubborn = "trap 'echo TERM > $R' TERM; echo trapped > $R; while :; do sleep 0.05; done"
    text = f"({stubborn}) > /dev/null & echo $! > $R; exec sleep 9999"
    serve("work", "--grace", "300ms", *reporting(reports, text))
    request = start("request", "work")
    (pid,) = [int(line) for line in (reports.next() for _ in range(2)) if line != "trapped"]
    request.signal(signal.SIGINT)
    assert reports.next() == "TERM"
    wait_for_exit(pid)


def test_processes_that_the_command_leaves_behind_have_their_grace(
    serve: Start, start: Start, reports: Reports
) -> None:
    """The shell ends at once; the other process, whose output is elsewhere, ends by itself after SIGTERM."""
    child = (
        "(trap 'sleep 0.3; echo cleaned > $R; exit' TERM; echo ready > $R; while :; do sleep 0.05; done) > /dev/null &"
    )
    serve("work", "--grace", "20s", *reporting(reports, f"{child} echo started; exec sleep 9999"))
    request = start("request", "work")
    assert reports.next() == "ready"
    assert request.line() == b"started\n"
    request.signal(signal.SIGINT)
    assert reports.next() == "cleaned"


def test_killed_request_stops_the_command(serve: Start, start: Start, reports: Reports) -> None:
    worker = serve("work", *reporting(reports, POLITE))
    request = start("request", "work")
    pid = int(reports.next())
    assert request.line() == b"ready\n"
    request.process.kill()
    assert reports.next() == "TERM"
    wait_for_exit(pid)
    worker.wait_for("stopped after 1 messages: the process at the other end is gone")


def test_reader_that_goes_away_stops_the_command(serve: Start, start: Start, reports: Reports) -> None:
    """As in `request | head -1`, although no further message comes."""
    serve("work", *reporting(reports, POLITE))
    request = start("request", "work")
    assert request.line() == b"ready\n"
    reports.next()
    assert request.process.stdout
    request.process.stdout.close()
    assert request.end() == 0
    assert request.stderr == b""
    assert reports.next() == "TERM"


def test_request_leaves_while_its_reader_is_slow(serve: Start, start: Start) -> None:
    worker = serve("yes", "--", "yes")
    request = start("request", "yes")
    assert request.line() == b"y\n"
    # Nobody reads on, so that the program waits in a write.
    request.signal(signal.SIGINT)
    assert request.end() == INTERRUPTED
    worker.wait_for("client is offline")
    worker.wait_for("the command has ended")


def test_shell_pipe(serve: Start, server: Server) -> None:
    worker = serve("yes", "--", "yes")
    text = f"printf question | {PROGRAM} -s {server.url} request yes - | head -2; echo ${{PIPESTATUS[*]}}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"y\ny\n0 0 0\n"
    assert done.stderr == b""
    worker.wait_for("the command has ended")


def test_offline_stops_the_streams_of_the_client_only(serve: Start, start: Start, run: Run, reports: Reports) -> None:
    serve("work", *reporting(reports, POLITE.replace("ready", "$NATS_PRESENCE_CLIENT")))
    first, second = (start("request", "work", "--client", client) for client in ["first", "second"])
    assert (first.line(), second.line()) == (b"first\n", b"second\n")
    done = run("offline", "first")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert first.end() == OFFLINE
    assert b"offline" in first.stderr
    assert second.process.poll() is None
    assert {reports.next() for _ in range(3)} > {"TERM"}


# Ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo one; exit 3", "error 3: the command exited with status 3"),
        ("echo one; kill -9 $$", "error 137: the command was killed by signal 9"),
    ],
)
def test_failed_command_is_named(serve: Start, run: Run, text: str, message: str) -> None:
    serve("fail", "--", "sh", "-c", text)
    done = run("request", "fail")
    assert (done.returncode, done.stdout) == (REMOTE, b"one\n")
    assert message in done.stderr.decode()


@pytest.mark.parametrize("name", ["no-such-command", "./no-such-command", "/", "/etc/passwd"])
def test_serve_refuses_a_command_that_does_not_exist(run: Run, name: str) -> None:
    done = run("serve", "work", "--", name)
    assert done.returncode == 2
    assert done.stderr.decode() == f"nats-presence: {name} is not a command that can be run\n"


def test_command_that_disappears_is_named(serve: Start, run: Run, tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\necho ok\n")
    command.chmod(0o755)
    worker = serve("work", "--", str(command))
    assert run("request", "work").stdout == b"ok\n"
    command.unlink()
    done = run("request", "work")
    assert done.returncode == REMOTE
    assert b"the worker cannot run its command: No such file" in done.stderr
    assert str(tmp_path) not in done.stderr.decode()
    worker.wait_for(f"{command} cannot be run: No such file")


def test_output_that_cannot_be_written_is_an_error(serve: Start, server: Server) -> None:
    worker = serve("yes", "--", "yes")
    with open("/dev/full", "wb") as full:
        command = [PROGRAM, "-s", server.url, "request", "yes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1
    assert b"the standard output cannot be written: No space left" in done.stderr
    worker.wait_for("the command has ended")


def test_second_signal_does_not_wait_for_the_server(serve: Start, start: Start, server: Server) -> None:
    serve("yes", "--", "yes")
    requests = [start("request", "yes") for _ in range(2)]
    for request in requests:
        assert request.line() == b"y\n"
    # From now on it takes what is sent, and answers nothing.
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)
    times = []
    for request, repeats in zip(requests, [False, True]):
        begin = time.monotonic()
        request.signal(signal.SIGINT)
        while request.process.poll() is None:
            if repeats:
                request.signal(signal.SIGINT)
            time.sleep(0.01)
        times.append(time.monotonic() - begin)
        assert request.end() == INTERRUPTED
    server.process.send_signal(signal.SIGCONT)
    assert times[0] > 2 > times[1] or times[0] > 2 * times[1]


def test_nobody_serves(run: Run) -> None:
    done = run("request", "nothing")
    assert (done.returncode, done.stdout) == (NO_RESPONDERS, b"")
    assert done.stderr == b"nats-presence: nobody serves nothing\n"


def test_request_is_retried(start: Start, serve: Start) -> None:
    request = start("request", "late", "--retries", "1000000", "-o", "retry_delay_ms=20")
    serve("late", "--", "echo", "here")
    assert request.line() == b"here\n"
    assert request.end() == 0


def test_timeout_ends_the_stream_and_the_command(serve: Start, run: Run, reports: Reports) -> None:
    serve("work", *reporting(reports, POLITE))
    done = run("request", "work", "--timeout", "500ms")
    assert (done.returncode, done.stdout) == (TIMED_OUT, b"ready\n")
    reports.next()
    assert reports.next() == "TERM"


def test_worker_that_is_killed(serve: Start, start: Start, reports: Reports) -> None:
    worker = serve("work", *reporting(reports, POLITE))
    request = start("request", "work")
    assert request.line() == b"ready\n"
    pid = int(reports.next())
    worker.process.kill()
    assert request.end() == PEER_GONE
    # Nothing is left that could stop it.
    os.kill(pid, signal.SIGTERM)
    wait_for_exit(pid)


def test_limit_counts_commands_that_are_being_stopped(serve: Start, start: Start, run: Run, reports: Reports) -> None:
    text = "trap 'echo TERM > $R; read x < $R.go; exit' TERM; echo $$ > $R; while :; do sleep 0.05; done"
    os.mkfifo(f"{reports.path}.go")
    worker = serve("work", "--max", "1", "--grace", "60s", *reporting(reports, text))
    request = start("request", "work")
    reports.next()
    done = run("request", "work")
    assert done.returncode == BUSY, "while the command runs"
    assert b"server busy" in done.stderr
    request.signal(signal.SIGINT)
    assert request.end() == INTERRUPTED
    assert reports.next() == "TERM"
    assert run("request", "work").returncode == BUSY, "while it ends"
    Path(f"{reports.path}.go").write_text("go\n")
    worker.wait_for("the command has ended")
    second = start("request", "work", "--retries", "1000", "-o", "retry_delay_ms=10")
    reports.next()
    second.signal(signal.SIGINT)
    assert reports.next() == "TERM"
    Path(f"{reports.path}.go").write_text("go\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_drains(serve: Start, start: Start, run: Run, reports: Reports, number: int) -> None:
    os.mkfifo(f"{reports.path}.go")
    worker = serve("work", *reporting(reports, "echo begin; read x < $R.go; echo end"))
    request = start("request", "work")
    assert request.line() == b"begin\n"
    worker.signal(number)
    worker.wait_for("no more requests; running commands: 1")
    assert run("request", "work").returncode == NO_RESPONDERS
    Path(f"{reports.path}.go").write_text("go\n")
    assert request.line() == b"end\n"
    assert request.end() == 0
    assert worker.end() == 0


def test_second_signal_kills(serve: Start, start: Start, reports: Reports) -> None:
    text = "trap '' TERM INT; echo $$ > $R; echo begin; while :; do sleep 0.05; done"
    worker = serve("work", "--grace", "1h", *reporting(reports, text))
    request = start("request", "work")
    assert request.line() == b"begin\n"
    pid = int(reports.next())
    worker.signal(signal.SIGINT)
    worker.wait_for("another signal kills them")
    worker.signal(signal.SIGINT)
    assert worker.end() == INTERRUPTED
    wait_for_exit(pid)
    assert request.end() == REMOTE
    assert b"the worker was stopped" in request.stderr


def test_signal_that_was_ignored_before_stays_ignored(server: Server) -> None:
    """As nohup does."""
    text = f"trap '' HUP; exec {PROGRAM} -s {server.url} serve work -- true"
    worker = subprocess.Popen(["sh", "-c", text], stderr=subprocess.PIPE)
    assert worker.stderr
    assert b"serving" in worker.stderr.readline()
    worker.send_signal(signal.SIGHUP)
    worker.send_signal(signal.SIGTERM)
    assert worker.stderr.readline().startswith(b"no more requests")
    assert worker.wait(20) == 0, "one signal was received, so it drained"
    worker.stderr.close()


def test_streams_go_on_when_nats_server_restarts(serve: Start, start: Start, reports: Reports, server: Server) -> None:
    os.mkfifo(f"{reports.path}.go")
    worker = serve("work", *reporting(reports, "echo begin; read x < $R.go; echo end"))
    request = start("request", "work")
    assert request.line() == b"begin\n"
    server.kill()
    worker.wait_for("\ndisconnected: ")
    server.start()
    worker.wait_for("\nconnected ")
    Path(f"{reports.path}.go").write_text("go\n")
    assert request.line() == b"end\n"
    assert request.end() == 0


def test_serve_and_watch_fail_when_the_connection_ends_for_good(serve: Start, start: Start, server: Server) -> None:
    limit = ["-o", "max_reconnects=1", "-o", "reconnect_max_ms=50"]
    worker = serve("work", *limit, "--", "true")
    watch = start("watch", *limit)
    assert watch.line() == b"watching; Ctrl-C ends\n"
    server.kill()
    assert worker.end() == DISCONNECTED
    worker.wait_for("disconnected for good: ")
    assert watch.end() == DISCONNECTED
