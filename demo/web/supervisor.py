"""Runs the programs of the demo, kills, freezes and restarts them, and counts what they report."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from programs import Command, DemoError, Event, Process, Program, Server
from tally import BUCKETS_MS, LANGUAGES, MODES, Stream, Tally, duration

READY_TIMEOUT = 30.0
STILL_WAITING = 5.0
"""Seconds after which those who still wait for a killed worker are counted."""


class Supervisor:
    def __init__(
        self, workers: dict[str, Command], gateway: Command, gateway_name: str, text: Path, running: ExitStack
    ) -> None:
        self.tally = Tally()
        self.gateway_name = {"go": "Go", "python": "Python", "c": "C"}[gateway_name]
        self.gateway_port = 0
        self.is_frozen = False
        self._worker_commands, self._gateway_command, self._text = workers, gateway, text
        self._running = running
        self._restarts = {"nats-server": 0, "gateway": 0, **{f"{m} {name}": 0 for m in MODES for name in LANGUAGES}}
        self._workers: dict[tuple[str, str], Program] = {}
        self._roles: dict[Program, tuple[str, str]] = {}
        self._changed = asyncio.Event()
        self._stopping = False
        self._gateway: Program
        self._server: Server

    async def start(self, host: str, origin: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._host, self._origin = host, origin
        self._server = self._running.enter_context(Server())
        for mode in MODES:
            for language in LANGUAGES:
                self._start_worker(mode, language)
        self._start_gateway()
        await self._until(lambda: all(program.is_ready for program in [*self._workers.values(), self._gateway]))

    async def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise DemoError(f"not all programs were ready after {READY_TIMEOUT:.0f} s")
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), 1)
            except asyncio.TimeoutError:
                continue

    def stop(self) -> None:
        self._stopping = True

    # Programs print events, which their threads put here.

    def put(self, event: tuple[Program, Event]) -> None:
        with suppress(RuntimeError):  # The loop may have ended.
            self._loop.call_soon_threadsafe(self._handle, *event)

    def _handle(self, program: Program, event: Event) -> None:
        self._changed.set()
        if event["event"] == "ready":
            program.is_ready = True
            if program is self._gateway:
                self.gateway_port = event["port"]
        if event["event"] == "exit":
            self._handle_exit(program, event["code"])
        elif program is self._gateway:
            self.tally.handle_gateway(event)
        elif role := self._roles.get(program):
            self.tally.handle_worker(*role, event)

    def _handle_exit(self, program: Program, code: int) -> None:
        if self._stopping or program.exit_code is not None:
            return
        program.exit_code = code
        role = self._roles.pop(program, None)
        if role and self._workers[role] is program:
            self.tally.add_log(f"The {program} exited with code {code}. It is started again.")
            self.tally.handle_worker_exit(*role, time.monotonic_ns())
            self._restart_worker(*role)
        elif program is self._gateway:
            self.tally.add_log(f"The {program} exited with code {code}. It is started again.")
            self._lose_gateway(time.monotonic_ns(), "gateway killed")
            self._restart_gateway()

    def _start_worker(self, mode: str, language: str) -> None:
        name = f"worker in {language}" + (" with plain NATS" if mode == "plain" else "")
        command = [*self._worker_commands[language], mode, self._server.url, self._text]
        program = self._running.enter_context(Program(name, command, self))
        self._workers[mode, language], self._roles[program] = program, (mode, language)

    def _restart_worker(self, mode: str, language: str) -> None:
        self._restarts[f"{mode} {language}"] += 1
        self._start_worker(mode, language)

    def _start_gateway(self) -> None:
        address = f"{self._host}:{self.gateway_port}"
        command = [*self._gateway_command, self._server.url, address, self._origin]
        self._gateway = self._running.enter_context(Program(f"gateway in {self.gateway_name}", command, self))

    def _restart_gateway(self) -> None:
        self._restarts["gateway"] += 1
        self.is_frozen, self.tally.frozen_at = False, 0
        self._start_gateway()

    # What the page's buttons do. Each returns what it has done.

    def kill_gateway(self) -> str:
        streams = self.tally.running()
        at = self._kill(self._gateway)
        self._lose_gateway(at, "gateway killed")
        self.tally.add_log(f"The gateway was killed (SIGKILL) while {count(streams, 'stream')} ran.")
        self._restart_gateway()
        self._report_stops(streams, at, "The gateway was killed")
        return "killed"

    def freeze_gateway(self) -> str:
        if self.is_frozen:
            return "frozen already"
        streams = self.tally.running()
        os.kill(self._gateway.process.pid, signal.SIGSTOP)
        self.is_frozen, self.tally.frozen_at = True, time.monotonic_ns()
        self.tally.add_log(f"The gateway was frozen (SIGSTOP) while {count(streams, 'stream')} ran.")
        self._report_stops(streams, self.tally.frozen_at, "The gateway was frozen")
        return "frozen"

    def thaw_gateway(self) -> str:
        if not self.is_frozen:
            return "not frozen"
        frozen_at = self.tally.frozen_at
        self.is_frozen, self.tally.frozen_at = False, 0
        os.kill(self._gateway.process.pid, signal.SIGCONT)
        self.tally.add_log(
            f"The gateway was thawed (SIGCONT) after {duration((time.monotonic_ns() - frozen_at) / 1e6)}."
        )
        return "thawed"

    def kill_worker(self, mode: str, language: str) -> str:
        program = self._workers[mode, language]
        streams = [stream for stream in self.tally.running(mode) if stream.language == language]
        self._roles.pop(program, None)
        at = self._kill(program)
        self.tally.handle_worker_exit(mode, language, at)
        self.tally.add_log(f"The {program} was killed (SIGKILL) while it served {count(streams, 'stream')}.")
        self._restart_worker(mode, language)

        def describe(lost: list[Stream]) -> str:
            known = [stream.ended["at"] - at for stream in lost if stream.ended]
            text = f"The {program} was killed: "
            if known:
                text += f"the gateway knew of {count(known, 'stream')} after {duration(max(known) / 1e6)} at most. "
            if waiting := len(lost) - len(known):
                text += f"{count(range(waiting), 'client')} still wait{'s' if waiting == 1 else ''} for it."
            return text

        if streams:
            self.tally.expect(streams, lambda stream: bool(stream.ended), describe, STILL_WAITING)
        return "killed"

    def restart_server(self) -> str:
        streams = self.tally.running()
        began = time.monotonic()
        self._kill(self._server)
        self._restarts["nats-server"] += 1
        self._server = self._running.enter_context(Server(self._server.port))
        took = duration((time.monotonic() - began) * 1000)
        self.tally.add_log(
            f"nats-server was killed, and ready again {took} later, while {count(streams, 'stream')} ran."
        )

        def describe(survivors: list[Stream]) -> str:
            whole = [s for s in survivors if s.ended and not s.ended["status"]]
            left = [s for s in survivors if s.left_at]
            broken = len(survivors) - len(whole) - len(left)
            return (
                f"Of {count(survivors, 'stream')} that ran when nats-server was killed, {len(whole)} arrived complete,"
                f" {len(left)} were left by their clients, {broken} broke."
            )

        if streams:
            self.tally.expect(streams, lambda stream: bool(stream.ended and stream.done), describe)
        return "restarted"

    def _kill(self, process: Process) -> int:
        """Returns when it was killed."""
        at = time.monotonic_ns()
        process.process.kill()
        process.process.wait()
        return at

    def _lose_gateway(self, at: int, why: str) -> None:
        for stream in self.tally.running():
            self.tally.leave(stream, at, why)

    def _report_stops(self, streams: list[Stream], at: int, what: str) -> None:
        """Logs how fast the workers stopped."""

        def describe(stopped: list[Stream]) -> str:
            done = [stream for stream in stopped if stream.done and not stream.done.get("killed")]
            texts = [what + ":"]
            for mode in MODES:
                ours = [stream for stream in done if stream.mode == mode]
                if not ours:
                    continue
                last = duration(max(stream.done["at"] - at for stream in ours if stream.done) / 1e6)
                saved, wasted = sum(s.not_computed for s in ours), sum(s.wasted for s in ours)
                if mode == "presence":
                    texts.append(
                        f"the workers of {count(ours, 'stream')} stopped within {last};"
                        f" {saved} messages were not computed."
                    )
                else:
                    texts.append(
                        f"the workers with plain NATS went on for {last} and computed {wasted} messages for nobody."
                    )
            if going_on := len(stopped) - len(done):
                texts.append(f"{count(range(going_on), 'stream')} still run{'s' if going_on == 1 else ''}.")
            return " ".join(texts)

        if streams:
            self.tally.expect(streams, lambda stream: bool(stream.done), describe)

    # What the page shows.

    def state(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "gateway": {
                "url": f"{self._host}:{self.gateway_port}",
                "language": self.gateway_name,
                "ready": self._gateway.is_ready,
                "frozen": self.is_frozen,
            },
            "processes": [
                self._process("nats-server", self._server),
                self._process("gateway", self._gateway),
                *(self._process(f"{mode} {name}", program) for (mode, name), program in self._workers.items()),
            ],
            "workers": [
                {"mode": mode, "language": language, **asdict(counts)}
                for (mode, language), counts in tally.counts.items()
            ],
            "stops": {"limits_ms": BUCKETS_MS, **tally.stops},
            "log": list(tally.log),
        }

    def _process(self, name: str, process: Process) -> dict[str, Any]:
        alive = process.process.poll() is None
        return {"name": name, "pid": process.process.pid, "alive": alive, "restarts": self._restarts[name]}


def count(things: Any, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
