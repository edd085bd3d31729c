"""Runs examples/web_gateway.py without changes: the two gateways, clients that leave, and wrong requests."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT, PACKAGE, until
from event_source import Received, normalised, parse
from test_examples import line, started
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Request, TextMessage

import nats_presence

FORGED = "one\n\nevent: end\rdata: x\r\n\r\nevent: failure"


class Worker:
    """A worker whose answer depends on the question."""

    def __init__(self, url: str) -> None:
        self.senders: dict[str, nats_presence.Sender] = {}
        """By the question."""
        self.conn = nats_presence.connect(url)
        self.conn.serve("answers", self.answer, threads=200)

    def answer(self, request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        question = request.data.decode()
        self.senders[question] = sender
        kind = question.split()[0]
        sender.send(f"{kind} 1")
        if kind == "forge":
            sender.send(FORGED)
        elif kind == "fail":
            sender.error("a secret")
        elif kind == "flood":
            while not sender.closed:
                sender.send("x" * 10_000)
        elif kind == "wait":
            while not sender.closed:
                time.sleep(0.005)


@pytest.fixture(scope="module")
def gateway(shared_server: Any) -> Iterator[tuple[tuple[str, int], int]]:
    """The address of the gateway and its process id."""
    program = PACKAGE / "examples/web_gateway.py"
    with started(program, NATS_URL=shared_server.url, SUBJECT="answers,unserved", PORT="0") as process:
        yield ("127.0.0.1", int(line(process).rsplit(":", 1)[1])), process.pid


@pytest.fixture
def address(gateway: tuple[tuple[str, int], int]) -> tuple[str, int]:
    return gateway[0]


@pytest.fixture
def worker(shared_server: Any) -> Iterator[Worker]:
    worker = Worker(shared_server.url)
    yield worker
    worker.conn.close()


def wait_until_stopped(senders: Iterable[nats_presence.Sender]) -> None:
    until(lambda: all(sender.closed for sender in senders))


class EventSource:
    """A browser that reads the events of its connection."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.http = HTTPConnection(*address, timeout=LIMIT)
        self.http.request("GET", "/events")
        self.response = self.http.getresponse()
        self.text = b""
        first = self.read(1)[0]
        assert first.name == "connected"
        self.id = first.data

    def read(self, count: int = 0, until: str = "") -> list[Received]:
        """Reads `count` events, or until an event of this name. Returns all events so far."""
        while True:
            events = parse(self.text)
            if (count and len(events) >= count) or until in {event.name for event in events}:
                return events
            more = self.response.read1(65536)
            assert more, self.text
            self.text += more

    def ask(self, question: str | bytes) -> tuple[int, str]:
        return ask(self.address, self.id, question)

    def leave(self) -> None:
        self.response.close()
        self.http.close()


def ask(address: tuple[str, int], client_id: str, question: str | bytes, subject: str = "answers") -> tuple[int, str]:
    http = HTTPConnection(*address, timeout=LIMIT)
    http.request("POST", f"/ask?subject={subject}", question, {"X-Connect-ID": client_id})
    response: HTTPResponse = http.getresponse()
    text = response.read().decode()
    http.close()
    return response.status, text


def test_the_answer_arrives_as_events_of_the_clients_connection(worker: Worker, address: tuple[str, int]) -> None:
    client = EventSource(address)
    assert client.ask("forge") == (202, "")
    assert client.read(until="end")[1:] == [
        ("message", "forge 1"), ("message", normalised(FORGED.encode())), ("end", ""),
    ]  # fmt: skip
    assert client.ask("fail") == (202, "")
    assert client.read(until="failure")[4:] == [
        ("message", "fail 1"), ("failure", "the worker ended the stream with an error"),
    ]  # fmt: skip
    client.leave()


def test_a_client_that_leaves_stops_its_worker(worker: Worker, address: tuple[str, int]) -> None:
    client, other = EventSource(address), EventSource(address)
    assert client.ask("wait a") == other.ask("wait b") == (202, "")
    client.read(2)
    other.read(2)
    client.leave()
    until(lambda: worker.senders["wait a"].closed)
    assert not worker.senders["wait b"].closed
    assert ask(address, client.id, "again")[0] == 409
    other.leave()
    until(lambda: worker.senders["wait b"].closed)


def test_wrong_requests_are_answered(worker: Worker, address: tuple[str, int]) -> None:
    client = EventSource(address)
    for wrong in ("", "unknown", "x" * 2000):
        assert ask(address, wrong, "hi") == (409, "X-Connect-ID does not name a connected client")
    for subject in ("nobody", "answers.*", "%3E", "", "a%20b"):
        assert ask(address, client.id, "hi", subject) == (404, "there is no such subject")
    assert client.ask("wait c")[0] == 202
    assert client.ask("hi") == (429, "the last question is still being answered")
    client.leave()
    client = EventSource(address)
    assert ask(address, client.id, "hi", "unserved")[0] == 202
    assert client.read(2)[1] == ("failure", "nobody serves the subject")
    client.leave()


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def test_large_questions_are_refused_in_bounded_memory(
    worker: Worker, address: tuple[str, int], gateway: tuple[tuple[str, int], int]
) -> None:
    client = EventSource(address)
    before = resident_kib(gateway[1])
    for _ in range(5):
        assert client.ask(b"x" * (10 << 20)) == (413, "the question has 10485760 bytes; the limit is 65536")
    assert resident_kib(gateway[1]) - before < 8 << 10
    assert client.ask("hi") == (202, "")
    client.leave()


