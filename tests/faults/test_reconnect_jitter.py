"""Fifty processes lose their server at the same moment, and reconnect spread over time."""

from __future__ import annotations

import re
import time
from datetime import datetime

from harness import Connect, Server, Shell

DOWN = 3.0
"""Seconds without a server."""

WINDOW = 0.1
MOST = 25
"""How many of the fifty may reconnect within the window. Each tries after 50 ms, 100, 200 ..., half of it random: after
three seconds the attempts are spread over three more. In 2,000 simulated restarts at most 13 came within 100 ms;
without jitter all come at once."""


def test_fifty_processes_do_not_reconnect_at_once(server: Server, connect: Connect) -> None:
    server.kill()
    server.start("-D")
    pairs = [(connect(), connect()) for _ in range(25)]
    served = []
    for number, (gateway, worker) in enumerate(pairs):
        worker.do(f"serve svc{number} workers 0")
        gateway.do(f"request 1 svc{number} ann x")
        served.append(worker.wait(event="REQUEST")["n"])
        worker.do(f"flood {served[-1]} 100")
    for gateway, _ in pairs:
        receive(gateway)
    server.kill()
    for pair, n in zip(pairs, served):
        for end in pair:
            end.wait(event="DISCONNECTED")
        pair[1].do(f"flood {n} 100")
    time.sleep(DOWN)
    server.start("-D")
    for (gateway, worker), n in zip(pairs, served):
        receive(gateway)
        worker.do(f"flood {n} 100")
        receive(gateway)
        worker.do(f"end {n}")
        gateway.wait(event="END")
        # Each reconnected once.
        assert [end.ask("stats")["connects"] for end in (gateway, worker)] == [2, 2]
    came = times_of_connections(server)
    assert len(came) == 50
    assert most_within(WINDOW, came) <= MOST, came


def receive(gateway: Shell) -> None:
    assert [gateway.wait(event="DATA")["data"] for _ in range(100)] == [str(i) for i in range(100)]


def times_of_connections(server: Server) -> list[float]:
    """The times at which clients connected, from the server's log."""
    found = re.findall(r"\] (\S+ \S+) \[DBG\] .* Client connection created", "".join(server.log))
    return sorted(datetime.strptime(time, "%Y/%m/%d %H:%M:%S.%f").timestamp() for time in found)


def most_within(window: float, times: list[float]) -> int:
    return max(sum(1 for time in times if begin <= time <= begin + window) for begin in times)
