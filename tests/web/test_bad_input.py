"""What strangers may send to the gateways and the supervisor: clear answers, flat memory, nothing left running."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import GATEWAYS, TIMEOUT, Demo

pytestmark = pytest.mark.parametrize("gateway", GATEWAYS, indirect=True)

QUESTION = {
    "client": "somebody",
    "stream": "1",
    "mode": "presence",
    "worker": "go",
    "length": "10",
    "pause": "0",
    "prompt": "What is light?",
}
MIB = 1 << 20


def url(demo: Demo, path: str = "/sse", **changes: str) -> str:
    return f"{demo.gateway}{path}?{urllib.parse.urlencode({**QUESTION, **changes})}"


def get(address: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, str]:
    """Returns the status and the body."""
    request = urllib.request.Request(address, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"client": ""}, 400, 'client is "", not 1 to 32 letters, digits, - or _'),
        ({"client": "x" * 33}, 400, "not 1 to 32 letters"),
        ({"client": "a b"}, 400, 'client is "a b", not'),
        ({"client": "a\r\nb\0c"}, 400, "not 1 to 32 letters"),
        ({"stream": '"}{\\'}, 400, "stream is "),
        ({"mode": ">"}, 404, 'no worker serves ">.go"'),
        ({"worker": "go.*"}, 404, 'no worker serves "presence.go.*"'),
        ({"length": "0"}, 400, 'length is "0", not a number from 1 to 100000'),
        ({"length": "-1"}, 400, "not a number from 1"),
        ({"length": "1e3"}, 400, "not a number from 1"),
        ({"length": "9" * 30}, 400, "not a number from 1"),
        ({"pause": "1001"}, 400, "from 0 to 1000"),
        ({"prompt": "x" * 1001}, 400, "prompt is 1001 bytes long; the limit is 1000"),
    ],
)
def test_a_wrong_question_is_answered_with_what_is_wrong(
    demo: Demo, changes: dict[str, str], status: int, text: str
) -> None:
    answer = get(url(demo, **changes))
    assert answer[0] == status
    assert text in answer[1]
    assert len(answer[1]) < 250
    assert get(url(demo))[1].endswith("event: end\ndata: \n\n")


def test_other_methods_paths_and_origins_are_refused(demo: Demo) -> None:
    assert get(f"{demo.gateway}/other")[0] == 404
    assert get(url(demo), method="DELETE")[0] == 405
    assert get(url(demo), {"Origin": "http://evil.example"})[0] == 403
    assert get(url(demo, "/ws"), {"Origin": "http://evil.example"})[0] == 403
    assert get(url(demo), {"Origin": demo.url})[0] == 200
    assert 400 <= get(url(demo, "/ws"))[0] < 500


@pytest.mark.parametrize("path", ["/sse", "/ws"])
def test_a_body_of_10_mib_is_refused_unread(demo: Demo, path: str) -> None:
    before = memory(demo)
    for _ in range(3):
        with connect(demo.gateway) as connection:
            target = url(demo, path).removeprefix(demo.gateway)
            head = f"GET {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {10 * MIB}\r\n\r\n"
            connection.sendall(head.encode())
            with contextlib.suppress(ConnectionError):  # The answer may be on its way, and the connection closed.
                connection.sendall(bytes(10 * MIB))
            assert b" 413 " in receive(connection)
    assert memory(demo) < before + 8 * MIB
    assert demo.total("running") == 0


def test_endless_headers_are_refused(demo: Demo) -> None:
    with connect(demo.gateway) as connection:
        connection.sendall(b"GET /sse HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(10_000):
                connection.sendall(f"X-{number}: {'y' * 1000}\r\n".encode())
            pytest.fail("10 MB of headers were accepted")


def test_the_supervisor_refuses_what_is_not_a_button_of_its_page(demo: Demo) -> None:
    pids = [process["pid"] for process in demo.state()["processes"]]
    assert demo.do("kill-gateway", origin="http://evil.example")[0] == 403
    assert demo.do("kill-everything") == (404, "there is no action 'kill-everything'")
    assert demo.do("kill-worker?mode=presence&worker=Cobol")[0] == 404
    assert get(f"{demo.url}/do/kill-gateway")[0] in (404, 405)
    assert get(f"{demo.url}/", {"Host": "evil.example"})[0] == 400
    assert get(f"{demo.url}/../run")[0] == 404
    with connect(demo.url) as connection:
        head = f"POST /do/kill-gateway HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: {demo.url}\r\n"
        connection.sendall(f"{head}Content-Length: {10 * MIB}\r\n\r\n".encode())
        assert b" 413 " in receive(connection)
    assert pids == [process["pid"] for process in demo.state()["processes"]]


def test_wrong_websocket_messages_close_it(demo: Demo) -> None:
    for message, code in [(b"dance", 1008), (b"", 1008), (bytes(5000), 1009), (b"\xff\xfe", 0)]:
        with WebSocket(demo) as browser:
            browser.ask("1", length="100000", pause="1")
            assert browser.receive().startswith(b"message 1 ")
            browser.send(message)
            closed = browser.wait_for_close()
            assert code in (0, closed), (message, closed)
        demo.wait("the worker has stopped", lambda: demo.total("running") == 0)


def test_wrong_questions_over_a_websocket_are_answered(demo: Demo) -> None:
    with WebSocket(demo) as browser:
        browser.ask("a b")
        assert browser.receive().startswith(b'failure - stream is "a b", not 1 to 32')
        browser.ask("1", worker=">")
        assert browser.receive() == b'failure 1 no worker serves "presence.>"'
        browser.send(b"leave 17")
        browser.ask("1", length="100000", pause="100")
        assert browser.receive().startswith(b"message 1 ")
        browser.ask("1")
        assert b"failure 1 stream 1 runs already" in [browser.receive() for _ in range(5)]
        for number in range(200):
            browser.ask(f"more-{number}", length="100000", pause="1000")
        refused = 0
        while refused < 100:
            refused += browser.receive().endswith(b"100 streams run already, which is the limit")
        demo.wait("100 streams run", lambda: demo.total("running") == 100)
    demo.wait("the workers have stopped", lambda: demo.total("running") == 0)


@pytest.mark.parametrize("path", ["/sse", "/ws"])
def test_a_browser_that_never_reads_blocks_its_own_worker(demo: Demo, path: str) -> None:
    before = memory(demo)
    with contextlib.ExitStack() as stack:
        if path == "/sse":
            for number in range(10):
                deaf = stack.enter_context(connect(demo.gateway, receive_buffer=4096))
                target = url(demo, stream=str(number), length="100000").removeprefix(demo.gateway)
                deaf.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        else:
            browser = stack.enter_context(WebSocket(demo, receive_buffer=4096))
            for number in range(10):
                browser.ask(str(number), length="100000")
        sent = [-1, 0]

        def no_more_is_sent() -> bool:
            sent.append(demo.total("sent"))
            return demo.total("running") == 10 and sent[-1] == sent[-5:][0] > 0 and len(sent) > 7

        demo.wait("no more is sent", no_more_is_sent)
        assert demo.total("running") == 10
        assert memory(demo) < before + 16 * MIB
        assert get(url(demo, client="other", length="1000"))[1].endswith("event: end\ndata: \n\n")
    demo.wait("the workers have stopped", lambda: demo.total("running") == 0)


@pytest.mark.parametrize("path", ["/sse", "/ws"])
def test_a_browser_that_leaves_between_two_messages_stops_its_worker_before_the_next(demo: Demo, path: str) -> None:
    computed = demo.total("computed")
    changes = {"length": "100", "pause": "1000"}
    with contextlib.ExitStack() as stack:
        if path == "/sse":
            browser = stack.enter_context(connect(demo.gateway))
            target = url(demo, **changes).removeprefix(demo.gateway)
            browser.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        else:
            stack.enter_context(WebSocket(demo)).ask("1", **changes)
        demo.wait("the first message", lambda: demo.total("computed") > computed)
    demo.wait("the worker has stopped", lambda: demo.total("running") == 0)
    assert demo.total("computed") == computed + 1


def test_half_of_2000_event_sources_leave(demo: Demo) -> None:
    files, sizes = open_files(demo), []
    for _ in range(2):
        received = asyncio.run(asyncio.wait_for(read_all(demo.gateway, 2000), 60))
        assert [count for count in received if count not in (1, 5)] == []
        assert received.count(5) == 1000
        demo.wait("no streams run", lambda: demo.total("running") == 0)
        demo.wait("the connections are closed", lambda: open_files(demo) <= files + 5)
        sizes.append(memory(demo))
    assert sizes[1] < 1.5 * sizes[0], "what a browser that has left used is used again"


async def read_all(gateway: str, count: int) -> list[int]:
    """Returns how many messages each of them has received. Every other one leaves after the first."""
    host, port = gateway.removeprefix("http://").split(":")

    async def read(number: int) -> int:
        question = urllib.parse.urlencode(
            {**QUESTION, "client": f"c{number}", "stream": "load-1", "length": "5", "pause": "500"}
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /sse?{question} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = 0
        try:
            async for line in reader:
                if line == b"event: end\n":
                    break
                received += line.startswith(b"data: ")
                if received and number % 2:
                    break
        finally:
            writer.close()
        return received

    return await asyncio.gather(*map(read, range(count)))


# Raw clients.


@contextlib.contextmanager
def connect(address: str, receive_buffer: int = 0) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(TIMEOUT)
        connection.connect((host, int(port)))
        yield connection


def receive(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
            if b"\r\n\r\n" in received:
                break
    return received


class WebSocket:
    """As much of a WebSocket as these tests need."""

    def __init__(self, demo: Demo, receive_buffer: int = 0) -> None:
        self._context = connect(demo.gateway, receive_buffer)
        self.connection = self._context.__enter__()
        key = base64.b64encode(os.urandom(16)).decode()
        self.connection.sendall(
            f"GET /ws?client=somebody HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        self.data = b""
        while b"\r\n\r\n" not in self.data:
            self.data += self.connection.recv(4096)
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        assert b" 101 " in head.splitlines()[0], head

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(None, None, None)

    def ask(self, stream: str, **changes: str) -> None:
        self.send(f"ask {urllib.parse.urlencode({**QUESTION, 'stream': stream, **changes})}".encode())

    def send(self, message: bytes) -> None:
        size = len(message)
        length = bytes([0x80 | size]) if size < 126 else bytes([0xFE]) + size.to_bytes(2, "big")
        self.connection.sendall(b"\x81" + length + b"\0\0\0\0" + message)

    def receive_frame(self) -> tuple[int, bytes]:
        def take(size: int) -> bytes:
            while len(self.data) < size:
                part = self.connection.recv(65536)
                if not part:
                    raise ConnectionError
                self.data += part
            taken, self.data = self.data[:size], self.data[size:]
            return taken

        kind, size = take(2)
        if size == 126:
            size = int.from_bytes(take(2), "big")
        return kind & 15, take(size)

    def receive(self) -> bytes:
        """Returns the next text."""
        while True:
            kind, data = self.receive_frame()
            if kind == 1:
                return data

    def wait_for_close(self) -> int:
        """Returns the code of the closing frame, or 0 if there is none."""
        with contextlib.suppress(ConnectionError):
            while True:
                kind, data = self.receive_frame()
                if kind == 8:
                    return int.from_bytes(data[:2], "big")
        return 0


def memory(demo: Demo) -> int:
    """The gateway's resident memory, in bytes."""
    with open(f"/proc/{demo.pid('gateway')}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_files(demo: Demo) -> int:
    return len(os.listdir(f"/proc/{demo.pid('gateway')}/fd"))
