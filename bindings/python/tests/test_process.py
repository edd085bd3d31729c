"""Signals, the exit of the interpreter, and fork, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from conftest import LIMIT, run_python

import nats_presence
from nats_presence import Connection, DisconnectedError, OfflineError, PresenceError, RemoteError, StreamCancelledError

# If the tests run in the background, SIGINT may be ignored, which child processes inherit.
SETUP = """
import asyncio, multiprocessing, os, signal, sys, threading, time
import nats_presence
from nats_presence import aio
signal.signal(signal.SIGINT, signal.default_int_handler)
url = sys.argv[1]
"""


@pytest.fixture
def conn(url: str) -> Iterator[Connection]:
    with nats_presence.connect(url) as conn:
        yield conn


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler shows where it hangs.
        out, err = process.communicate()
        pytest.fail(f"the process hangs:\n{out}\n{err}")
    return process.returncode, out, err


def ready(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != "ready\n":
        pytest.fail(f"{line}{finish(process)}")
    return process


WAITS = {
    "a stream": """
with nats_presence.connect(url) as conn:
    conn.service("silent")(lambda request, sender: time.sleep(0.2) or sender.detach() or kept.append(sender))
    kept = []
    stream = conn.stream("silent")
    print("ready", flush=True)
    next(stream)
""",
    "a send": """
with nats_presence.connect(url) as conn:
    begun, kept = threading.Event(), []
    conn.service("silent")(lambda request, sender: sender.detach() or kept.append(sender) or begun.set())
    # The stream is not read: these messages fill its window, so that the next one has to wait.
    stream = conn.stream("silent", stream_buffer_bytes=5 * 1064)
    begun.wait()
    kept[0].send_many([bytes(1000)] * 5)
    print("ready", flush=True)
    kept[0].send(bytes(1000))
""",
    "run": """
with nats_presence.connect(url) as conn:
    print("ready", flush=True)
    conn.run()
""",
    "asyncio": """
async def main():
    async with aio.connect(url) as conn:
        async def handler(request, sender):
            await asyncio.sleep(3600)
        await conn.serve("silent", handler)
        stream = conn.stream("silent")
        print("ready", flush=True)
        await stream.__anext__()
asyncio.run(main())
""",
}


@pytest.mark.parametrize("code", WAITS.values(), ids=WAITS)
def test_keyboard_interrupt_ends_a_wait(url: str, code: str) -> None:
    process = ready(run_python(SETUP + code, url))
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == -signal.SIGINT, err
    assert "\nKeyboardInterrupt\n" in err


def test_a_stream_goes_on_after_an_interrupt(url: str) -> None:
    process = ready(
        run_python(
            SETUP
            + """
with nats_presence.connect(url) as conn:
    go = threading.Event()
    @conn.service("answers")
    def handler(request, sender):
        go.wait()
        sender.send("late")
    stream = conn.stream("answers")
    try:
        print("ready", flush=True)
        next(stream)
    except KeyboardInterrupt:
        go.set()
    print(list(stream))
""",
            url,
        )
    )
    process.send_signal(signal.SIGINT)
    assert finish(process) == (0, "[b'late']\n", "")


def test_a_message_that_arrives_with_an_interrupt_is_not_lost(url: str) -> None:
    """A signal and then a message arrive during a wait. KeyboardInterrupt is raised after the wait took the message."""
    process = run_python(
        SETUP
        + """
import signal
with nats_presence.connect(url) as conn:
    go, arrived = threading.Event(), threading.Event()
    @conn.service("answers")
    def handler(request, sender):
        sender.send("first")
        go.wait()
        os.kill(os.getpid(), signal.SIGINT)
        sender.send_many(["second", "third"])
    stream = conn.stream("answers")
    messages = [next(stream)]
    for _ in range(2):
        try:
            go.set()
            messages.extend(stream)
        except KeyboardInterrupt:
            messages.append(b"interrupted")
    print(messages)
""",
        url,
    )
    assert finish(process) == (0, "[b'first', b'interrupted', b'second', b'third']\n", "")


def test_a_raising_signal_handler_loses_at_most_one_message(url: str) -> None:
    process = run_python(
        SETUP
        + """
import random
class Tick(Exception):
    pass
def tick(*_):
    raise Tick
