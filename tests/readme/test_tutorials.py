"""Follows the tutorials for C, Go and Python: saves their programs, and types their commands into terminals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from harness import BUILD, ROOT, Server, steady_port
from terminal import Terminal, play, read_blocks

PROGRAM = re.compile(r"```(?:c|go|python)\n((?:/\*|//|#) (\w+\.\w+).*?)```", re.DOTALL)
COMPILING = 60.0
"""Timeout in seconds for whatever shows up in a terminal: compilers may be slow."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.mark.parametrize("language", ["c", "go", "python"])
def test_tutorial(language: str, server: Server) -> None:
    assert shutil.which("curl"), "curl is missing, but the tutorials need it: install it"
    page = f"tutorial-{language}.md"
    addresses = {"127.0.0.1:4222": f"127.0.0.1:{server.port}", "8080": str(steady_port())}

    def place(text: str) -> str:
        for documented, ours in addresses.items():
            text = text.replace(documented, ours)
        return text

    # Always the same folder: Go compiles its binding only once for each.
    folder = BUILD / "tutorials" / language
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    programs = PROGRAM.findall((ROOT / "docs" / page).read_text())
    assert {name.partition(".")[0] for _, name in programs} == {"worker", "gateway"}
    for text, name in programs:
        (folder / name).write_text(place(text))
    blocks = [(number, place(block)) for number, block in read_blocks(page)]
    assert any("stopped after" in block for _, block in blocks)
    play(blocks, lambda: Terminal(folder, {"CHECKOUT": str(ROOT)}, COMPILING))
