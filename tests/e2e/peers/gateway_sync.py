"""gateway_sync.py URL LANES [KEY=VALUE]...: gateway.c in Python, with a thread for each stream."""

from __future__ import annotations

import json
import sys
import threading

import nats_presence as presence


def emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def read(stream: presence.Stream, client: str) -> None:
    try:
        for message in stream:
            emit(event="data", client=client, data=message.decode())
        emit(event="end", client=client)
    except presence.PresenceError as error:
        emit(event="error", client=client, status=error.status, text=str(error), code=error.code)


options = dict(option.split("=", 1) for option in sys.argv[3:])
with presence.connect(sys.argv[1], lanes=sys.argv[2], **options) as conn:
    emit(event="ready")
    for line in sys.stdin:
        command, *words = line.rstrip("\n").split(" ", 3)
        if command == "request":
            subject, client, text = words
            try:
                stream = conn.stream(subject, text, client_id=client)
            except presence.PresenceError as error:
                emit(event="error", client=client, status=error.status, text=str(error))
            else:
                threading.Thread(target=read, args=(stream, client)).start()
        elif command == "leave":
            presence.mark_client_offline(words[0])
