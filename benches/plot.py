# ruff: noqa: RUF001
"""Makes plots as SVG for the documents: panels of lines over time, and horizontal bars.

The plots have a background, so that they can also be read on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH = 880
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
INK, FAINT, GRID, SHADE, TARGET = "#1f2328", "#656d76", "#e4e8ec", "#f6f1e4", "#b00020"
POINTS = 400
"""The number of points that are drawn of a line. More would not be visible."""


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]
    tell: Callable[[float], str] = "{:,.0f}".format


@dataclass(frozen=True)
class Bar:
    value: float
    text: str
    colour: int = 0
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """Bars with a common label, and their target."""

    label: str
    bars: Sequence[Bar]
    target: float | None = None


@dataclass(frozen=True)
class Growth:
    """Lines over sizes, which are drawn at equal distances, as multiples of their first values; and their limit."""

    title: str
    lines: Sequence[Line]
    limit: float
    unit: str
    tell: Callable[[float], str]


@dataclass
class _Canvas:
    height: float = 0
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", colour: str = INK, weight: int = 400
    ) -> None:
        style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1) -> None:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.parts.append(f'<line {ends} stroke="{colour}" stroke-width="{width}"/>')

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def curve(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>')

    def legend(self, x: float, names: Sequence[tuple[str, int]]) -> None:
        self.height += 20
        for name, colour in names:
            self.box(x, self.height - 9, 10, 10, COLOURS[colour % len(COLOURS)])
            self.text(x + 15, self.height, name, colour=FAINT)
            x += 34 + 6.6 * len(name)

    def finish(self, title: str) -> str:
        size = f'width="{WIDTH}" height="{self.height:.0f}" viewBox="0 0 {WIDTH} {self.height:.0f}"'
        font = 'font-family="system-ui, sans-serif" font-size="12"'
        background = f'<rect width="{WIDTH}" height="{self.height:.0f}" rx="6" fill="#ffffff"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img"><title>{escape(title)}</title>'
        return "\n".join([head, background, *self.parts, "</svg>", ""])


def lines(
    title: str, panels: Sequence[Panel], *, tell_x: Callable[[float], str], shades: Sequence[tuple[float, float]]
) -> str:
    """Draws panels with a common time axis. Lines of one name have one colour. `shades` are periods of time."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    left, right, high = 90.0, WIDTH - 20.0, 96.0
    last = max(x for panel in panels for line in panel.lines for x, _ in line.points)
    canvas = _Canvas(26)
    canvas.text(20, canvas.height, title, weight=600)
    canvas.legend(20, [(name, number) for number, name in enumerate(names)])

    def at(x: float) -> float:
        return left + (right - left) * x / last

    for panel in panels:
        canvas.height += 34
        canvas.text(left, canvas.height - 8, panel.title, weight=600)
        top, bottom = canvas.height, canvas.height + high
        step = nice_step(max(y for line in panel.lines for _, y in line.points) or 1, 4)
        most = step * math.ceil((max(y for line in panel.lines for _, y in line.points) or 1) / step)
        for begin, end in shades:
            canvas.box(at(begin), top, at(end) - at(begin), high, SHADE)
        for tick in range(round(most / step) + 1):
            y = bottom - high * tick * step / most
            canvas.line(left, y, right, y)
            canvas.text(left - 8, y + 4, panel.tell(tick * step), anchor="end", colour=FAINT)
        for line in panel.lines:
            points = [(at(x), bottom - high * y / most) for x, y in thinned(line.points)]
            canvas.curve(points, COLOURS[names.index(line.name) % len(COLOURS)])
        canvas.height = bottom
    step = nice_step(last, 10)
    canvas.height += 18
    for tick in range(int(last / step) + 1):
        canvas.text(at(tick * step), canvas.height, tell_x(tick * step), anchor="middle", colour=FAINT)
    canvas.height += 14
    return canvas.finish(title)


