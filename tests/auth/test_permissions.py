"""Permissions: the files in docs/nats-server are enough, and what happens when a permission is missing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from secured import ROOT, TIMEOUT, Stranger, nats_presence, nats_server

CONFIGS = ROOT / "docs/nats-server"
PASSWORDS = {"GATEWAY_PASSWORD": "of-gateways", "WORKER_PASSWORD": "of-workers"}
GATEWAY = {"inbox_prefix": "_INBOX.gateway"}
WORKER = {"inbox_prefix": "_INBOX.worker", "announce": "never"}


class Events:
    """Collects the events of connections."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._changed = threading.Condition()

    def __call__(self, event: Any) -> None:
        self.take(event.text)

    def take(self, text: str) -> None:
        with self._changed:
            self._texts.append(text)
            self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return "\n".join(self._texts)

    def wait(self, *words: str) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(all(word in text for word in words) for text in self._texts), TIMEOUT
            ), f"no event has {words}: {self._texts}"


class Processes:
    """A gateway, and a worker that counts; `ends` has the result of each of its senders."""

    def __init__(self, urls: contextlib.ExitStack, port: int, tenant: str = "", **options: Any) -> None:
        self.events = Events()
        self.ends: list[str] = []
        self.ended = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        own = {"gateway": {**GATEWAY, **options}, "worker": WORKER}
        self.worker, self.gateway = (
            urls.enter_context(
                nats_presence.connect(
                    f"nats://{tenant}{user}:of-{user}s@127.0.0.1:{port}", on_event=self.events, **own[user]
                )
            )
            for user in ["worker", "gateway"]
        )

        @self.worker.service("llm.count", queue="workers")
        def count(request: Any, sender: Any) -> None:
            try:
                for i in range(int(request.data)):
                    sender.send(b"%d" % i + bytes(1000))
                sender.end()
                self.ends.append("")
            except nats_presence.PresenceError as error:
                self.ends.append(type(error).__name__)
            self.ended.release()

        @self.worker.service("llm.endless", queue="workers")
        def endless(request: Any, sender: Any) -> None:
            self.started.release()
            try:
                while True:
                    sender.send("more")
                    time.sleep(0.01)
            except nats_presence.PresenceError as error:
                self.ends.append(type(error).__name__)
            self.ended.release()

    def count(self, number: int, **options: Any) -> int:
        """Requests `number` messages and returns how many arrive."""
        return len(list(self.gateway.stream("llm.count", b"%d" % number, timeout_ms=10_000, **options)))


@contextlib.contextmanager
def processes(config: Path | str, folder: Path | None = None, **options: Any) -> Iterator[tuple[int, Processes]]:
    with nats_server(config, folder, PASSWORDS) as port, contextlib.ExitStack() as stack:
        yield port, Processes(stack, port, **options)


@contextlib.contextmanager
def strangers(port: int, tenant: str = "") -> Iterator[tuple[Stranger, Stranger]]:
    """Strangers with a stolen credential of a gateway and of a worker."""
    both = [Stranger(port, f"{tenant}{user}", f"of-{user}s") for user in ["gateway", "worker"]]
    yield both[0], both[1]
    for stranger in both:
        stranger.close()


@pytest.mark.parametrize("lanes", [True, False])
def test_documented_permissions_are_enough(lanes: bool) -> None:
    with processes(CONFIGS / "one-account.conf", lanes=lanes) as (_, both):
        assert both.count(10_000) == 10_000
        stream = both.gateway.stream("llm.endless", client_id="somebody", timeout_ms=20_000)
        next(stream)
        stream.cancel()
        for _ in range(2):
            assert both.ended.acquire(timeout=TIMEOUT)
        assert both.ends == ["", "StreamCancelledError" if lanes else "OfflineError"]
        assert both.worker.stats()["lanes"] + both.gateway.stats()["lanes"] == (2 if lanes else 0)
        assert "iolation" not in both.events.text


