"""bulk.py worker URL SUBJECT [OPTION=VALUE]... and bulk.py gateway URL [OPTION=VALUE]...: streams of numbered messages.

The gateway reads requests "SUBJECT CLIENT COUNT SIZE [PAUSE]" from standard input, and prints how each stream ended and
how many of its messages arrived; its reader waits PAUSE seconds after each message.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import nats_presence as presence


def emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def work(request: presence.Request, sender: presence.Sender) -> None:
    count, size = map(int, request.data.decode().split(" "))
    try:
        for number in range(count):
            sender.send(b"%d" % number + b"." * (size - len(b"%d" % number)))
        sender.end()
    except presence.PresenceError as error:
        emit(event="stopped", client=request.client_id, status=error.status)


def read(conn: presence.Connection, subject: str, client: str, text: str, pause: float) -> None:
    came, why = 0, 0
    try:
        for message in conn.stream(subject, text, client_id=client):
            assert message.rstrip(b".") == b"%d" % came, (message[:20], came)
            came += 1
            if pause:
                time.sleep(pause)
    except presence.PresenceError as error:
        why = error.status
    emit(event="end", client=client, came=came, why=why, connects=conn.stats()["connects"])


is_worker = sys.argv[1] == "worker"
options = dict(option.split("=", 1) for option in sys.argv[4 if is_worker else 3 :])
with presence.connect(sys.argv[2], **options) as conn:
    if is_worker:
        conn.service(sys.argv[3])(work)
    emit(event="ready")
    for line in sys.stdin:
        subject, client, count, size, *pause = line.split()
        arguments = (conn, subject, client, f"{count} {size}", float(pause[0]) if pause else 0.0)
        threading.Thread(target=read, args=arguments).start()
