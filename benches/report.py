#!/usr/bin/env python3
# ruff: noqa: RUF001
"""Writes docs/bench.md and its plots from build/bench.json. benches/run calls it after measuring all rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plot import Bar, Growth, Line, Row, bars, growths

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "bench.json"
DOCS = ROOT / "docs"
APPENDIX = ROOT / "benches" / "notes.md"

Figure = dict[str, Any]

PARTS = {
    "Presence in a process": (1, 2, 3),
    "Level 0, which peers without this library use": (4, 5, 6),
    "A client leaves": (7,),
    "Lanes": (8, 9, 10, 13),
    "Go and Python, on lanes": (11, 12),
    "The Go package message": (16,),
    "Dead gateways and idle streams": (14, 15),
    "The yardstick: what nats-server carries": (17,),
    "How cost grows": (18, 19, 20, 21),
}
NOTES = {
    "The yardstick: what nats-server carries": (
        "Here the column *ours* has nats.c with nats-server. The peer has no server: one process writes the same bytes "
        "to another one over TCP. The difference is the share of nats-server, and of the second connection."
    ),
    "How cost grows": (
        "Here the column *ours* has a growing number of streams, lanes, clients or threads, and *peer* the smallest "
        "number. All numbers have equally many messages or calls. So while a ratio keeps to its target, the whole cost "
        "grows no faster than linearly. The targets are generous: they leave room for smaller batches and for caches."
    ),
}
OURS, THEIRS = 0, 1  # colours


def short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(value: float, unit: str) -> str:
    return short(value) + (unit if unit == "/s" else f" {unit}")


def spread(numbers: dict[str, Any], unit: str) -> str:
    least, most = short(numbers["min"]), short(numbers["max"])
    return amount(numbers["median"], unit) + ("" if least == most else f" ({least} … {most})")


def bound(figure: Figure, target: dict[str, Any]) -> str:
    limit = f"{short(target['limit'])} ×" if target["of"] == "ratio" else amount(target["limit"], figure["unit"])
    return f"{limit} or {'more' if target['at_least'] else 'less'}"


# The table ------------------------------------------------------------------------------------------------------------


def document(report: dict[str, Any]) -> Iterator[str]:
    grows = {row for row, *_ in GROWTH}
    targets = [
        (figure["row"] in grows, target["reached"]) for figure in report["figures"] for target in figure["targets"]
    ]
    reached = [is_reached for is_growth, is_reached in targets if not is_growth]
    kept = [is_reached for is_growth, is_reached in targets if is_growth]
    yield "# Performance"
    yield ""
    yield "<!-- Written by benches/run from build/bench.json: do not edit. -->"
    yield ""
    yield (
        "Each figure is compared with that of another library (the peer), measured on the same machine in the same "
        f"minutes, ours and the peer's alternating, with {report['runs']} runs of each."
    )
    yield (
        f"**{sum(reached)} of {len(reached)} targets are reached**; the others are marked. "
        f"[How cost grows](#how-cost-grows) has {len(kept)} more, of which {sum(kept)} are reached."
    )
    yield ""
    yield from machine(report)
    yield ""
    for name, alt in (
        ("rates", "Messages and streams per second, as a multiple of the peer's"),
        ("cpu", "CPU time of the sending process per message, as a multiple of the peer's"),
        ("latency", "One-way latency, ours and nats.c's"),
        ("growth", "CPU time of a message or call over the number of streams, lanes, clients and threads"),
    ):
        yield f"![{alt}](bench-{name}.svg)"
        yield ""
    yield (
        "Medians (min … max). The ratio is ours / peer, the median of the runs. "
        "[benches/README.md](../benches/README.md) describes what each row measures, and how."
    )
    for part, rows in PARTS.items():
        yield ""
        yield f"## {part}"
        if part in NOTES:
            yield NOTES[part]
            yield ""
        yield "| row | figure | ours | peer | the peer's | ratio | target | |"
        yield "|---|---|---|---|---|---|---|---|"
        yield from (cells(figure) for figure in report["figures"] if figure["row"] in rows)
    yield ""
    yield APPENDIX.read_text().rstrip()
    yield ""
    yield "## How to repeat the measurement"
    yield "```sh"
    yield "apt-get install libnats-dev    # nats.c"
    minutes = max(1, round(report["seconds"] / 60))
    yield f"make bench                     # about {minutes} minutes, on an otherwise idle machine"
    yield "```"
    yield "This writes this page. `benches/run --rows 8,9 --runs 3` measures some rows, and only prints them."


def machine(report: dict[str, Any]) -> Iterator[str]:
    about = report["machine"]
    yield "| machine | |"
    yield "|---|---|"
    yield f"| CPU | {about['cpu']}, {about['cores']} cores for all processes of a measurement, including nats-server |"
    yield f"| memory, kernel | {about['memory']}, Linux {about['kernel']} |"
    names = (
        "nats-presence",
        "nats-server",
        "nats.c",
        "async-nats",
        "nats.go",
        "nats-py",
        "rustc",
        "Go",
        "Python",
        "C compiler",
    )
    yield f"| versions | {' · '.join(f'{name} {about[name]}' for name in names)} |"
    yield f"| load at the start | {about['load_at_start']} |"


def cells(figure: Figure) -> str:
    peer, ratio = figure.get("peer"), figure.get("ratio")
    targets = figure["targets"]
    verdicts = ["reached" if target["reached"] else "**missed**" for target in targets]
    return " | ".join(
        [
            f"| {figure['row']}",
            ("↳ " if figure["is_detail"] else "") + figure["name"],
            spread(figure["ours"], figure["unit"]),
            peer["name"] if peer else "",
            spread(peer, figure["unit"]) if peer else "",
            f"{short(ratio['median'])} × ({short(ratio['min'])} … {short(ratio['max'])})" if ratio else "",
            "; ".join(bound(figure, target) for target in targets),
            "; ".join(verdicts) + " |",
        ]
    )


# The plots ------------------------------------------------------------------------------------------------------------

NATS_C, NATS_GO, NATS_PY = "nats.c publish → subscribe", "nats.go publish → subscribe", "nats-py publish → subscribe"
BY_HAND, BEST = "nats.go by hand", "nats.c, best of 1 to 64 KiB"
RATES = (
    ("lane, 16 B, one stream", 8, "16_messages_per_s", NATS_C),
    ("lane, 128 B", 8, "128_messages_per_s", NATS_C),
    ("lane, 1 KiB", 8, "1024_messages_per_s", NATS_C),
    ("lane, 16 B, 1000 streams", 9, "messages_per_s", NATS_C),
    ("lane, 128 B: bytes, best size", 8, "128_gb_per_s", BEST),
    ("lane, 1 KiB: bytes, best size", 8, "1024_gb_per_s", BEST),
    ("level 0, 16 B", 4, "16_messages_per_s", NATS_C),
    ("level 0, 128 B", 4, "128_messages_per_s", NATS_C),
    ("short streams, lane, 1000 at once", 13, "streams_per_s", "nats.c, the same 3 messages"),
    ("short streams, level 0, 64 at once", 6, "streams_per_s", "nats.c, the same 3 messages"),
    ("Go, 16 B", 11, "messages_per_s", NATS_GO),
    ("package message, short streams, 16 at once", 16, "16_streams_per_s", BY_HAND),
    ("package message, one stream", 16, "messages_per_s", BY_HAND),
    ("Python, 16 B, lists of 1000", 12, "threads_lists_messages_per_s", NATS_PY),
    ("Python, 16 B, one at a time", 12, "threads_each_messages_per_s", NATS_PY),
    ("asyncio, 16 B, lists of 1000", 12, "asyncio_lists_messages_per_s", NATS_PY),
    ("asyncio, 16 B, one at a time", 12, "asyncio_each_messages_per_s", NATS_PY),
)
CPU = (
    ("lane, 16 B", 8, "16_cpu_ns_per_send", "nats.c publish"),
    ("level 0, 16 B", 5, "16_cpu_ns_per_send", "nats.c publish"),
    ("level 0, 16 B", 5, "16_cpu_ns_per_send", "async-nats publish"),
    ("level 0, 128 B", 5, "128_cpu_ns_per_send", "nats.c publish"),
    ("Go, lane, 16 B", 11, "cpu_ns_per_send", "nats.go publish"),
    ("Python, lane, lists of 1000", 12, "threads_lists_cpu_ns_per_send", "nats-py publish"),
    ("Python, lane, one at a time", 12, "threads_each_cpu_ns_per_send", "nats-py publish"),
    ("asyncio, lane, lists of 1000", 12, "asyncio_lists_cpu_ns_per_send", "nats-py publish"),
    ("asyncio, lane, one at a time", 12, "asyncio_each_cpu_ns_per_send", "nats-py publish"),
)
LATENCIES = (
    ("a message on an idle lane, p50", 10, "p50_us", "nats.c → callback"),
    ("a message on an idle lane, p99", 10, "p99_us", "nats.c → callback"),
    ("offline mark → STOPPED event, p50", 7, "event_p50_us", "nats.c → callback"),
    ("offline mark → STOPPED event, p99", 7, "event_p99_us", "nats.c → callback"),
    ("offline mark → status word, p50", 7, "word_p50_us", "nats.c → word, polled"),
    ("offline mark → status word, p99", 7, "word_p99_us", "nats.c → word, polled"),
)

# A row, the number that grows, and its figures: what a line is called, and how the keys of its values end.
GROWTH = (
    (18, "streams at once, on one lane", {"CPU time per send": "_cpu_ns_per_send"}),
    (19, "lanes, with 100 streams", {"CPU time per send": "_cpu_ns_per_send"}),
    (20, "clients", {"mark online": "_online_ns", "mark offline": "_offline_ns", "is online": "_check_ns"}),
    (21, "sender threads, each with a stream", {"CPU time per send": "_cpu_ns_per_send"}),
)

Choice = tuple[str, int, str, str]
Find = Callable[[Choice], Figure]


def finder(report: dict[str, Any]) -> Find:
    beside = [figure for figure in report["figures"] if "peer" in figure]
    known = {(figure["row"], figure["key"], figure["peer"]["name"]): figure for figure in beside}
    return lambda choice: known[choice[1:]]


def of_peer(choice: Choice, figure: Figure) -> Row:
    """The ratio of ours to the peer's. A stroke marks its target."""
    ratio, unit = figure["ratio"], figure["unit"]
    ours, theirs = (amount(figure[whose]["median"], unit) for whose in ("ours", "peer"))
    bar = Bar(ratio["median"], f"{short(ratio['median'])} ×  ({ours}, {theirs})", OURS, (ratio["min"], ratio["max"]))
    limits = [target["limit"] for target in figure["targets"] if target["of"] == "ratio"]
    return Row(f"{choice[0]} · {choice[3].split()[0].rstrip(',')}", [bar], limits[0] if limits else None)


