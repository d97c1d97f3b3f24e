"""Small plots as SVG text: curves, bars and points in the page's own colours; nothing is loaded, nothing runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 26, 40
ROW = 22  # of a bar
TEXT_WIDTH, LETTER = 60, 7  # room for the text behind a bar at least, and for each of its letters
COLOURS = 8
NAME_WIDTH, NAME_HEIGHT = 200, 13  # room for the name of a point


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` shade what lies around it."""

    name: str
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Bar:
    """One row; `second`, where it is a number, is a thinner bar below the first."""

    name: str
    value: float
    text: str
    second: float = math.nan


@dataclass(frozen=True)
class Point:
    """`hollow`: it was not measured but promised; `start`: from where an arrow leads to it."""

    name: str
    x: float
    y: float
    note: str = ""
    hollow: bool = False
    start: tuple[float, float] | None = None
    joined: bool = False  # part of the line through the front


@dataclass(frozen=True)
class Scale:
    """Where values of one axis lie between two ends of the picture."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        """Quarters of a linear axis; of a logarithmic one the powers of ten and, where these are few, 2 and 5 times."""
        if not self.logarithmic:
            return [self.low + (self.high - self.low) * quarter / 4 for quarter in range(5)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if len(powers) > 4 else (1, 2, 5)
        every = (step * 10.0**power for power in powers for step in steps)
        return [value for value in every if self.low * 0.999 <= value <= self.high * 1.001]


def line_plot(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves over 0, 1, 2, ... from zero (or the lowest value below it); a value that is not finite leaves a gap."""
    every = [v for line in lines for v in (*line.y, *line.high, *line.low) if math.isfinite(v)]
    top, least = nice(max(every, default=1.0)), min(0.0, *every) if every else 0.0
    count = max((len(line.y) for line in lines), default=1)
    x = Scale(0, max(1, count - 1), LEFT, WIDTH - RIGHT)
    y = Scale(-nice(-least) if least < 0 else 0.0, top, HEIGHT - BOTTOM, TOP)
    places = sorted({0, (count - 1) // 4, (count - 1) // 2, 3 * (count - 1) // 4, count - 1})
    body = [_axes(y, x_label, y_label)]
    body += [_tick_below(x.at(place), str(place)) for place in places]
    for place, line in enumerate(lines):
        body += [_band(line, x, y, place)] if line.low else []
        body.append(f'<path class="line c{place % COLOURS}" d="{_path(line.y, x, y)}"/>')
        body += [_dot(x.at(at), y.at(v), f"{line.name}: {x_label} {at}, {v:.4g}", place)
                 for at, v in enumerate(line.y) if math.isfinite(v)]  # fmt: skip
    return _svg(HEIGHT, f"{y_label} by {x_label}", body) + _legend([line.name for line in lines])


def bar_plot(bars: Sequence[Bar], label: str, names: Sequence[str] = ()) -> str:
    """Horizontal bars from zero, one a row, with their text behind them; what is not finite has no bar."""
    values = [v for bar in bars for v in (bar.value, bar.second) if math.isfinite(v)]
    room = max([TEXT_WIDTH, *(LETTER * len(bar.text) + 12 for bar in bars)])
    x = Scale(0, max([*values, 0.0]) or 1.0, 250, WIDTH - room)
    body = []
    for place, bar in enumerate(bars):
        y = 8 + place * ROW
        one = x.at(max(0.0, bar.value)) if math.isfinite(bar.value) else x.start
        two = x.at(max(0.0, bar.second)) if math.isfinite(bar.second) else x.start
        thick = 8 if math.isfinite(bar.second) else 14
        body.append(f'<text class="name" x="{x.start - 8}" y="{y + 14}" text-anchor="end">{escape(bar.name)}</text>')
        body.append(_bar(x.start, one, y + 3, thick, "c0"))
        body += [_bar(x.start, two, y + 12, 5, "c2")] if math.isfinite(bar.second) else []
        body.append(f'<text class="value" x="{max(one, two) + 6:.1f}" y="{y + 14}">{escape(bar.text)}</text>')
    return _svg(8 + ROW * len(bars) + 6, label, body) + _legend(names, (0, 2))


def _bar(start: float, end: float, y: float, height: int, colour: str) -> str:
    return f'<rect class="bar {colour}" x="{start}" y="{y}" width="{end - start:.1f}" height="{height}" rx="2"/>'


def scatter_plot(points: Sequence[Point], x_label: str, y_label: str, spell: Callable[[float], str]) -> str:
    """Points with their names; the y axis is logarithmic where all are above 0, since losses span powers of ten."""
    kept = [point for point in points if math.isfinite(point.x + point.y)]
    ys = [point.y for point in kept]
    logarithmic = bool(ys) and min(ys) > 0
    low, high = (min(ys) / 1.6, max(ys) * 1.6) if logarithmic else (0.0, nice(max(ys, default=1.0)))
    x = Scale(*around([point.x for point in kept]), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    body = [_axes(y, x_label, y_label), *(_tick_below(x.at(tick), spell(tick)) for tick in x.ticks())]
    joined = sorted((point.x, point.y) for point in kept if point.joined)
    if len(joined) > 1:
        way = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in joined)
        body.append(f'<path class="front" d="M{way}"/>')
    for point, height in _named(kept, x, y):
        body += _point(point, x, y, height)
    return _svg(HEIGHT, f"{y_label} by {x_label}", body)


def around(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis whose quarters are round: from zero where values reach down to its first half, else nearer."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    if least < most / 2:
        return 0.0, nice(most)
    step = nice((most - least) / 3 or most / 3)
    low = math.floor(least / step) * step
    return low, low + 4 * step


def _named(points: Sequence[Point], x: Scale, y: Scale) -> list[tuple[Point, float]]:
    """Points and the heights of their names, which do not cover each other: measured above, promised below."""
    placed: list[tuple[float, float]] = []
    found = []
    for point in sorted(points, key=lambda point: (point.hollow, point.y if not point.hollow else -point.y)):
        at, height, step = x.at(point.x), y.at(point.y) + (15 if point.hollow else -6), 1 if point.hollow else -1
        while any(abs(at - x) < NAME_WIDTH and abs(height - y) < NAME_HEIGHT for x, y in placed):
            height += step
        placed.append((at, height))
        found.append((point, height))
    return found


def _point(point: Point, x: Scale, y: Scale, height: float) -> list[str]:
    at, up = x.at(point.x), y.at(point.y)
    body = []
    if point.start is not None:
        a, b = x.at(point.start[0]), y.at(point.start[1])
        body.append(f'<line class="way" x1="{a:.1f}" y1="{b:.1f}" x2="{at:.1f}" y2="{up:.1f}"/>')
    kind = "hollow" if point.hollow else "dot c0" if point.joined else "dot c4"
    told = escape(f"{point.name}: {point.note}" if point.note else point.name)
    body.append(f'<circle class="{kind}" cx="{at:.1f}" cy="{up:.1f}" r="5"><title>{told}</title></circle>')
    left = at > WIDTH - NAME_WIDTH
    place = f'x="{at - 6 if left else at + 6:.1f}" y="{height:.1f}" text-anchor="{"end" if left else "start"}"'
    return [*body, f'<text class="{"value" if point.hollow else "name"}" {place}>{escape(point.name)}</text>']


def nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below a value; 1 for none above 0."""
    if not value > 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 2.5, 5) if value <= step * power), 10 * power)


def _svg(height: float, label: str, body: Sequence[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:g}"'
    return f'<svg {box} role="img" aria-label="{escape(label, quote=True)}">{"".join(body)}</svg>'


def _axes(y: Scale, x_label: str, y_label: str) -> str:
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="0" y="12">{escape(y_label)}</text>')
    return "".join(parts)


def _tick_below(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'


def _dot(x: float, y: float, told: str, place: int) -> str:
    title = f"<title>{escape(told)}</title>"
    return f'<circle class="dot c{place % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">{title}</circle>'


def _path(values: Sequence[float], x: Scale, y: Scale) -> str:
    parts, pen = [], "M"
    for place, value in enumerate(values):
        if not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{x.at(place):.1f} {y.at(value):.1f}")
        pen = "L"
    return "".join(parts)


def _band(line: Line, x: Scale, y: Scale, place: int) -> str:
    kept = [i for i, (a, b) in enumerate(zip(line.low, line.high, strict=True)) if math.isfinite(a + b)]
    upper = [f"{x.at(i):.1f} {y.at(line.high[i]):.1f}" for i in kept]
    lower = [f"{x.at(i):.1f} {y.at(line.low[i]):.1f}" for i in reversed(kept)]
    return f'<path class="band c{place % COLOURS}" d="M{"L".join(upper + lower)}Z"/>' if kept else ""


def _legend(names: Sequence[str], places: Sequence[int] = range(COLOURS)) -> str:
    if len(names) < 2:
        return ""
    keys = (f'<span class="key c{places[n % len(places)]}">{escape(name)}</span>' for n, name in enumerate(names))
    return f'<p class="legend">{" ".join(keys)}</p>'
