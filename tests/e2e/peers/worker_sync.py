"""worker_sync.py URL SUBJECT LANES [KEY=VALUE]...: worker.c in Python, with threads."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress

import nats_presence as presence

FURTHER = 100
finishing = threading.Event()


def emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def answer(request: presence.Request, sender: presence.Sender) -> None:
    what, _, argument = request.data.decode().partition(" ")
    count = {"fail": 1, "code": 1, "endless": sys.maxsize}.get(what) or int(argument)
    why = 0
    try:
        while sender.send_count < count and not (what == "endless" and finishing.is_set()):
            sender.send(f"{request.client_id} {sender.send_count}")
            if what == "endless":
                time.sleep(0.001)
        if what == "fail":
            sender.error(argument)
        elif what == "code":
            code, _, text = argument.partition(" ")
            sender.error(text, code=int(code))
        else:
            sender.end()
    except presence.PresenceError as error:
        why = error.status
    sent = sender.send_count
    for _ in range(FURTHER):
        with suppress(presence.PresenceError):
            sender.send("more")
    emit(event="done", client=request.client_id, sent=sent, why=why, accepted=sender.send_count - sent)


options = dict(option.split("=", 1) for option in sys.argv[4:])
with presence.connect(sys.argv[1], lanes=sys.argv[3], **options) as conn:
    conn.service(sys.argv[2], queue="workers")(answer)
    emit(event="ready")
    for _ in sys.stdin:  # "finish" is the only command
        finishing.set()
