"""A TCP proxy in front of nats-server: it records or loses clients' data, and cuts, resets or slows connections."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from contextlib import suppress


class Proxy:
    """Listens on its own port until the process ends."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"nats://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_cut = False
        self._mark = b""
        self._cuts_at_mark = False
        self.sent = b""
        """Everything that clients sent."""
        self.swallowed = threading.Event()
        """Set when the mark has passed and clients' data is being lost."""
        self.delay = 0.0
        """The delay of all data, in seconds."""
        self.piece = 65536
        """The most bytes that are forwarded together."""
        self._passes = {"to server": threading.Event(), "to client": threading.Event()}
        for direction in self._passes.values():
            direction.set()
        self._resets_after: int | None = None
        self._resets = threading.Semaphore(0)
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow_after(self, mark: bytes) -> None:
        """After the next `mark`, loses what clients send, until resume, without breaking a connection."""
        with self._lock:
            self._mark, self._cuts_at_mark = mark, False

    def cut_after(self, mark: bytes) -> None:
        """Like cut, as soon as the next `mark` has passed in either direction."""
        with self._lock:
            self._mark, self._cuts_at_mark = mark, True

    def cut(self) -> None:
        """Ends all connections, and accepts none until resume."""
        with self._lock:
            self._cut()

    def resume(self) -> None:
        with self._lock:
            self._is_cut = False
            self._mark = b""
            self.swallowed.clear()

    def hold(self, direction: str) -> None:
        """Forwards nothing "to server", or "to client", until let_go, like a network that loses every packet."""
        self._passes[direction].clear()

    def let_go(self) -> None:
        """Forwards what was held: TCP retransmits lost packets."""
        for direction in self._passes.values():
            direction.set()

    def reset_after(self, count: int) -> None:
        """Resets (RST) all connections after this many more bytes, in both directions together."""
        with self._lock:
            self._resets_after = count

    def wait_for_reset(self, timeout: float) -> bool:
        return self._resets.acquire(timeout=timeout)

    def _reset(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                # SO_LINGER 0 makes close send RST; shutdown ends the other thread's recv.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RD)
                end.close()
        self._sockets.clear()
        self._resets.release()

    def _cut(self) -> None:
        self._is_cut = True
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with self._lock, suppress(OSError):
                if self._is_cut:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._server_port))
                for end in [client, server]:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            is_client = target.getpeername()[1] == self._server_port
            before = b""
            passes = self._passes["to server" if is_client else "to client"]
            while data := source.recv(self.piece):
                if self.delay:
                    time.sleep(self.delay)
                passes.wait()
                with self._lock:
                    if self._resets_after is not None:
                        data, self._resets_after = data[: self._resets_after], self._resets_after - len(data)
                        if self._resets_after <= 0:
                            self._resets_after = None
                            with suppress(OSError):
                                target.sendall(data)
                            self._reset()
                            return
                    if is_client:
                        self.sent += data
                        if self.swallowed.is_set():
                            continue
                    mark = self._mark if is_client or self._cuts_at_mark else b""
                    passing = up_to(mark, before, data)
                    before = (before + data)[1 - len(mark) :] if len(mark) > 1 else b""
                    is_cut = passing is not None and self._cuts_at_mark
                    if passing is not None:
                        self._mark = b""
                        data = data[:passing]
                        if not is_cut:
                            # First: a waiting test may cut the connection at once.
                            target.sendall(data)
                            self.swallowed.set()
                            continue
                target.sendall(data)
                if is_cut:
                    self.cut()
        for end in [source, target]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def up_to(mark: bytes, before: bytes, data: bytes) -> int | None:
    """The number of bytes of `data` up to the end of `mark`, which may have begun in earlier data; None: all of it."""
    found = (before + data).find(mark) if mark else -1
    return None if found < 0 else found + len(mark) - len(before)


Waiting = queue.Queue[tuple[float, bytes]]
"""Data on a link, and when it may be forwarded."""


class Link:
    """A TCP proxy that is a long or slow link: all data is delayed, and at most `rate` bytes a second pass."""

    def __init__(self, server_port: int, delay: float = 0.0, rate: float = 0.0) -> None:
        self._server_port = server_port
        self.delay = delay
        """Seconds, in each direction."""
        self.rate = rate
        """Bytes a second in each direction; 0: unlimited."""
        self.to_client = 0
        self.to_server = 0
        """Bytes that have passed."""
        self._sockets: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self._ways = {True: _Way(), False: _Way()}
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> int:
        """The number of connections so far."""
        return len(self._sockets)

    def reset(self) -> None:
        """Resets (RST) all connections; new ones are accepted at once."""
        for pair in self._sockets:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RD)
                    end.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.socket()
            for end in [client, server]:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.rate:
                    # Small socket buffers: the queue must build up in nats-server, not in the kernel.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            server.connect(("127.0.0.1", self._server_port))
            self._sockets.append((client, server))
            for source, target, is_to_server in [(client, server, True), (server, client, False)]:
                waiting: Waiting = queue.Queue()
                space = threading.Semaphore(8 if self.rate else 65536)
                threading.Thread(target=self._take, args=(source, waiting, space), daemon=True).start()
                threading.Thread(target=self._give, args=(target, waiting, space, is_to_server), daemon=True).start()

    def _take(self, source: socket.socket, waiting: Waiting, space: threading.Semaphore) -> None:
        with suppress(OSError):
            while data := source.recv(16384):
                waiting.put((time.monotonic() + self.delay, data))
                space.acquire()
        waiting.put((0.0, b""))

    def _give(
        self,
        target: socket.socket,
        waiting: Waiting,
        space: threading.Semaphore,
        is_to_server: bool,
    ) -> None:
        way = self._ways[is_to_server]
        with suppress(OSError):
            while True:
                due, data = waiting.get()
                if not data:
                    break
                if self.rate:
                    due = max(due, way.pass_after(len(data) / self.rate))
                time.sleep(max(0.0, due - time.monotonic()))
                if is_to_server:
                    self.to_server += len(data)
                else:
                    self.to_client += len(data)
                target.sendall(data)
                space.release()
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


class _Way:
    """One direction of a link, shared by all its connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_after(self, seconds: float) -> float:
        """The time at which data that takes this long has passed."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + seconds
            return self._free_at