def test_only_gateways_may_announce() -> None:
    with processes(CONFIGS / "one-account.conf") as (port, both), strangers(port) as (gateway, worker):
        stream = both.gateway.stream("llm.endless", client_id="victim", timeout_ms=20_000)
        next(stream)
        assert "Permissions Violation for Publish" in worker.publish("client.offline", b"victim")
        both.gateway.stats()
        for _ in range(10):
            next(stream)
        assert nats_presence.is_client_online("victim")
        assert gateway.publish("client.offline", b"victim") == ""
        with pytest.raises(nats_presence.OfflineError):
            for _ in stream:
                pass
        assert both.ended.acquire(timeout=TIMEOUT)
        assert both.ends == ["OfflineError"]


def test_refused_announcement_is_logged(tmp_path: Path) -> None:
    with nats_server(CONFIGS / "one-account.conf", environment=PASSWORDS) as port:
        events = Events()
        url = f"nats://worker:of-workers@127.0.0.1:{port}"
        with nats_presence.connect(url, on_event=events, inbox_prefix=WORKER["inbox_prefix"]):
            nats_presence.mark_client_offline("somebody")
            events.wait("Permissions Violation for Publish", "client.offline")


def test_gateway_may_not_serve() -> None:
    with processes(CONFIGS / "one-account.conf") as (port, both), strangers(port) as (gateway, worker):
        for subject in ["llm.count", "llm.count workers", "llm.>", ">"]:
            assert "Permissions Violation for Subscription" in gateway.subscribe(subject)
        # A worker takes its turn in the queue group, but cannot listen to requests of others.
        assert worker.subscribe("llm.other workers") == ""
        for subject in ["llm.count", "llm.count spies", "llm.>", ">"]:
            assert "Permissions Violation for Subscription" in worker.subscribe(subject)

        def more(request: Any, sender: Any) -> None:
            raise AssertionError("a request arrived")

        with pytest.raises(
            nats_presence.DisconnectedError, match=r'Permissions Violation for Subscription to "llm\.more"'
        ):
            both.gateway.service("llm.more", queue="workers")(more)
        both.events.wait("Permissions Violation for Subscription", "llm.more")
        with pytest.raises(nats_presence.NoRespondersError):
            next(both.gateway.stream("llm.more"))


def test_inboxes_belong_to_their_owners() -> None:
    with processes(CONFIGS / "one-account.conf") as (port, both), strangers(port) as (gateway, worker):
        for stranger, other in [(gateway, "worker"), (worker, "gateway")]:
            for subject in ["_INBOX.>", f"_INBOX.{other}.>", f"_INBOX.{other}.*.*", f"_INBOX.{other}.*.lane.*", "*.>"]:
                assert "Permissions Violation for Subscription" in stranger.subscribe(subject)
            # An answer to a request that was not addressed to it.
            token = "0" * 32
            assert "Permissions Violation for Publish" in stranger.publish(f"_INBOX.{other}.{token}.1234", b"lie")
        assert both.count(1000) == 1000
        assert (gateway.received, worker.received) == ([], [])


