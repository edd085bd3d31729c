"""Types the commands of a tutorial into terminals, and compares what they show."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from harness import ROOT, TIMEOUT

PROMPT = "$ "
INTERRUPT = "\x03"
OURS = ("NATS_", "MAKE", "MFLAGS", "PKG_CONFIG_", "LD_LIBRARY_", "PYTHON")
"""How variables begin that `make` sets, and a reader has not."""


class Terminal:
    """A shell in a terminal."""

    def __init__(self, folder: Path, variables: dict[str, str], timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        environment |= {"PS1": PROMPT, "TERM": "dumb", "HISTFILE": "", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        environment |= variables
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Background processes of a script inherit that it is ignored.
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
        deadline = time.monotonic() + self.timeout
        while not (found := pattern.search(self.shown)):
            left = deadline - time.monotonic()
            assert left > 0, f"{expression!r} is not in {self.shown!r}"
            if select.select([self.descriptor], [], [], left)[0]:
                self.shown += os.read(self.descriptor, 4096).decode().replace("\r", "")
                # How a terminal shows Ctrl-C.
                self.shown = self.shown.replace("^C", "")
        self.shown = self.shown[found.end() :]

    def close(self) -> None:
        self.type(INTERRUPT)
        os.kill(self.process, signal.SIGHUP)
        os.close(self.descriptor)
        with suppress(ChildProcessError):
            os.waitpid(self.process, 0)


def read_blocks(tutorial: str) -> list[tuple[str, str]]:
    """The number of a terminal and what is typed and shown there, for each such block of a page below docs."""
    return re.findall(r"```terminal-(\d)\n(.*?)```", (ROOT / "docs" / tutorial).read_text(), re.DOTALL)


def play(blocks: list[tuple[str, str]], open_terminal: Callable[[], Terminal]) -> None:
    """Does in terminals what a reader does, from the first block to the last."""
    terminals: dict[str, Terminal] = {}
    try:
        for number, block in blocks:
            if number not in terminals:
                terminals[number] = open_terminal()
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
