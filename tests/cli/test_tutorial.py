"""Runs docs/tutorial-shell.md: types its commands into two terminals, and compares what they show."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

from conftest import PROGRAM
from harness import ROOT, TIMEOUT, Server

BLOCKS = re.findall(r"```terminal-(\d)\n(.*?)```", (ROOT / "docs/tutorial-shell.md").read_text(), re.DOTALL)
PROMPT = "$ "
INTERRUPT = "\x03"


class Terminal:
    """A shell in a terminal."""

    def __init__(self, url: str, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
        path = f"{PROGRAM.parent}:{environment['PATH']}"
        environment |= {"PS1": PROMPT, "PATH": path, "NATS_URL": url, "TERM": "dumb", "HISTFILE": ""}
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting"], environment)
        self.shown = ""
        """What it has shown since the last wait."""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def run(self, command: str) -> None:
        """Types a command as soon as there is a prompt, and waits for its echo."""
        self._wait(re.escape(PROMPT) + "$")
        self.type(command + "\n")
        self._wait(".*\n")

    def wait_for_line(self, line: str) -> None:
        """Waits until it shows a line; an ellipsis stands for any text."""
        self._wait("(?:^|\n)" + ".*?".join(map(re.escape, line.split("…"))) + "(?=\n)")

    def _wait(self, expression: str) -> None:
        pattern = re.compile(expression)
        deadline = time.monotonic() + TIMEOUT
        while not (found := pattern.search(self.shown)):
            left = deadline - time.monotonic()
            assert left > 0, f"{expression!r} is not in {self.shown!r}"
            if select.select([self.descriptor], [], [], left)[0]:
                self.shown += os.read(self.descriptor, 4096).decode().replace("\r", "")
                # How a terminal shows Ctrl-C.
                self.shown = self.shown.replace("^C", "")
        self.shown = self.shown[found.end() :]

    def close(self) -> None:
        os.kill(self.process, signal.SIGHUP)
        os.close(self.descriptor)
        with suppress(ChildProcessError):
            os.waitpid(self.process, 0)


def test_tutorial(server: Server, tmp_path: Path) -> None:
    terminals = {number: Terminal(server.url, tmp_path) for number in "12"}
    try:
        assert len(BLOCKS) > 15
        for number, block in BLOCKS:
            terminal = terminals[number]
            for line in block.splitlines():
                if line == "^C":
                    terminal.type(INTERRUPT)
                elif line.startswith(PROMPT):
                    terminal.run(line.removeprefix(PROMPT))
                else:
                    terminal.wait_for_line(line)
    finally:
        for terminal in terminals.values():
            terminal.close()


def test_tutorial_mentions_what_it_runs() -> None:
    text = (ROOT / "docs/tutorial-shell.md").read_text()
    commands = set(re.findall(r"nats-presence (\w+)", "\n".join(block for _, block in BLOCKS)))
    assert commands == {"serve", "request", "offline", "watch"}
    assert set(re.findall(r"--(\w+)", text)) <= {"client", "grace", "max", "help"}