@pytest.mark.parametrize("right", ["allow_responses", "gateways' inboxes"])
def test_reply_subjects_that_a_gateway_can_make_a_worker_publish_to(tmp_path: Path, right: str) -> None:
    """Any subject, as the reply subject of a request; or gateways' inboxes only, as the comment in worker.conf says."""
    gateways_inboxes, responses = '# "_INBOX.gateway.*.*"', "allow_responses:"
    (tmp_path / "gateway.conf").write_text((CONFIGS / "gateway.conf").read_text())
    rights = (CONFIGS / "worker.conf").read_text()
    assert gateways_inboxes in rights
    assert f"\n{responses}" in rights
    if right != "allow_responses":
        rights = rights.replace(gateways_inboxes, gateways_inboxes[2:]).replace(f"\n{responses}", f"\n# {responses}")
    (tmp_path / "worker.conf").write_text(rights)
    # A spy who may subscribe to everything shows where messages arrive.
    config = (CONFIGS / "one-account.conf").read_text().replace("users: [", "users: [ { user: spy, password: of-spys }")
    with processes(config, tmp_path, lanes=False) as (port, both), strangers(port) as (gateway, worker):
        spy = Stranger(port, "spy", "of-spys")
        targets = ["llm.other", "some.other.system"]
        for target in targets:
            assert spy.subscribe(target) == ""
            assert gateway.publish("llm.count", b"1", reply=target) == ""
            assert both.ended.acquire(timeout=TIMEOUT)
            if right == "allow_responses":
                assert spy.wait(2) == [(target, b"0" + bytes(1000)), (target, b"__STREAM_END__")]
                spy.received.clear()
            else:
                both.events.wait("Permissions Violation for Publish", target)
                # Another subject: a late report about the first answer would stop this one before its handler runs.
                assert gateway.publish("llm.endless", b"", reply=f"{target}.endless") == ""
                assert both.ended.acquire(timeout=TIMEOUT)
                assert both.ends.pop() == "DisconnectedError"
        # Honest gateways have their streams, also streams that run longer than `expires` allows.
        assert both.count(10_000) == 10_000
        assert spy.publish("some.subject") == ""
        assert spy.received == []
        # The price: a worker may publish to any gateway whose subject it knows.
        refused = worker.publish(f"_INBOX.gateway.{'0' * 32}.1234", b"lie")
        assert ("Permissions Violation for Publish" in refused) == (right == "allow_responses")
        spy.close()


def test_gateways_may_be_separated(tmp_path: Path) -> None:
    """With the change that the comment in gateway.conf describes."""
    gateway, worker = (tmp_path / f"{name}.conf" for name in ["gateway", "worker"])
    gateway.write_text((CONFIGS / "gateway.conf").read_text().replace("_INBOX.gateway.", "_INBOX.gateway.mine."))
    worker.write_text(
        (CONFIGS / "worker.conf").read_text().replace("_INBOX.gateway.*.lane.*", "_INBOX.gateway.*.*.lane.*")
    )
    config = (CONFIGS / "one-account.conf").read_text()
    with processes(config, tmp_path, inbox_prefix="_INBOX.gateway.mine") as (port, both), strangers(port) as (other, _):
        assert both.count(1000) == 1000
        assert both.gateway.stats()["lanes"] == 1
        for subject in ["_INBOX.gateway.>", "_INBOX.gateway.yours.>"]:
            assert "Permissions Violation for Subscription" in other.subscribe(subject)


def test_tenants_are_separated() -> None:
    with processes(CONFIGS / "tenants.conf", tenant="red-") as (port, both), strangers(port, "blue-") as (gateway, _):
        stream = both.gateway.stream("llm.endless", client_id="somebody", timeout_ms=20_000)
        next(stream)
        # Permissions in that account have no effect in this one: the same client, the same subject, an inbox.
        assert gateway.publish("client.offline", b"somebody") == ""
        assert gateway.subscribe("_INBOX.gateway.>") == ""
        assert gateway.publish("llm.count", b"10", reply="_INBOX.gateway.x.1") == ""
        assert both.count(1000) == 1000
        for _ in range(10):
            next(stream)
        assert nats_presence.is_client_online("somebody")
        assert both.worker.stats()["requests"] == 2
        assert both.worker.stats()["offline_in"] == 0
        # nats-server answers with "no responders".
        assert [payload[:12] for _, payload in gateway.received] == []
        stream.cancel()