signal.signal(signal.SIGALRM, tick)
MANY = 20_000
numbers = [b"%d" % number for number in range(MANY)]
with nats_presence.connect(url) as worker, nats_presence.connect(url) as gateway:
    worker.service("answers")(lambda request, sender: sender.send_many(numbers))
    began = time.monotonic()
    while time.monotonic() - began < 2:
        stream, got, ticks = gateway.stream("answers", timeout=5), [], 0
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.004))
                for message in stream:
                    got.append(int(message))
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except Tick:
                ticks += 1
        assert got == sorted(set(got)), "twice, or out of order"
        assert len(got) >= MANY - ticks, f"{MANY - len(got)} were lost to {ticks} signals"
""",
        url,
    )
    assert finish(process) == (0, "", "")


EXITS = {
    "sync": """
conn = nats_presence.connect(url)
@conn.service("local", threads=2)
def handler(request, sender):
    while True:
        sender.send("more")
names = [("local", "a"), ("local", "b"), ("elsewhere", "c")]
streams = [conn.stream(subject, client_id=client) for subject, client in names]
for stream in streams:
    next(stream)
session = nats_presence.session("d")
print("ready", flush=True)
sys.exit(3)
""",
    "a handler that never returns": """
conn = nats_presence.connect(url)
conn.service("local")(lambda request, sender: sender.send("more") or time.sleep(3600))
streams = [conn.stream("local", client_id="a"), conn.stream("elsewhere", client_id="c")]
for stream in streams:
    next(stream)
print("ready", flush=True)
sys.exit(3)
""",
    "a daemon thread that reads": """
conn = nats_presence.connect(url)
stream = conn.stream("elsewhere", client_id="c")
next(stream)
def read():
    try:
        list(stream)
    except nats_presence.ClosedError:
        pass
threading.Thread(target=read, daemon=True).start()
print("ready", flush=True)
sys.exit(3)
""",
    "asyncio that is left behind": """
loop = asyncio.new_event_loop()
async def main():
    global block, stream
    block = aio.connect(url)
    conn = await block.__aenter__()
    stream = conn.stream("elsewhere", client_id="c")
    await stream.__anext__()
loop.run_until_complete(main())
print("ready", flush=True)
sys.exit(3)
""",
    "asyncio": """
