"""The memory of a process."""

from __future__ import annotations

import os
from pathlib import Path

from harness import Program


def resident(program: Program) -> int:
    """Resident bytes of a process."""
    pages = Path(f"/proc/{program.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
