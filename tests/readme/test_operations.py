"""docs/operations.md and docs/faq.md name what exists, and a deploy as operations.md describes it loses nothing."""

from __future__ import annotations

import re
import threading
from typing import Any

from harness import ROOT, TIMEOUT, Server

PAGE = (ROOT / "docs/operations.md").read_text()
HEADER = (ROOT / "include/nats_presence.h").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_all_statistics_are_explained() -> None:
    fields = re.findall(r"uint64_t (\w+);", HEADER.split("typedef struct presence_stats {")[1].split("}")[0])
    rows = "\n".join(re.findall(r"^\| ([^|]*) \|", section("What to watch"), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(fields)


def test_all_statuses_of_streams_are_explained() -> None:
    of_calls = {"OK", "INVALID", "TOO_LARGE", "RESERVED", "FORKED"}
    statuses = set(re.findall(r"PRESENCE_([A-Z_]+) = -?\d+,", HEADER.split("enum presence_event_kind")[0])) - of_calls
    assert set(re.findall(r"^\| `PRESENCE_(\w+)` \|", section("Why a stream stopped"), re.MULTILINE)) == statuses


def test_texts_of_errors_are_those_of_the_library() -> None:
    table = section("Why a stream stopped").split("| text of a")[1].split("\n\n")[0]
    texts = [text for row in re.findall(r"^\| (the [^|]*) \|", table, re.MULTILINE) for text in row.split(", ")]
    sources = ["src/worker/sender.rs", "src/nats/outbox.rs", "bindings/go/service.go"]
    code = "".join((ROOT / source).read_text() for source in sources)
    assert len(texts) == 5
    assert all(f'"{text}"' in code for text in texts)


def test_options_exist() -> None:
    options = set(re.findall(r'#define PRESENCE_OPTION_\w+ "([\w.]+)"', HEADER)) | {"max_streams", "drain_ms"}
    for page in [PAGE, (ROOT / "docs/faq.md").read_text()]:
        named = set(re.findall(r"`([a-z]+(?:_[a-z]+)*_(?:ms|bytes|threads|file|socket|streams))\b", page))
        # Fields of presence_stats, and one of nats-server's.
        assert named - {"bytes_waiting", "pending_bytes"} <= options


def test_a_worker_is_replaced_without_losing_streams(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bindings/python"))
    import nats_presence

    goes_on = threading.Event()
    served: list[str] = []

    def start(server: Server, name: str) -> Any:
        def handler(request: Any, sender: Any) -> None:
            served.append(name)
            sender.send(name)
            assert request.data == b"short" or goes_on.wait(TIMEOUT)
            sender.send("end")

        worker = nats_presence.connect(server.url)
        worker.serve("deploy", handler, queue="workers", max_streams=1000)
        return worker

    server = Server()
    try:
        with nats_presence.connect(server.url) as gateway:
            options = {"timeout": TIMEOUT, "retries": 20}
            old = start(server, "old")
            running = gateway.stream("deploy", b"long", **options)
            assert next(running) == b"old"
            with start(server, "new"):
                streams = [gateway.stream("deploy", b"short", **options) for _ in range(50)]
                old.stop()
                streams += [gateway.stream("deploy", b"short", **options) for _ in range(50)]
                assert all(list(stream) in ([b"old", b"end"], [b"new", b"end"]) for stream in streams)
                goes_on.set()
                assert list(running) == [b"end"]
                old.run()
                old.close()
                assert served.count("new") >= 50
    finally:
        server.kill()
