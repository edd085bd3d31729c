"""A TCP proxy before nats-server: what a client sends can be seen, lost on the way, and the connection cut."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Listens on a port of its own, as long as the process lives."""

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
        """All that clients sent."""
        self.swallowed = threading.Event()
        """The mark has passed; what clients send is lost."""
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow_after(self, mark: bytes) -> None:
        """What clients send after the next `mark` is lost, until resume. Nobody is told."""
        with self._lock:
            self._mark, self._cuts_at_mark = mark, False

    def cut_after(self, mark: bytes) -> None:
        """As cut, at the moment when the next `mark` has passed in one direction or the other."""
        with self._lock:
            self._mark, self._cuts_at_mark = mark, True

    def cut(self) -> None:
        """Ends all connections, and takes none until resume."""
        with self._lock:
            self._cut()

    def resume(self) -> None:
        with self._lock:
            self._is_cut = False
            self._mark = b""
            self.swallowed.clear()

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
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            is_client = target.getpeername()[1] == self._server_port
            before = b""
            while data := source.recv(65536):
                with self._lock:
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
                            # First: whoever has waited for it may cut the connection at once.
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
    """How much of `data` comes up to the end of `mark`, which may have begun in what came before; None: all."""
    found = (before + data).find(mark) if mark else -1
    return None if found < 0 else found + len(mark) - len(before)
