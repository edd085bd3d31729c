"""A JetStream stream that captures requests, like an audit, acknowledges each of them at its reply subject."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
from conftest import Connect
from harness import Server

MESSAGES = [str(i) for i in range(100)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server("-js", "-sd", str(tmp_path))
    yield server
    server.kill()


async def capture(url: str, **options: object) -> None:
    client = await nats.connect(url)
    await client.jetstream().add_stream(name="AUDIT", subjects=["llm.>"], **options)
    await client.close()


async def captured(url: str) -> int:
    client = await nats.connect(url)
    count = (await client.jetstream().stream_info("AUDIT")).state.messages
    await client.close()
    return count


@pytest.mark.parametrize("gateway_lanes", ["true", "false"])
@pytest.mark.parametrize("worker_lanes", ["true", "false"])
def test_publish_acks_of_an_audit_are_ignored(
    server: Server, connect: Connect, worker_lanes: str, gateway_lanes: str
) -> None:
    asyncio.run(capture(server.url))
    worker = connect("", f"lanes={worker_lanes}")
    gateway = connect("", f"lanes={gateway_lanes}")
    worker.do("serve llm.generate workers 0")
    for tag in range(1, 21):
        gateway.do(f"request {tag} llm.generate alice hello")
        worker.wait(event="REQUEST")
        worker.do(f"flood {tag} {len(MESSAGES)}")
        worker.do(f"end {tag}")
        assert [gateway.wait(event="DATA", tag=tag)["data"] for _ in MESSAGES] == MESSAGES
        gateway.wait(event="END", tag=tag)
    assert asyncio.run(captured(server.url)) == 20


def test_refusals_of_a_full_audit_are_ignored(server: Server, connect: Connect) -> None:
    asyncio.run(capture(server.url, max_msgs=1, discard=nats.js.api.DiscardPolicy.NEW))
    worker, gateway = connect(), connect("", "lanes=false")
    worker.do("serve llm.generate workers 0")
    for tag in (1, 2):
        gateway.do(f"request {tag} llm.generate alice hello")
        worker.wait(event="REQUEST")
        worker.do(f"send {tag} one")
        assert gateway.wait(event="DATA", tag=tag)["data"] == "one"
        worker.do(f"end {tag}")
        gateway.wait(event="END", tag=tag)
    assert gateway.ask("stats")["messages_ignored"] == 2
