"""Runs docs/tutorial-shell.md."""

from __future__ import annotations

import os
import re
from pathlib import Path

from conftest import PROGRAM
from harness import ROOT, Server
from terminal import Terminal, play, read_blocks

BLOCKS = read_blocks("tutorial-shell.md")


def test_tutorial(server: Server, tmp_path: Path) -> None:
    variables = {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "NATS_URL": server.url}
    assert len(BLOCKS) > 15
    play(BLOCKS, lambda: Terminal(tmp_path, variables))


def test_tutorial_mentions_what_it_runs() -> None:
    text = (ROOT / "docs/tutorial-shell.md").read_text()
    commands = set(re.findall(r"nats-presence (\w+)", "\n".join(block for _, block in BLOCKS)))
    assert commands == {"serve", "request", "offline", "watch"}
    assert set(re.findall(r"--(\w+)", text)) <= {"client", "grace", "max", "help"}
