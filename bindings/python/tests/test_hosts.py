"""The library in host processes that fork, exit while streams run, or run out of resources."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LIMIT, PACKAGE, Server, run_python, until
from test_process import SETUP, finish, ready

import nats_presence

# As gunicorn's workers should do it: each process connects when it first needs the connection.
APP = """
import os, sys
sys.path.insert(0, os.environ["PACKAGE"])
import nats_presence
nats_presence.mark_client_online("marked on import")
conn = None
if os.environ["CONNECTS"] == "on import":
    conn = nats_presence.connect(os.environ["URL"])

def app(environ, start_response):
    global conn
    try:
        if conn is None:
            conn = nats_presence.connect(os.environ["URL"])
        body = b"".join(conn.stream("answers", client_id="tab"))
    except nats_presence.ForkedError as forked:
        start_response("500 Forked", [])
        return [str(forked).encode()]
    start_response("200 OK", [])
    return [body, b" %d" % os.getppid()]
"""


@pytest.fixture
def worker(url: str) -> Iterator[nats_presence.Connection]:
    with nats_presence.connect(url) as conn:
        conn.service("answers")(lambda request, sender: sender.send_many(["from ", "afar"]))
        yield conn


@pytest.mark.parametrize(
    ("preload", "connects", "expected"),
    [
        ([], "when asked", (200, b"from afar")),
        (["--preload"], "when asked", (200, b"from afar")),
        ([], "on import", (200, b"from afar")),
        (["--preload"], "on import", (500, b"forked process")),
    ],
    ids=["plain", "preloaded", "plain, connected on import", "preloaded and connected too early"],
)
def test_gunicorn(
    worker: nats_presence.Connection,
    url: str,
    tmp_path: Path,
    preload: list[str],
    connects: str,
    expected: tuple[int, bytes],
) -> None:
    (tmp_path / "application.py").write_text(APP)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        port = listener.getsockname()[1]
        environment = {"URL": url, "CONNECTS": connects, "PACKAGE": str(PACKAGE)}
        gunicorn = run_python(
            f"""
import os, sys
os.environ.update({environment!r})
os.chdir({str(tmp_path)!r})
sys.argv = ["gunicorn", "--workers", "2", "--bind", "fd://{listener.fileno()}"]
sys.argv += ["--log-level", "error", *{preload!r}, "application:app"]
from gunicorn.app.wsgiapp import run
run()
""",
            url,
            pass_fds=[listener.fileno()],
        )
        try:
            for _ in range(4):
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
                client.request("GET", "/")
                response = client.getresponse()
                status, body = response.status, response.read()
                assert status == expected[0], body
                assert expected[1] in body
                if status == 200:
                    assert int(body.split()[-1]) == gunicorn.pid
        finally:
            gunicorn.send_signal(signal.SIGTERM)
            status, out, err = finish(gunicorn)
    assert status == 0, (out, err)


SENDING = """
conn = nats_presence.connect(url)
begun = threading.Event()
@conn.service("local")
def handler(request, sender):
    while True:
        sender.send_many(["more"] * 100)
        begun.set()
stream = conn.stream("local", client_id="a")
next(stream)
begun.wait()
"""
ENDINGS = {
    "sys.exit": ("sys.exit(3)", 3),
    "return": ("", 0),
    "os._exit": ("os._exit(4)", 4),
    "an exception": ("raise ValueError('the end')", 1),
    "sys.exit in a thread": ("t = threading.Thread(target=sys.exit, args=[5]); t.start(); t.join(); sys.exit(6)", 6),
    "os._exit in a thread": ("threading.Thread(target=os._exit, args=[7]).start(); time.sleep(60)", 7),
    "an atexit handler that sends": (
        """
import atexit
def last():
    nats_presence.mark_client_offline("a")
    with nats_presence.connect(url) as late:
        late.service("late")(lambda request, sender: sender.send("late"))
        assert list(late.stream("late")) == [b"late"]
    os._exit(8)
