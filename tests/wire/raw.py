"""A NATS peer on a plain TCP socket: it sends and receives exact bytes."""

from __future__ import annotations

import itertools
import json
import queue
import re
import socket
import threading
from typing import BinaryIO, NamedTuple

from harness import TIMEOUT


class Message(NamedTuple):
    subject: bytes
    reply: bytes
    header: bytes
    """From "NATS/1.0" to the empty line; b"" if the message has none."""
    payload: bytes


def pub(subject: str, payload: bytes = b"", *, reply: str = "", header: bytes = b"") -> bytes:
    """A message in the protocol's form. `header`: lines with CR LF, without the first and the empty one."""
    if not header:
        return b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), reply.encode(), len(payload), payload)
    block = b"NATS/1.0\r\n" + header + b"\r\n"
    sizes = b"%d %d" % (len(block), len(block) + len(payload))
    return b"HPUB %s %s %s\r\n%s%s\r\n" % (subject.encode(), reply.encode(), sizes, block, payload)


class Subscription:
    """The messages to a subject, in order."""

    def __init__(self) -> None:
        self._messages: queue.Queue[Message] = queue.Queue()

    def put(self, message: Message) -> None:
        self._messages.put(message)

    def next(self, timeout: float = TIMEOUT) -> Message:
        """Waits for the next message; queue.Empty after the timeout."""
        return self._messages.get(timeout=timeout)

    def payload(self) -> bytes:
        return self.next().payload

    def payloads(self) -> list[bytes]:
        """The messages that have arrived and were not taken yet."""
        return [self._messages.get_nowait().payload for _ in range(self._messages.qsize())]


class RawPeer:
    """A connection of its own to nats-server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._subscriptions: dict[bytes, Subscription] = {}
        self._numbers = itertools.count(1)
        self._pongs: queue.Queue[bytes] = queue.Queue()
        self.send(b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\n')
        threading.Thread(target=self._read, daemon=True).start()
        self.flush()

    def send(self, data: bytes) -> None:
        """Writes to the socket once."""
        self._socket.sendall(data)

    def flush(self) -> None:
        """Waits until the server has processed everything sent; fails with the server's error, if any."""
        self.send(b"PING\r\n")
        answer = self._pongs.get(timeout=TIMEOUT)
        assert answer == b"PONG", answer

    def subscribe(self, subject: str, group: str = "") -> Subscription:
        subscription = Subscription()
        sid = b"%d" % next(self._numbers)
        self._subscriptions[sid] = subscription
        self.send(b"SUB %s %s %s\r\n" % (subject.encode(), group.encode(), sid))
        self.flush()
        return subscription

    def inbox(self) -> tuple[str, Subscription]:
        """A subject of its own for answers."""
        subject = f"_INBOX.raw.{next(self._numbers)}"
        return subject, self.subscribe(subject)

    def request(self, subject: str, client: str, payload: bytes = b"") -> Subscription:
        """Requests a stream on level 0; returns its inbox. Without a client there is no header."""
        reply, answers = self.inbox()
        header = f"Connect-ID: {client}\r\n".encode() if client else b""
        self.send(pub(subject, payload, reply=reply, header=header))
        return answers

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            try:
                while line := lines.readline():
                    self._handle(line.split(), lines)
            except OSError:
                pass
        self._pongs.put(b"the connection is closed")

    def _handle(self, words: list[bytes], lines: BinaryIO) -> None:
        if words[0] == b"PING":
            self.send(b"PONG\r\n")
        elif words[0] == b"INFO":
            self.server_id = json.loads(b" ".join(words[1:]))["server_id"]
        elif words[0] in (b"PONG", b"-ERR"):
            self._pongs.put(b" ".join(words))
        elif words[0] in (b"MSG", b"HMSG"):
            # MSG subject sid [reply] size · HMSG subject sid [reply] header-size size
            sizes = 1 if words[0] == b"MSG" else 2
            subject, sid, *reply = words[1:-sizes]
            body = lines.read(int(words[-1]) + 2)[:-2]
            split = int(words[-2]) if sizes == 2 else 0
            self._subscriptions[sid].put(Message(subject, b"".join(reply), body[:split], body[split:]))


# Parts of the library's messages that differ each time.
INBOX = re.compile(rb"_INBOX\.[0-9a-f]{32}\.[0-9a-f]{1,16}")
ORIGIN = re.compile(rb"NATS/1\.0\r\nPresence-Origin: ([0-9a-f]{32}) [0-9]+ [0-9]+( again)?\r\n\r\n")
LANE = re.compile(rb"Presence-Lane: 1 _INBOX\.[0-9a-f]{32}\.lane\.[0-9a-f]{32} [0-9a-f]{16} 262144")
