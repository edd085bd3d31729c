"""Both roles once more, with a common client library at the other end: nats-py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

import nats
from conftest import Connect, Shell
from harness import TIMEOUT, Event, Server
from lane_codec import NEW, Frame, LaneMessage, accept, cancel, data, decode, encode, end, from_u64
from nats.aio.client import Client
from nats.aio.msg import Msg

Test = Callable[[Connect, Server], Coroutine[None, None, None]]


def asynchronous(test: Test) -> Callable[[Connect, Server], None]:
    """Runs a coroutine as a test, without a plugin."""

    @wraps(test)
    def run(connect: Connect, server: Server) -> None:
        asyncio.run(asyncio.wait_for(test(connect, server), 3 * TIMEOUT))  # for all that it waits for

    return run


@asynccontextmanager
async def peer(server: Server) -> AsyncIterator[Client]:
    client = await nats.connect(server.url)
    yield client
    await client.close()


@asynchronous
async def test_worker_serves_nats_py(connect: Connect, server: Server) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    async with peer(server) as client:
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        await client.publish("llm.generate", b"hello", reply=inbox, headers={"Connect-ID": "alice"})
        await client.flush()
        request = worker.wait(event="REQUEST")
        assert (request["client"], request["data"]) == ("alice", "hello")
        worker.do("flood 1 1000")
        assert [(await answers.next_msg(TIMEOUT)).data for _ in range(1000)] == [b"%d" % i for i in range(1000)]
        await client.publish("client.offline", b"alice")
        await client.flush()
        assert worker.wait(event="STOPPED")["status"] == "OFFLINE"
        assert worker.ask("send 1 more")["status"] == "OFFLINE"
        assert (await answers.next_msg(TIMEOUT)).data == b"__STREAM_ERROR__:the client is offline"


@asynchronous
async def test_gateway_reads_from_nats_py(connect: Connect, server: Server) -> None:
    gateway = connect()
    gateway.do("listen")
    offline: asyncio.Queue[Msg] = asyncio.Queue()

    async def serve(request: Msg) -> None:
        assert request.headers
        assert request.headers["Connect-ID"] == request.data.decode()
        assert request.headers.keys() == {"Connect-ID", "Presence-Lane"}
        for i in range(1000):
            await request.respond(b"%d" % i)
        if request.data == b"alice":
            await request.respond(b"__STREAM_END__")
        if request.data == b"bob":
            await request.respond(b"__STREAM_ERROR__:no such model")

    async with peer(server) as client:
        await client.subscribe("llm.generate", queue="workers", cb=serve)
        await client.subscribe("client.offline", cb=offline.put)
        await client.flush()
        for tag, name in enumerate(["alice", "bob", "carol", "dave"], 1):
            gateway.do(f"request {tag} llm.generate {name} {name}")
        for tag in range(1, 5):
            received = await asyncio.to_thread(gateway.wait_for_many, 1000, event="DATA", tag=tag)
            assert [event["data"] for event in received] == [str(i) for i in range(1000)]
        await wait_in_thread(gateway, event="END", tag=1)
        assert (await wait_in_thread(gateway, event="ERROR", tag=2))["data"] == "no such model"
        gateway.do("cancel 3")
        assert (await offline.get()).data == b"carol"
        await client.publish("client.offline", b"dave")
        await client.flush()
        assert (await wait_in_thread(gateway, event="ERROR", tag=4))["status"] == "OFFLINE"


@asynchronous
async def test_worker_serves_nats_py_on_a_lane(connect: Connect, server: Server) -> None:
    worker = connect()
    worker.do("serve llm.generate workers 0")
    async with peer(server) as client:
        offer = client.new_inbox()
        messages = await client.subscribe(offer)
        level_0 = await client.subscribe(f"{offer}.reply")
        headers = {"Connect-ID": "alice", "Presence-Lane": f"1 {offer} 0000000000000007 1000000"}
        await client.publish("llm.generate", b"hello", reply=f"{offer}.reply", headers=headers)
        await client.flush()
        worker.wait(event="REQUEST", client="alice")
        worker.do("flood 1 1000")
        worker.do("end 1")
        frames: list[Frame] = []
        while len(frames) < 1002:
            message = await messages.next_msg(TIMEOUT)
            assert not message.headers
            content = decode(message.data)
            frames += content.frames
            await client.publish(message.reply, encode(LaneMessage(0, 0, content.sequence)), reply=f"{offer}-1")
        assert frames == [accept(1, 7), *(data(1, b"%d" % i) for i in range(1000)), end(1)]
        assert level_0.pending_msgs == 0
        # Another stream is cancelled.
        await client.publish("llm.generate", b"hello", reply=f"{offer}.reply", headers=headers)
        message = await messages.next_msg(TIMEOUT)
        while not decode(message.data).frames:
            message = await messages.next_msg(TIMEOUT)
        assert decode(message.data).frames == (accept(2, 7),)
        content = decode(message.data)
        left = encode(LaneMessage(0, 1, content.sequence, (cancel(2, 2),)))
        await client.publish(message.reply, left, reply=f"{offer}-1")
        await client.flush()
        assert (await wait_in_thread(worker, event="STOPPED"))["status"] == "OFFLINE"


@asynchronous
async def test_gateway_reads_from_nats_py_on_a_lane(connect: Connect, server: Server) -> None:
    gateway = connect()
    gateway.do("option stream_buffer_bytes 10000")
    async with peer(server) as client:
        requests = await client.subscribe("llm.generate", queue="workers")
        await client.flush()
        gateway.do("request 1 llm.generate alice hello")
        request = await requests.next_msg(TIMEOUT)
        assert request.headers
        version, offer, key, window = request.headers["Presence-Lane"].split(" ")
        assert (version, window) == ("1", "10000")
        own = client.new_inbox()
        messages = await client.subscribe(own)
        first = encode(LaneMessage(NEW, 1, 0, (accept(1, int(key, 16)), data(1, b"0"))))
        await client.publish(offer, first, reply=own)
        # Send as much as the window allows, and more when credit arrives.
        credit, received = 10_000 - 65, 0
        for i in range(1, 1001):
            frame = data(1, b"%d" % i) if i < 1000 else end(1)
            while credit < 100:
                content = decode((await messages.next_msg(TIMEOUT)).data)
                received = max(received, content.sequence)
                credit += sum(from_u64(frame.body) for frame in content.frames)
            credit -= len(frame.body) + 64
            await client.publish(offer, encode(LaneMessage(0, i + 1, received, (frame,))), reply=own)
        await wait_in_thread(gateway, event="END")
        assert [gateway.wait(event="DATA")["data"] for _ in range(1000)] == [str(i) for i in range(1000)]
        assert received > 5


async def wait_in_thread(gateway: Shell, **fields: Any) -> Event:
    """Waits for an event while the peer works on."""
    return await asyncio.to_thread(lambda: gateway.wait(**fields))