atexit.register(last)
""",
        8,
    ),
    "SIGTERM": ("os.kill(os.getpid(), 15); time.sleep(60)", -15),
}


@pytest.mark.parametrize(("code", "status"), ENDINGS.values(), ids=ENDINGS)
def test_process_exit_while_sending(url: str, code: str, status: int) -> None:
    process = run_python(SETUP + SENDING + code, url)
    ended, _, err = finish(process)
    assert ended == status, err
    assert "Fatal" not in err
    assert "panicked" not in err


def test_sigterm_during_a_drain(server: Server, url: str) -> None:
    """nats-server is stopped, so the drain waits. SystemExit in the signal handler ends the drain and the process."""
    process = ready(
        run_python(
            SETUP
            + """
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
conn = nats_presence.connect(url, ping_interval_ms=60000)
print("ready", flush=True)
input()
print("ready", flush=True)
conn.close(drain=1)
""",
            url,
            stdin=subprocess.PIPE,
        )
    )
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)  # Its threads run until then.
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    ready(process).send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    server.process.send_signal(signal.SIGCONT)
    assert status == 9, err


def test_frequent_signals_disturb_nothing(worker: nats_presence.Connection, url: str) -> None:
    process = run_python(
        SETUP
        + """
import signal
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
with nats_presence.connect(url) as conn:
    for _ in range(300):
        assert list(conn.stream("answers", client_id="tab")) == [b"from ", b"afar"]
    while ticks < 100:
        nats_presence.mark_client_online("a")
        nats_presence.mark_client_offline("a")
signal.setitimer(signal.ITIMER_REAL, 0)  # While Python exits, it has no signal handlers.
""",
        url,
    )
    assert finish(process) == (0, "", "")


def test_ten_thousand_short_lived_threads_leave_nothing(url: str) -> None:
    process = run_python(
        SETUP
        + """
def threads():
    return len(os.listdir("/proc/self/task"))
def call(number):
    nats_presence.mark_client_online(f"{number}")
    assert nats_presence.is_client_online(f"{number}")
    nats_presence.mark_client_offline(f"{number}")
with nats_presence.connect(url, announce="never") as conn:
    before = threads()
    for start in range(0, 10_000, 50):
        some = [threading.Thread(target=call, args=[start + n]) for n in range(50)]
        [thread.start() for thread in some]
        [thread.join() for thread in some]
    assert nats_presence.online_count() == 0
    deadline = time.monotonic() + 10
    while threads() > before:
        assert time.monotonic() < deadline
""",
        url,
    )
    assert finish(process) == (0, "", "")


def test_running_out_of_file_descriptors(worker: nats_presence.Connection, url: str) -> None:
    process = run_python(
        SETUP
        + """
import resource
with nats_presence.connect(url) as conn:
    assert list(conn.stream("answers")) == [b"from ", b"afar"]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), most[1]))
    kept = []
    try:
        while True:
            kept.append(os.dup(0))
    except OSError:
        pass
    try:
        nats_presence.connect(url)
    except nats_presence.PresenceError as refused:
        assert isinstance(refused, (nats_presence.FullError, nats_presence.DisconnectedError)), refused
    else:
        raise AssertionError("connected without a descriptor")
    assert list(conn.stream("answers")) == [b"from ", b"afar"]
    [os.close(fd) for fd in kept]
    resource.setrlimit(resource.RLIMIT_NOFILE, most)
    with nats_presence.connect(url) as other:
        assert list(other.stream("answers")) == [b"from ", b"afar"]
""",
        url,
    )
    assert finish(process) == (0, "", "")


def test_child_processes_inherit_no_descriptors(worker: nats_presence.Connection) -> None:
    """A program that is started while a connection is open has none of the connection's descriptors."""
    stream = worker.stream("answers")
    assert list(stream) == [b"from ", b"afar"]
    listing = (
        "import os\nfor fd in range(3, 100):\n  try: print(os.readlink(f'/proc/self/fd/{fd}'))\n  except OSError: pass"
    )
    out = subprocess.run(
        [sys.executable, "-c", listing], close_fds=False, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert "eventfd" not in out
    assert "eventpoll" not in out
    assert "socket" not in out


def test_spawned_processes(url: str, worker: nats_presence.Connection, tmp_path: Path) -> None:
    script = tmp_path / "spawns.py"
    script.write_text(
        f"""
import multiprocessing, sys
sys.path.insert(0, {str(PACKAGE)!r})
import nats_presence

def child(url):
    with nats_presence.connect(url) as conn:
        assert list(conn.stream("answers")) == [b"from ", b"afar"]

if __name__ == "__main__":
    with nats_presence.connect(sys.argv[1]) as conn:
        process = multiprocessing.get_context("spawn").Process(target=child, args=[sys.argv[1]])
        process.start()
        process.join()
        assert process.exitcode == 0, process.exitcode
        child(sys.argv[1])
"""
    )
    subprocess.run([sys.executable, str(script), url], check=True, timeout=LIMIT)
    until(lambda: worker.stats()["senders"] == 0)