def bars(
    title: str, rows: Sequence[Row], *, names: Sequence[str] = (), note: str = "", logarithmic: bool = False
) -> str:
    """Draws rows of horizontal bars from 0 or, if `logarithmic`, from 1 in both directions. Strokes mark targets."""
    left, right, thick = 285.0, WIDTH - 235.0, 13.0
    values = [value for row in rows for value in (row.target, *(bar.value for bar in row.bars)) if value is not None]
    canvas = _Canvas(26)
    canvas.text(20, canvas.height, title, weight=600)
    if note:
        canvas.height += 18
        canvas.text(20, canvas.height, note, colour=FAINT)
    if names:
        canvas.legend(20, [(name, number) for number, name in enumerate(names)])
    canvas.height += 14
    low = min(0.0, *(math.log10(value) for value in values)) if logarithmic else 0.0
    high = max(math.log10(value) for value in values) if logarithmic else max(values)

    def at(value: float) -> float:
        value = math.log10(value) if logarithmic else value
        return left + (right - left) * (value - low) / (high - low)

    origin, top = at(1) if logarithmic else left, canvas.height
    for row in rows:
        middle = canvas.height + thick * len(row.bars) / 2
        canvas.text(left - 10, middle + 4, row.label, anchor="end")
        for bar in row.bars:
            begin, end = sorted((origin, at(bar.value)))
            canvas.box(begin, canvas.height + 1, max(end - begin, 1), thick - 2, COLOURS[bar.colour])
            if bar.spread:
                y = canvas.height + thick / 2
                least, most = (min(max(at(value), left), right) for value in bar.spread)
                canvas.line(least, y, most, y, INK)
            canvas.text(right + 16, canvas.height + thick - 3, bar.text, colour=FAINT)
            canvas.height += thick
        if row.target is not None:
            canvas.line(
                at(row.target), middle - thick * len(row.bars) / 2 - 3, at(row.target), canvas.height + 3, "#b00020", 2
            )
        canvas.height += 9
    canvas.line(origin, top - 4, origin, canvas.height - 4, FAINT)
    canvas.height += 8
    return canvas.finish(title)


def growths(title: str, panels: Sequence[Growth], *, note: str) -> str:
    """Draws panels, two beside each other. Red lines are limits."""
    canvas = _Canvas(26)
    canvas.text(20, canvas.height, title, weight=600)
    canvas.height += 18
    canvas.text(20, canvas.height, note, colour=FAINT)
    wide, high, between = 370.0, 120.0, 435.0
    for begin in range(0, len(panels), 2):
        beside = panels[begin : begin + 2]
        top = canvas.height + 44 + 17 * max(len(panel.lines) for panel in beside)
        for column, panel in enumerate(beside):
            left, height = 50 + between * column, canvas.height + 26
            canvas.text(left, height, panel.title, weight=600)
            shown = [[value / line.points[0][1] for _, value in line.points] for line in panel.lines]
            step = nice_step(max(panel.limit, *(value for values in shown for value in values)) * 1.05, 4)
            most = step * math.ceil(max(panel.limit, *(value for values in shown for value in values)) * 1.05 / step)
            for tick in range(round(most / step) + 1):
                y = top + high * (1 - tick * step / most)
                canvas.line(left, y, left + wide, y)
                canvas.text(left - 8, y + 4, f"{tick * step:g} ×", anchor="end", colour=FAINT)
            y = top + high * (1 - panel.limit / most)
            canvas.line(left, y, left + wide, y, TARGET, 1.4)
            each = wide / len(panel.lines[0].points)
            for number, (line, values) in enumerate(zip(panel.lines, shown, strict=True)):
                colour = COLOURS[number % len(COLOURS)]
                height += 17
                canvas.box(left, height - 9, 10, 10, colour)
                told = " → ".join(panel.tell(value) for _, value in line.points)
                canvas.text(left + 15, height, f"{line.name}: {told} {panel.unit}", colour=FAINT)
                points = [
                    (left + each * (at + 0.5), top + high * (1 - value / most)) for at, value in enumerate(values)
                ]
                canvas.curve(points, colour)
                for x, y in points:
                    canvas.box(x - 2.5, y - 2.5, 5, 5, colour)
            for at, (size, _) in enumerate(panel.lines[0].points):
                canvas.text(left + each * (at + 0.5), top + high + 16, f"{size:,.0f}", anchor="middle", colour=FAINT)
        canvas.height = top + high + 20
    canvas.height += 12
    return canvas.finish(title)


def nice_step(span: float, ticks: int) -> float:
    """Returns 1, 2 or 5 times a power of ten, so that there are about `ticks` steps."""
    power = 10.0 ** math.floor(math.log10(span / ticks))
    return next(step * power for step in (1, 2, 5, 10) if step * power * ticks >= span)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the smallest and the largest value of each section."""
    if len(points) <= POINTS:
        return list(points)
    each = math.ceil(2 * len(points) / POINTS)
    kept: list[tuple[float, float]] = []
    for begin in range(0, len(points), each):
        section = points[begin : begin + each]
        kept += sorted({min(section, key=lambda point: point[1]), max(section, key=lambda point: point[1])})
    return kept