def pair(choice: Choice, figure: Figure) -> Row:
    both = [
        Bar(numbers["median"], amount(numbers["median"], figure["unit"]), colour, (numbers["min"], numbers["max"]))
        for colour, numbers in ((OURS, figure["ours"]), (THEIRS, figure["peer"]))
    ]
    return Row(choice[0], both)


def growth(figures: list[Figure], row: int, title: str, endings: dict[str, str]) -> Growth:
    """The sizes are in the figures' keys (10_cpu_ns_per_send) and in the name of their peer (1 stream)."""
    lines, limits = [], set()
    for name, ending in endings.items():
        chosen = [figure for figure in figures if figure["row"] == row and figure["key"].endswith(ending)]
        limits |= {target["limit"] for figure in chosen for target in figure["targets"]}
        first = chosen[0]["peer"]
        points = [(number_in(first["name"]), first["median"])]
        points += [(number_in(figure["key"].split("_")[0]), figure["ours"]["median"]) for figure in chosen]
        lines.append(Line(name, points))
    return Growth(title, lines, max(limits), "ns", short)


def number_in(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def plots(find: Find, figures: list[Figure]) -> dict[str, str]:
    return {
        "rates": bars(
            "Per second, as a multiple of the peer's: more is better",
            [of_peer(choice, find(choice)) for choice in RATES],
            note="in brackets: ours, the peer's; red stroke: target; thin line: min to max",
            logarithmic=True,
        ),
        "cpu": bars(
            "CPU time of the sending process per message, as a multiple of the peer's: less is better",
            [of_peer(choice, find(choice)) for choice in CPU],
            note="in brackets: ours, the peer's; thin line: min to max",
            logarithmic=True,
        ),
        "latency": bars(
            "From one process to another through nats-server, µs: less is better",
            [pair(choice, find(choice)) for choice in LATENCIES],
            names=["ours", "nats.c"],
        ),
        "growth": growths(
            "CPU time of a message or a call, as a multiple of that at the smallest number: flat is linear",
            [growth(figures, *panel) for panel in GROWTH],
            note="red line: target; the number of messages or calls is the same everywhere",
        ),
    }


def write(report: dict[str, Any]) -> None:
    DOCS.joinpath("bench.md").write_text("\n".join(document(report)) + "\n")
    for name, plot in plots(finder(report), report["figures"]).items():
        DOCS.joinpath(f"bench-{name}.svg").write_text(plot)


if __name__ == "__main__":
    whole = json.loads(REPORT.read_text())
    if not whole["is_whole"]:
        sys.exit(f"{REPORT} does not have all rows, or is from a quick run: run `make bench`")
    write(whole)