async def main():
    async with aio.connect(url) as conn:
        async for message in conn.stream("elsewhere", client_id="c"):
            print("ready", flush=True)
            sys.exit(3)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("code", EXITS.values(), ids=EXITS)
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "level 0"])
def test_exit_with_streams_open(url: str, code: str, lanes: bool) -> None:
    """The process exits with its own status, and workers in other processes are stopped."""
    raised = []
    conn = nats_presence.connect(url, lanes=lanes)

    @conn.service("elsewhere")
    def handler(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        try:
            while True:
                sender.send("more")
                time.sleep(0.001)  # The process announces its exit within 1 s, which a flood of messages would delay.
        except PresenceError as refused:
            raised.append(refused)

    process = ready(run_python(SETUP + code, url))
    assert finish(process) == (3, "", "")
    conn.stop()
    conn.run()
    conn.close()
    assert [type(refused) for refused in raised] == [StreamCancelledError if lanes else OfflineError]


def test_a_worker_that_exits_ends_its_streams(conn: Connection, url: str) -> None:
    process = ready(
        run_python(
            SETUP
            + """
conn = nats_presence.connect(url)
go = threading.Event()
@conn.service("answers")
def handler(request, sender):
    sender.send("begun")
    go.set()
    time.sleep(3600)
print("ready", flush=True)
go.wait()
""",
            url,
        )
    )
    stream = conn.stream("answers", client_id="tab")
    assert next(stream) == b"begun"
    with pytest.raises((RemoteError, DisconnectedError)):
        next(stream)
    assert finish(process) == (0, "", "")


FORKS = {
    "after import": """
nats_presence.mark_client_online("parent's")
def child():
    assert nats_presence.online_count() == 0
    nats_presence.mark_client_online("child's")
    with nats_presence.session("tab"):
        assert nats_presence.online_count() == 2
    with nats_presence.connect(url) as conn:
        conn.service("answers")(lambda request, sender: sender.send("from a child"))
        assert list(conn.stream("answers", client_id="tab")) == [b"from a child"]
    assert nats_presence.online_count() == 1
""",
    "after connect": """
conn = nats_presence.connect(url, on_event=print)
events = []
go = threading.Event()
senders = []
@conn.service("answers")
def handler(request, sender):
    senders.append(sender)
    sender.send("begun")
    go.wait()
    sender.send("end")
stream, read_by_a_thread = conn.stream("answers", client_id="tab"), conn.stream("answers", client_id="tab")
assert next(stream) == next(read_by_a_thread) == b"begun"
read = []
reader = threading.Thread(target=lambda: read.extend(read_by_a_thread))
reader.start()
while not repr(read_by_a_thread._wait_lock).startswith("<locked"):
    time.sleep(0.01)
session = nats_presence.session("tab")

def child():
    assert nats_presence.online_count() == 0
    nats_presence.mark_client_online("child's")
    calls = [
        conn.stats, conn.run, conn.stop, conn.listen_offline,
        lambda: conn.stream("answers"), lambda: next(stream), lambda: next(read_by_a_thread),
        lambda: conn.service("answers")(handler),
        lambda: senders[0].send("x"), senders[0].end, lambda: senders[0].error("x"),
        lambda: nats_presence.connect(url),
        lambda: asyncio.run(aio.connect(url).__aenter__()),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except nats_presence.ForkedError as forked:
            assert forked.message
        else:
            raise AssertionError(f"call {number} raised nothing")
    conn.close()
    conn.close(drain=None)
    session.close()
    stream.cancel()
    stream.close()
""",
    "after asyncio's connect": """
async def main():
    global conn, stream, block
    block = aio.connect(url)
    conn = await block.__aenter__()
    async def handler(request, sender):
        await sender.send("begun")
        await sender.send("end")
    await conn.serve("answers", handler)
    stream = conn.stream("answers")
    assert await stream.__anext__() == b"begun"
loop = asyncio.new_event_loop()
loop.run_until_complete(main())

async def use():
    await conn.close()
    for call in (conn.run, conn.listen_offline, lambda: conn.serve("answers", print)):
        try:
            await call()
        except nats_presence.ForkedError:
            continue
        raise AssertionError("nothing was raised")
def child():
    asyncio.run(use())
""",
}
AFTERWARDS = {
    "after import": "assert nats_presence.online_count() == 1",
    "after connect": """
go.set()
assert list(stream) == [b"end"]
reader.join()
assert read == [b"end"]
session.close()
conn.close()
""",
    "after asyncio's connect": """
async def end():
    assert [message async for message in stream] == [b"end"]
    await block.__aexit__(None, None, None)
loop.run_until_complete(end())
""",
}
START = {
    "multiprocessing": """
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
""",
    "os.fork": """
pid = os.fork()
if pid == 0:
    child()
    sys.exit(7)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
""",
}


# Not os.fork after asyncio's connect: a child that closes its parent's loop breaks the parent's loop, too.
@pytest.mark.parametrize(
    ("when", "start"),
    [*((w, "multiprocessing") for w in FORKS), *((w, "os.fork") for w in FORKS if "asyncio" not in w)],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork(url: str, when: str, start: str) -> None:
    process = run_python(SETUP + FORKS[when] + START[start] + AFTERWARDS[when], url)
    status, out, err = finish(process)
    assert (status, out) == (0, ""), err


@pytest.mark.parametrize("child", ["conn.close()", "with conn: pass", "del conn", "sys.exit(0)"])
def test_a_forked_child_does_not_affect_its_parents_connection(url: str, child: str) -> None:
    """In the child, closing the connection has no effect, and not closing it causes no warning."""
    process = run_python(
        SETUP
        + f"""
import gc, warnings
warnings.simplefilter("error", ResourceWarning)
conn = nats_presence.connect(url)
conn.service("answers")(lambda request, sender: sender.send("still there"))
pid = os.fork()
if pid == 0:
    {child}
    sys.exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert list(conn.stream("answers")) == [b"still there"]
conn.close()
""",
        url,
    )
    assert finish(process) == (0, "", "")


def test_close_keeps_the_event_that_a_thread_is_reading(conn: Connection, url: str) -> None:
    """A thread of the service has taken a request, but has not copied it yet."""
    process = run_python(
        SETUP
        + """
from nats_presence._events import EventBatch
taken, closed, seen, wait = threading.Event(), threading.Event(), [], EventBatch.wait
def slowly(events, queue, timeout):
    count = wait(events, queue, timeout)
    if count > 0:
        taken.set()
        closed.wait()
    return count
EventBatch.wait = slowly
conn = nats_presence.connect(url)
init = nats_presence.Request.__init__
def copy(request, *arguments):
    init(request, *arguments)
    seen.append(request.data.count(b"x"))
nats_presence.Request.__init__ = copy
conn.service("answers", threads=1)(lambda request, sender: None)
print("ready", flush=True)
taken.wait()
conn.close(drain=0.1)
closed.set()
while not seen:
    time.sleep(0.01)
print(seen)
""",
        url,
    )
    ready(process)
    with conn.stream("answers", b"x" * 1_000_000):
        assert finish(process) == (0, "[1000000]\n", "")