@pytest.mark.parametrize("lanes", [True, False])
def test_lanes_fall_back_to_level_0_between_accounts(lanes: bool) -> None:
    """A lane cannot cross accounts: a gateway that offers one may lose its first stream, and later ones use level 0."""
    with processes(CONFIGS / "two-accounts.conf", lanes=lanes) as (_, both):
        if lanes:
            with contextlib.suppress(nats_presence.PresenceError):
                both.count(10)
        assert both.count(10_000) == 10_000
        stream = both.gateway.stream("llm.endless", client_id="somebody", timeout_ms=20_000)
        next(stream)
        stream.cancel()
        assert both.gateway.stats()["lanes"] == 0


def config(missing: str, gateway: str, worker: str, responses: str = '{ max: -1, expires: "1h" }') -> str:
    """A configuration with all permissions except one that lanes or announcements need."""
    rights = {
        "gateway announces": "client.offline",
        "worker hears of it": "client.offline",
        "gateway publishes": f"{worker}.*.lane.*",
        "gateway hears": f"{gateway}.*.lane.*",
        "worker publishes": f"{gateway}.*.lane.*",
        "worker hears": f"{worker}.*.lane.*",
    }
    granted = {right: f'"{subject if right != missing else "nothing"}"' for right, subject in rights.items()}
    return f"""authorization {{ users: [
        {{ user: gateway, password: of-gateways, permissions: {{
            publish: ["llm.>", "{gateway}.*.*", {granted["gateway publishes"]}, {granted["gateway announces"]}]
            subscribe: ["{gateway}.*.*", {granted["gateway hears"]}] }} }}
        {{ user: worker, password: of-workers, permissions: {{
            publish: ["{worker}.*.*", {granted["worker publishes"]}], allow_responses: {responses}
            subscribe: ["llm.>", "{worker}.*.*", {granted["worker hears"]}, {granted["worker hears of it"]}] }} }}
    ] }}"""


@pytest.mark.parametrize("prefixes", [("_INBOX", "_INBOX"), ("_INBOX.gateway", "_INBOX.worker")], ids=["one", "two"])
@pytest.mark.parametrize(
    "missing", ["nothing", "gateway publishes", "gateway hears", "worker publishes", "worker hears"]
)
def test_missing_permission_falls_back_to_level_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, prefixes: tuple[str, str]
) -> None:
    monkeypatch.setitem(WORKER, "inbox_prefix", prefixes[1])
    with processes(config(missing, *prefixes), tmp_path, inbox_prefix=prefixes[0]) as (_, both):
        # The first stream may fail; that is reported at once, even if its sender ended it before.
        since = time.monotonic()
        with contextlib.suppress(nats_presence.PresenceError):
            both.count(10)
        with contextlib.suppress(nats_presence.PresenceError):
            both.count(10_000)
        assert time.monotonic() - since < 5
        # More than any window.
        assert both.count(10_000) == 10_000
        lanes = both.worker.stats()["lanes"] + both.gateway.stats()["lanes"]
        if missing == "nothing":
            assert lanes == 2
            assert "iolation" not in both.events.text
        else:
            both.events.wait("Permissions Violation", "lane", "lanes=false")
            if "hears" in missing:
                assert lanes == 0


# The worker has its own process: in its gateway's process, the mark itself would stop it.
WORKER_APART = """
import sys, threading, time
import nats_presence

def emit(text):
    print(text, flush=True)

finish = threading.Event()
with nats_presence.connect(
    sys.argv[1], inbox_prefix="_INBOX.worker", announce="never", on_event=lambda event: emit(event.text)
) as conn:
    @conn.service("llm.endless")
    def endless(request, sender):
        try:
            while not finish.is_set():
                sender.send("more")
                time.sleep(0.01)
            # A stop may arrive a little later than the request that was sent after it.
            for _ in range(20):
                sender.send("more")
                time.sleep(0.01)
            emit("it went on to its end")
        except nats_presence.PresenceError as error:
            emit("it ended with " + type(error).__name__)

    conn.service("llm.finish")(lambda request, sender: finish.set())
    emit("it serves")
    conn.run()
"""


