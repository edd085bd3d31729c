"""Prints what happens, for the demo's driver: one JSON object a line, with the time."""

import json
import sys
import time
from typing import Any


def tell(event: str, **fields: Any) -> None:
    """Tells that something happened just now, unless the fields say when (`at`)."""
    # The machine's monotonic clock in nanoseconds, the same in all its processes.
    line = json.dumps({"event": event, "at": time.monotonic_ns(), **fields})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
