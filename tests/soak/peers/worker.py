"""worker.py URL SUBJECT OPTIONS: worker.c in Python, with a pool of threads."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import nats_presence as presence
import soak

FURTHER = 10
THREADS = 60
lock = threading.Lock()
counts = Counter(served=0, accepted_after=0)


def send(request: presence.Request, sender: presence.Sender) -> None:
    numbers, _, what = request.data.decode().rpartition(" ")
    key, count, size, burst, pause = map(int, numbers.split())
    for first in range(0, count, burst):
        sender.send_many([soak.content(key, number, size) for number in range(first, min(first + burst, count))])
        time.sleep(pause / 1000)
    if what == "mark":
        presence.mark_client_offline(request.client_id)
    elif what == "fail":
        sender.error("asked for")
    else:
        sender.end()


def serve(request: presence.Request, sender: presence.Sender) -> None:
    with suppress(presence.PresenceError):
        send(request, sender)
    sent = sender.send_count
    for _ in range(FURTHER):
        with suppress(presence.PresenceError):
            sender.send("more")
    with lock:
        counts["accepted_after"] += sender.send_count - sent
        counts["served"] += 1


def tell_stats(ended: threading.Event) -> None:
    while not ended.wait(0.5):
        soak.tell_stats("stats", conns, **counts)


conns = [presence.connect(sys.argv[1], **soak.connection_options(sys.argv[3], level)) for level in range(2)]
for conn, subject in zip(conns, [sys.argv[2], f"{sys.argv[2]}.0"]):
    conn.service(subject, queue="soak", threads=THREADS, max_streams=10_000)(serve)
ended = threading.Event()
teller = threading.Thread(target=tell_stats, args=(ended,))
soak.emit(event="ready")
teller.start()
for _ in sys.stdin:  # "quiet" is the only command
    soak.give_back()
    soak.tell_stats("quiet", conns, **counts)
ended.set()
teller.join()
for conn in conns:
    conn.close()
