"""worker.py MODE URL TEXT: answers with words of a book, and stops when the client leaves.

MODE is "presence" or "plain". "plain" does the same with nothing but NATS: it publishes each word to the request's
reply subject, and never learns that the client has left.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.client import Msg
from nats_presence import Request, StreamStoppedError, aio
from report import report

REPORT_INTERVAL = 0.1
HEARTBEAT_MS = 1000
"""More often than by default, so that a frozen gateway is noticed after 3 s instead of 15."""


@dataclass
class Question:
    """The payload of a request: NAME LENGTH PAUSE_MS PROMPT."""

    name: str
    length: int
    pause: float
    start: int

    @classmethod
    def parse(cls, data: bytes) -> Question:
        try:
            name, length, pause, _prompt = data.decode().split(" ", 3)
            question = cls(name, int(length), int(pause) / 1000, zlib.crc32(data))
        except ValueError:
            question = cls("", 0, 0, 0)
        if question.length < 1 or question.pause < 0:
            raise ValueError("the request is not NAME LENGTH PAUSE_MS PROMPT")
        return question


class Worker:
    def __init__(self, text: str) -> None:
        self.book = text.split()
        self.made: dict[str, list[int]] = defaultdict(list)
        self.sent = 0
        self.running = 0

    def word(self, question: Question, number: int) -> str:
        self.made[question.name].append(time.monotonic_ns())
        return self.book[(question.start + number) % len(self.book)]

    def report_work(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        report(
            "work",
            cpu_us=int((usage.ru_utime + usage.ru_stime) * 1e6),
            sent=self.sent,
            running=self.running,
            made=self.made,
        )
        self.made.clear()

    def report_begin(self, question: Question) -> None:
        self.running += 1
        report("begin", stream=question.name, length=question.length, running=self.running)

    def report_done(self, question: Question, status: int) -> None:
        at = time.monotonic_ns()
        self.report_work()
        self.running -= 1
        report("done", stream=question.name, status=status, running=self.running, at=at)

    async def report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL)
            if self.made:
                self.report_work()

    async def answer(self, request: Request, sender: aio.Sender) -> None:
        """Answers a request, in a task that is cancelled when the client leaves."""
        try:
            question = Question.parse(request.data)
        except ValueError as error:
            sender.error(str(error))
            return
        self.report_begin(question)
        try:
            for number in range(question.length):
                word = self.word(question, number)
                await sender.send(word)
                self.sent += 1
                await asyncio.sleep(question.pause)
            sender.end()
        except (asyncio.CancelledError, StreamStoppedError):
            self.report_done(question, sender.status)
            raise
        self.report_done(question, 0)

    async def serve(self, url: str) -> None:
        async with aio.connect(url, name="Python worker", heartbeat_ms=HEARTBEAT_MS) as conn:
            for subject in ("presence.any", "presence.python"):
                await conn.serve(subject, self.answer, queue="workers")
            report("ready")
            await asyncio.to_thread(sys.stdin.read)  # returns when the demo ends

    async def serve_plain(self, url: str) -> None:
        conn = await nats.connect(
            url, name="plain Python worker", max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=ignore
        )

        async def answer(question: Question, reply: str) -> None:
            """Answers a request as one would with NATS alone."""
            self.report_begin(question)
            for number in range(question.length):
                await conn.publish(reply, self.word(question, number).encode())
                self.sent += 1
                await asyncio.sleep(question.pause)
            await conn.publish(reply, b"__STREAM_END__")
            self.report_done(question, 0)

        tasks = set()

        async def begin(message: Msg) -> None:
            try:
                question = Question.parse(message.data)
            except ValueError as error:
                await conn.publish(message.reply, f"__STREAM_ERROR__:{error}".encode())
                return
            tasks.add(task := asyncio.create_task(answer(question, message.reply)))
            task.add_done_callback(tasks.discard)

        for subject in ("plain.any", "plain.python"):
            await conn.subscribe(subject, queue="workers", cb=begin)
        await conn.flush()
        report("ready")
        await asyncio.to_thread(sys.stdin.read)


async def ignore(error: Exception) -> None:
    """nats-py prints each failed attempt to reconnect unless there is such a function."""


async def main(mode: str, url: str, path: str) -> None:
    worker = Worker(Path(path).read_text())
    worker.report_work()
    reporting = asyncio.create_task(worker.report_regularly())
    await (worker.serve_plain if mode == "plain" else worker.serve)(url)
    reporting.cancel()


asyncio.run(main(*sys.argv[1:]))