@contextlib.contextmanager
def worker_apart(port: int, events: Events) -> Iterator[None]:
    """Runs the worker; yields its events and the results of its streams."""
    command = [sys.executable, "-c", WORKER_APART, f"nats://worker:of-workers@127.0.0.1:{port}"]
    path = os.pathsep.join(filter(None, [str(ROOT / "bindings/python"), os.environ.get("PYTHONPATH")]))
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert worker.stdout
    reader = threading.Thread(target=lambda lines: [events.take(line) for line in lines], args=[worker.stdout])
    reader.start()
    try:
        events.wait("it serves")
        yield
    finally:
        worker.kill()
        worker.wait()
        reader.join()
        worker.stdout.close()


@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "level 0"])
@pytest.mark.parametrize("missing", ["nothing", "gateway announces", "worker hears of it"])
def test_lanes_stop_senders_without_announcements(tmp_path: Path, missing: str, lanes: bool) -> None:
    """On level 0 the worker goes on until its stream ends."""
    events = Events()
    rights = config(missing, "_INBOX.gateway", "_INBOX.worker")
    with nats_server(rights, tmp_path) as port, worker_apart(port, events):
        url = f"nats://gateway:of-gateways@127.0.0.1:{port}"
        with nats_presence.connect(url, lanes=lanes, on_event=events, **GATEWAY) as gateway:
            stream = gateway.stream("llm.endless", client_id="somebody", timeout_ms=20_000)
            next(stream)
            stream.cancel()
            if lanes:
                events.wait("it ended with StreamCancelledError")
            elif missing == "nothing":
                events.wait("it ended with OfflineError")
            else:
                refused = "Publish" if missing == "gateway announces" else "Subscription"
                events.wait(f"Permissions Violation for {refused}", "client.offline")
                # After the announcement, on the same connection.
                assert list(gateway.stream("llm.finish", timeout_ms=20_000)) == []
                events.wait("it went on to its end")
                assert "it ended" not in events.text


@pytest.mark.parametrize("responses", ["true", '{ max: 10, expires: "1h" }', '{ max: -1, expires: "200ms" }', "false"])
def test_refused_answers_stop_the_worker(tmp_path: Path, responses: str) -> None:
    """On level 0 nobody would receive its results. The gateway is not informed, and reaches its timeout."""
    rights = config("worker publishes", "_INBOX.gateway", "_INBOX.worker", responses)
    with processes(rights, tmp_path, lanes=False) as (_, both):
        with pytest.raises(nats_presence.PresenceTimeoutError):
            list(both.gateway.stream("llm.endless", timeout_ms=700))
        both.events.wait("Permissions Violation for Publish", "_INBOX.gateway.", "allow_responses")
        # It was anonymous: the gateway could not stop it.
        assert both.ended.acquire(timeout=TIMEOUT)
        assert both.ends != [""]


def test_refused_request_ends_with_an_error() -> None:
    with processes(CONFIGS / "one-account.conf") as (_, both):
        since = time.monotonic()
        with pytest.raises(nats_presence.DisconnectedError, match=r"mlm\.count"):
            list(both.gateway.stream("mlm.count", timeout_ms=10_000))
        assert time.monotonic() - since < 5


def test_refused_echo_is_reported() -> None:
    """The log says what was refused."""
    with nats_server(CONFIGS / "one-account.conf", environment=PASSWORDS) as port:
        events = Events()
        url = f"nats://worker:of-workers@127.0.0.1:{port}"
        # A prefix that no permission allows.
        conn = nats_presence.connect(url, on_event=events, inbox_prefix="_INBOX.x", connect_timeout_ms=300)
        events.wait("Permissions Violation", "_INBOX.x.")
        with pytest.raises(nats_presence.PresenceTimeoutError):
            conn.listen_offline()
        with pytest.raises(nats_presence.PresenceTimeoutError):
            conn.close(0.1)
