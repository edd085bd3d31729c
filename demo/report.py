"""Prints events for the demo's driver, one JSON object per line, with the time."""

import json
import sys
import time
from typing import Any


def report(event: str, **fields: Any) -> None:
    """Prints an event of this moment, or of the time in the field `at`."""
    # Nanoseconds of the machine's monotonic clock, which all processes share.
    line = json.dumps({"event": event, "at": time.monotonic_ns(), **fields})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