def test_a_browser_that_reads_nothing_blocks_only_its_own_worker(
    worker: Worker, address: tuple[str, int], gateway: tuple[tuple[str, int], int]
) -> None:
    clients = [EventSource(address) for _ in range(20)]
    before = resident_kib(gateway[1])
    for number, client in enumerate(clients):
        assert client.ask(f"flood {number}") == (202, "")
    until(lambda: len(worker.senders) == 20)
    counts: list[int] = []
    while True:  # Until all workers are blocked.
        counts, previous = [sender.send_count for sender in worker.senders.values()], counts
        if counts == previous:
            break
        time.sleep(0.3)
    assert resident_kib(gateway[1]) - before < 64 << 10
    other = EventSource(address)
    assert other.ask("hi") == (202, "")
    assert other.read(until="end")[1:] == [("message", "hi 1"), ("end", "")]
    other.leave()
    for client in clients:
        client.leave()
    wait_until_stopped(worker.senders.values())


class Socket:
    """A browser's WebSocket."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=LIMIT)
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self.received: list[Event] = []
        self.text = ""
        self.socket.sendall(self.protocol.send(Request(host="localhost", target="/socket")))
        assert isinstance(self.event(), AcceptConnection)

    def event(self) -> Event:
        while not self.received:
            data = self.socket.recv(65536)
            self.protocol.receive_data(data or None)
            self.received = list(self.protocol.events())
        return self.received.pop(0)

    def read(self) -> dict[str, Any]:
        text = ""
        while True:
            event = self.event()
            assert isinstance(event, TextMessage), event
            text += event.data
            if event.message_finished:
                message: dict[str, Any] = json.loads(text)
                return message

    def send(self, **command: object) -> None:
        self.send_text(json.dumps(command))

    def send_text(self, text: str) -> None:
        self.socket.sendall(self.protocol.send(TextMessage(text)))

    def leave(self, reset: bool = False) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def test_a_socket_has_many_streams(worker: Worker, address: tuple[str, int]) -> None:
    client = Socket(address)
    for number in range(50):
        client.send(type="ask", stream=number, data=f"forge {number}")
    got: dict[int, list[Any]] = {number: [] for number in range(50)}
    for _ in range(150):
        message = client.read()
        got[message.pop("stream")].append(message)
    answer = [{"type": "message", "data": "forge 1"}, {"type": "message", "data": FORGED}, {"type": "end"}]
    assert got == dict.fromkeys(range(50), answer)
    client.send(type="ask", stream=1, subject="answers", data="fail")
    assert client.read() == {"type": "message", "stream": 1, "data": "fail 1"}
    assert client.read() == {"type": "error", "stream": 1, "text": "the worker ended the stream with an error"}
    client.leave()


def test_cancel_stops_one_stream_and_leaving_stops_all(worker: Worker, address: tuple[str, int]) -> None:
    for reset in (False, True):
        client, names = Socket(address), [f"wait {reset} {number}" for number in range(3)]
        for number, name in enumerate(names):
            client.send(type="ask", stream=number, data=name)
        assert sorted(client.read()["stream"] for _ in names) == [0, 1, 2]
        senders = [worker.senders[name] for name in names]
        client.send(type="cancel", stream=1)
        wait_until_stopped(senders[1:2])
        assert [sender.closed for sender in senders] == [False, True, False]
        client.leave(reset)
        wait_until_stopped(senders)


def test_a_socket_that_leaves_during_a_send_stops_its_worker(worker: Worker, address: tuple[str, int]) -> None:
    client = Socket(address)
    client.send(type="ask", stream=1, data="flood")
    client.read()
    sender, counts = worker.senders["flood"], [-1, 0]
    while counts[0] != counts[1]:  # Until the worker is blocked.
        time.sleep(0.3)
        counts = [counts[1], sender.send_count]
    assert not sender.closed
    client.leave()
    until(lambda: sender.closed)


def test_wrong_commands_are_answered(worker: Worker, address: tuple[str, int]) -> None:
    client = Socket(address)
    for text in ("", "no JSON", "[]", "{}", '{"type": "ask"}', '{"stream": "1"}', '{"stream": true}', "[" * 20000):
        client.send_text(text)
        assert client.read()["text"] == "a command is a JSON object with a type and the number of a stream"
    client.send(type="sell", stream=1)
    assert client.read() == {"type": "error", "stream": 1, "text": "the type of a command is ask or cancel"}
    for subject in ("nobody", "*", "", None, ["answers"], 1):
        client.send(type="ask", stream=1, subject=subject)
        assert client.read() == {"type": "error", "stream": 1, "text": "there is no such subject"}
    client.send(type="cancel", stream=7)  # No effect.
    for number in range(101):
        client.send(type="ask", stream=number, data=f"wait {number}")
    answers = [client.read() for _ in range(101)]
    assert {"type": "error", "stream": 100, "text": "the limit of 100 streams is reached"} in answers
    client.send(type="ask", stream=5, data="again")
    assert client.read() == {"type": "error", "text": "stream 5 is running"}
    client.leave()
    wait_until_stopped(worker.senders.values())


@pytest.mark.parametrize("message", [TextMessage("x" * (10 << 20)), BytesMessage(b"1")])
def test_a_socket_that_sends_too_much_or_bytes_is_closed(
    worker: Worker, address: tuple[str, int], message: Event
) -> None:
    client = Socket(address)
    client.send(type="ask", stream=1, data="wait")
    client.read()
    data = client.protocol.send(message)

    def send() -> None:
        with suppress(OSError):  # The server may close the connection before it has read everything.
            client.socket.sendall(data)

    sending = threading.Thread(target=send)
    sending.start()
    event = client.event()
    assert isinstance(event, CloseConnection)
    assert event.code == (1003 if isinstance(message, BytesMessage) else 1009)
    until(lambda: worker.senders["wait"].closed)
    client.leave()
    sending.join()
